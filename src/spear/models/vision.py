"""The two visual encoders, SigLIP's and MoGe's.

An encoder normalizes the pixels. Its *stem*, a convolution or several, turns each patch of pixels
into an embedding. Position embeddings are added, and a transformer follows. Patches are in
row-major order.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel
from transformers import initialization as init
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Embeddings
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionEmbeddings

from spear.errors import SpearError
from spear.models.fast.linear import FusedLinear, linear
from spear.models.layers import ATTENTION_NAME, BlockDiagonalMask, grouped_attention

SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FeatureMap = Tensor
"""Features of patches as an image of them, [B, width, rows, columns]."""

NUM_FEATURE_LAYERS = 4
"""SPEAR-VLM uses the outputs of the last four layers of MoGe's encoder, as MoGe does (the paper,
section "SPEAR-VLM")."""


# Pixels


def normalize_pixels(
    pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(pixel / 255 - mean) / std: uint8 [B, 3, h, w] in any memory layout -> contiguous float32."""
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # If all channels have the same constants, all of x is normalized in one step, with the first
    # channel's constants. Otherwise each channel is normalized alone.
    has_equal_channels = len(set(mean)) == 1 and len(set(std)) == 1
    channels = [x] if has_equal_channels else x.unbind(1)
    # The constants are Python numbers, because copying a tensor of them to a GPU would mean
    # waiting. The channels are views of x, so x changes in place.
    for channel, channel_mean, channel_std in zip(channels, mean, std, strict=False):
        channel.mul_(1 / (255 * channel_std)).sub_(channel_mean / channel_std)
    return x


def normalize_by_imagenet(images_0_to_1: Tensor) -> Tensor:
    """Normalize images [..., 3, h, w] of values 0 to 1 with ImageNet's mean and standard
    deviation."""
    device = images_0_to_1.device
    mean = torch.tensor(IMAGENET_MEAN, device=device, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device, dtype=torch.float32).view(3, 1, 1)
    return (images_0_to_1 - mean) / std


def check_pixels(view: str, pixels: Any, patch_px: int) -> None:
    """Check that a view's pixels are uint8 [B, 3, h, w], with h and w multiples of the patch size.

    Without the check, Transformers would ignore the pixels after the last whole patch.

    Raises:
        SpearError: The pixels have another type, shape or size.
    """
    if not isinstance(pixels, Tensor):
        problem = type(pixels).__name__
    elif pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        problem = f"{pixels.dtype} {tuple(pixels.shape)}"
    else:
        problem = ""
    if problem:
        raise SpearError(f"view {view!r} is {problem}. Pass uint8 tensors [B, 3, h, w].")
    height, width = pixels.shape[2:]
    if height % patch_px or width % patch_px:
        raise SpearError(f"view {view!r} is {width}×{height}. Use multiples of {patch_px}.")


# The stem: from pixels to patch embeddings


class StemConv(nn.Conv2d):
    """A convolution of the `ConvStem`, a class of its own so that `_init_weights` recognizes it."""


class ConvStem(nn.Module):
    """Stride-2 3×3 convolutions with ReLU between them, instead of one large patch convolution.

    [B, 3, h, w] -> [B, width, h / patch, w / patch]. The widths of the convolutions double up to
    the encoder's width. At the end each patch's embedding is normalized. Without that, the part
    that all embeddings have in common (from the light or the table) grows in training until the
    position embeddings are too small in comparison.

    The stem is meant for small models. With patches of 32 pixels it takes a quarter of the time of
    a patch convolution with patches of 14 pixels.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        num_convs = int(math.log2(patch))
        if 2**num_convs != patch:
            raise ValueError(
                f"the conv stem needs a patch size that is a power of two, got {patch}"
            )
        widths = [3]
        for index in range(num_convs):
            num_doublings = num_convs - 1 - index  # from this convolution to the last one
            widths.append(min(width, max(32, width // 2**num_doublings)))  # at least 32 channels
        convs = []
        for in_width, out_width in pairwise(widths):
            convs.append(StemConv(in_width, out_width, kernel_size=3, stride=2, padding=1))
        self.convs = nn.ModuleList(convs)
        self.norm = nn.LayerNorm(width)

    @property
    def weight(self) -> nn.Parameter:
        """The first kernel, because Transformers' encoders read `weight.dtype` of their stem."""
        return self.convs[0].weight  # type: ignore[return-value]

    def forward(self, normalized_images: Tensor) -> FeatureMap:
        """Patch embeddings of normalized images."""
        x = self.convs[0](normalized_images.contiguous(memory_format=torch.channels_last))
        for conv in self.convs[1:]:
            x = conv(nn.functional.relu_(x))
        # The norm is over the channels, so they must be the last axis.
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchConv(nn.Conv2d):
    """A convolution of patches that do not overlap, computed as one matrix product.

    [B, 3, h, w] -> [B, width, h / patch, w / patch]. The kernel is as large as the stride. On a GPU
    the matrix product takes a tenth of the time of PyTorch's convolution.
    """

    def forward(self, normalized_images: Tensor) -> FeatureMap:
        """Patch embeddings of normalized images."""
        patch_height, patch_width = self.kernel_size
        # [B, 3, rows, patch_height, columns, patch_width]
        grid = normalized_images.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))
        # [B, rows, columns, 3 · patch_height · patch_width]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)
        embeddings = linear(patches, self.weight.flatten(1), self.bias)  # [B, rows, columns, width]
        return embeddings.permute(0, 3, 1, 2)


class _WithStem:
    """Chooses the stem of a Transformers vision model.

    A subclass names this class before the Transformers model among its bases, so that the methods
    here override the model's.
    """

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StemConv):
            # He initialization keeps the size of the signal from layer to layer. With PyTorch's
            # default it would shrink, because there are no norms between the convolutions.
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _replace_patch_embedding(
        self: Any, owner: nn.Module, name: str, positions_to_initialize: Tensor
    ) -> None:
        """Replace the patch embedding, which is the attribute `name` of `owner`, by our stem.

        The stem is a `PatchConv` if `config.stem` is "patch", and a `ConvStem` if it is "conv".
        With a `ConvStem`, the position embeddings [..., tokens, width] get the initial values of
        `make_initial_positions`.
        """
        if getattr(self.config, "stem", "patch") == "patch":
            getattr(owner, name).__class__ = PatchConv
            return
        setattr(owner, name, ConvStem(self.config.hidden_size, self.config.patch_size))
        self.post_init()  # gives the stem its initial weights
        positions = positions_to_initialize
        if positions.device.type == "meta":
            return
        # DINOv2 has a class token before the side² patches, SigLIP has none.
        num_tokens, width = positions.shape[-2:]
        waves = make_initial_positions(math.isqrt(num_tokens), width)
        num_class_tokens = num_tokens - len(waves)
        waves = nn.functional.pad(waves, (0, 0, num_class_tokens, 0))  # zeros for the class token
        init.copy_(positions, waves.expand_as(positions))


# Position embeddings


def make_initial_positions(side: int, width: int) -> Tensor:
    """Make the initial values [side², width] of position embeddings after a `ConvStem`.

    They are sines and cosines of rows and columns, with a root mean square of 0.7. In large models
    they are near zero instead, but with such values small models hardly learn where things are.
    """
    position = torch.arange(side, dtype=torch.float32)
    # Frequencies from 0.5π down to 0.5π / 8 rad per patch have wavelengths of 4 to 32 patches.
    frequency = 0.5 * math.pi * 8.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float32)
    angle_rad = position[:, None] * frequency  # [side, width / 4]
    waves = torch.cat([angle_rad.sin(), angle_rad.cos()], dim=-1)  # [side, width / 2]
    row_waves = waves[:, None].expand(side, side, -1)
    column_waves = waves[None].expand(side, side, -1)
    return torch.cat([row_waves, column_waves], dim=-1).reshape(side * side, -1)


def resample_positions(
    table: Tensor, num_rows: int, num_columns: int, offset: float = 0.0
) -> Tensor:
    """Resample position embeddings of a square grid, bicubically, to another grid of patches.

    The result is that of Transformers and MoGe, but computed by products with constant matrices,
    because PyTorch's bicubic kernel takes 1.8 ms for 1,024 channels on an H200. The products are in
    float64, which autocast does not round, as it rounds float32 to bfloat16.

    Args:
        table: [side², D].
        num_rows: Number of rows of the new grid.
        num_columns: Number of columns of the new grid.
        offset: See `DinoEmbeddings`.

    Returns:
        [num_rows · num_columns, D].
    """
    side = math.isqrt(len(table))
    if num_rows == num_columns == side:
        return table
    can_cache = not isinstance(table, FakeTensor)  # fake tensors have no values to keep
    row_weights = _compute_interpolation_weights(side, num_rows, offset, table.device, can_cache)
    column_weights = _compute_interpolation_weights(
        side, num_columns, offset, table.device, can_cache
    )
    resampled_rows = row_weights @ table.double().view(side, -1)  # [num_rows, side · D]
    grid = column_weights @ resampled_rows.view(num_rows, side, -1)  # [num_rows, num_columns, D]
    return grid.flatten(0, 1).to(table.dtype)


# (side, num_resampled, offset, device) -> the result of `_compute_interpolation_weights`.
_interpolation_cache: dict[Hashable, Tensor] = {}


def _compute_interpolation_weights(
    side: int, num_resampled: int, offset: float, device: torch.device, can_cache: bool
) -> Tensor:
    """The weight of each of `side` positions in each resampled one, [num_resampled, side]."""
    key = (side, num_resampled, offset, device)
    if key in _interpolation_cache and can_cache:
        return _interpolation_cache[key]

    size_arguments: dict[str, Any] = {"size": (num_resampled, 1)}
    if offset:
        # With an offset, MoGe gives PyTorch a scale instead of a size, and the weights depend on
        # which of the two is given. PyTorch computes the size as side · scale, which is
        # num_resampled + offset, and rounds it down to `num_resampled`.
        size_arguments = {"scale_factor": ((num_resampled + offset) / side, 1.0)}
    with torch.inference_mode(False), torch.no_grad():
        # Column i of the identity is an image [side, 1] that is 1 at position i. Resampled, it has
        # the weights of position i.
        identity = torch.eye(side, dtype=torch.float64, device=device)[None, ..., None]
        resampled = nn.functional.interpolate(
            identity, mode="bicubic", align_corners=False, **size_arguments
        )
        weights = resampled[0, :, :, 0].T.contiguous()
    if can_cache:
        _interpolation_cache[key] = weights
    return weights


# Attention


class _FusedProjections:
    """Computes queries, keys and values in one product, in inference on a GPU.

    A subclass names this class before a Transformers attention among its bases.
    """

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """[B, S, width] -> [B, S, width], and None in place of the attention weights."""
        is_our_attention = self.config._attn_implementation == ATTENTION_NAME
        is_on_cpu = hidden_states.device.type == "cpu"
        if not is_our_attention or is_on_cpu or not torch.is_inference_mode_enabled():
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # [B, S, heads, head_dim]
        # The first time this moves the weights together; later calls find them joined.
        query, key, value = self.fuse_projections()(hidden_states)
        output, _ = grouped_attention(
            self,
            query.view(shape).transpose(1, 2),
            key.view(shape).transpose(1, 2),
            value.view(shape).transpose(1, 2),
            attention_mask,
            self.head_dim**-0.5,
        )
        # SigLIP and DINOv2 name their output projections differently.
        out_proj = self.out_proj if hasattr(self, "out_proj") else self.o_proj
        return out_proj(output.flatten(2)), None

    def fuse_projections(self: Any) -> FusedLinear:
        """The three projections as one. On a GPU this moves their weights into one tensor."""
        return FusedLinear(self.q_proj, self.k_proj, self.v_proj)


def fuse_attention_projections(model: nn.Module) -> None:
    """Join the weights of queries, keys and values in the attention of the image encoders.

    Call this before recording a CUDA graph, because it moves weights that the graph will read.
    """
    for module in model.modules():
        if isinstance(module, _FusedProjections):
            module.fuse_projections()


class _SiglipAttention(_FusedProjections, SiglipAttention):
    pass


class _DinoAttention(_FusedProjections, Dinov2Attention):
    pass


def run_layers(config: Any, layers: nn.ModuleList, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """Run sequences [B, S, D] that do not see each other through layers; yield each layer's output.

    The output is one tensor, in which the sequences are concatenated along S. With our attention
    the sequences also run as one, with a block-diagonal mask, because this takes fewer and larger
    matrix products. With another attention, which the user may have chosen, they run one after the
    other.
    """
    has_block_mask = len(sequences) > 1 and config._attn_implementation == ATTENTION_NAME
    if has_block_mask:
        mask = BlockDiagonalMask([sequence.shape[1] for sequence in sequences])
        hidden = [torch.cat(list(sequences), dim=1)]
    else:
        mask = None
        hidden = list(sequences)
    for layer in layers:
        hidden = [layer(sequence, mask) for sequence in hidden]
        yield hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)


# SigLIP


class SiglipEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's embeddings, with position embeddings that `resample_positions` fits to any size."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings [1, patches, width] of an image of height × width pixels."""
        patch = self.patch_size
        assert isinstance(patch, int)
        table = self.position_embedding.weight
        return resample_positions(table, height // patch, width // patch)[None]


class SiglipEncoder(_WithStem, SiglipVisionModel):
    """SigLIP's vision transformer, with a `ConvStem` if `config.stem` is "conv"."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings.__class__ = SiglipEmbeddings
        positions = self.embeddings.position_embedding.weight
        self._replace_patch_embedding(self.embeddings, "patch_embedding", positions)
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = _SiglipAttention

    def compute_features(self, pixels_of_views: Sequence[Tensor]) -> Tensor:
        """Features of the patches of all views: uint8 images [B, 3, h, w] -> [B, T, width].

        T is the number of patches of all views, in the order of the views.
        """
        embedded = []
        for pixels in pixels_of_views:
            images = normalize_pixels(pixels, SIGLIP_MEAN, SIGLIP_STD)
            embedded.append(self.embeddings(images, interpolate_pos_encoding=True))
        # Only the last layer's output is needed. A loop frees the outputs of the earlier layers,
        # while a list would keep them in memory.
        for hidden in run_layers(self.config, self.encoder.layers, embedded):
            last_hidden = hidden
        return self.post_layernorm(last_hidden)


# MoGe


class DinoEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings, with position embeddings that `resample_positions` fits to any size.

    Transformers resamples a grid of m positions to n patches with the scale n / m. With
    `config.position_offset` the scale is (n + offset) / m. DINOv2's own code and MoGe have an
    offset of 0.1. The offset moves positions by up to a patch, so it must be that with which the
    weights were trained.
    """

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings [1, 1 + patches, D] of an image of height × width pixels.

        The first one belongs to the class token.
        """
        patch = self.patch_size
        assert isinstance(patch, int)
        table = self.position_embeddings[0]
        offset = getattr(self.config, "position_offset", 0.0)
        patches = resample_positions(table[1:], height // patch, width // patch, offset)
        return torch.cat([table[:1], patches])[None]


class DinoEncoder(_WithStem, Dinov2Model):
    """DINOv2's vision transformer, with a `ConvStem` if `config.stem` is "conv"."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        embeddings = self.embeddings
        embeddings.__class__ = DinoEmbeddings
        self._replace_patch_embedding(
            embeddings.patch_embeddings, "projection", embeddings.position_embeddings
        )
        for layer in self.encoder.layer:
            layer.attention.__class__ = _DinoAttention


class MogeEncoder(nn.Module):
    """MoGe's image encoder: uint8 views [B, 3, h, w] -> [B, patches of all views, 4 · width].

    The features of a patch are the concatenated outputs of the last four DINOv2 layers, the
    earliest layer first, each after the backbone's final LayerNorm. The patches are in the order of
    the views.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.backbone = DinoEncoder(config)

    def forward(self, *pixels_of_views: Tensor) -> Tensor:
        """Patch features of the images of all views, one view after the other along the patches.

        The pixels [B, 3, h, w] are uint8, and the views may have different sizes.
        """
        embedded = []
        for pixels in pixels_of_views:
            images = normalize_pixels(pixels, IMAGENET_MEAN, IMAGENET_STD)
            embedded.append(self.backbone.embeddings(images))

        num_layers = len(self.backbone.encoder.layer)
        last_layers = range(num_layers - NUM_FEATURE_LAYERS, num_layers)
        features = torch.cat(self._compute_normalized_layer_outputs(embedded, last_layers), dim=-1)

        # Remove the class token, which is the first token of each view.
        per_view = features.split([sequence.shape[1] for sequence in embedded], dim=1)
        return torch.cat([view_features[:, 1:] for view_features in per_view], dim=1)

    def compute_layer_outputs(
        self, normalized_images: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """Outputs of some layers, each after the final LayerNorm.

        Args:
            normalized_images: [B, 3, h, w].
            indices: Indices of the layers, counted from 0, in increasing order.

        Returns:
            [B, 1 + patches, width] per layer, the class token first.
        """
        return self._compute_normalized_layer_outputs(
            [self.backbone.embeddings(normalized_images)], indices
        )

    def _compute_normalized_layer_outputs(
        self, embedded: Sequence[Tensor], indices: Sequence[int]
    ) -> list[Tensor]:
        """Outputs of the layers with these indices, for embedded views [B, S, width]."""
        outputs = []
        layer_outputs = run_layers(self.backbone.config, self.backbone.encoder.layer, embedded)
        for index, hidden in enumerate(layer_outputs):
            if index in indices:
                outputs.append(self.backbone.layernorm(hidden))
        return outputs
