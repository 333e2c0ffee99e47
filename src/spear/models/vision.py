"""The two visual encoders, SigLIP's and MoGe's: pixels, the stem, the transformers."""

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

NUM_FEATURE_LAYERS = 4
"""MoGe reads the last four layers of its backbone, and so does SPEAR-VLM (the paper,
"SPEAR-VLM")."""


# Pixels


def normalize_pixels(
    pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(pixel / 255 - mean) / std: uint8 [B, 3, h, w] in any memory layout -> contiguous float32."""
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    has_equal_channels = len(set(mean)) == 1 and len(set(std)) == 1
    channels = [x] if has_equal_channels else x.unbind(1)
    # In place and without a tensor of constants, because copying one to a GPU would mean waiting.
    for channel, channel_mean, channel_std in zip(channels, mean, std, strict=False):
        channel.mul_(1 / (255 * channel_std)).sub_(channel_mean / channel_std)
    return x


def standardize(images: Tensor) -> Tensor:
    """Normalize images [..., 3, h, w] from 0 to 1 per channel, with ImageNet's statistics."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device, dtype=torch.float32).view(3, 1, 1)
    return (images - mean) / std


def check_pixels(name: str, pixels: Any, patch: int) -> None:
    """Raises SpearError for anything but uint8 [B, 3, h, w] in whole patches.

    Transformers would cut off what remains of a patch.
    """
    if not isinstance(pixels, Tensor):
        problem = type(pixels).__name__
    elif pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        problem = f"{pixels.dtype} {tuple(pixels.shape)}"
    else:
        problem = ""
    if problem:
        raise SpearError(
            f"wrong image type: view {name!r} is {problem}. Pass uint8 tensors [B, 3, h, w]."
        )
    height, width = pixels.shape[2:]
    if height % patch or width % patch:
        raise SpearError(
            f"wrong image size: view {name!r} is {width}×{height}. Use multiples of {patch}."
        )


# The stem: from pixels to patch embeddings


class StemConv(nn.Conv2d):
    """A convolution of the `ConvStem`."""


class ConvStem(nn.Module):
    """Stride-2 3×3 convolutions with ReLU between them, instead of one large patch convolution.

    [B, 3, h, w] -> [B, width, h / patch, w / patch]. Widths double up to the encoder's width. Each
    patch is normalized at the end. Otherwise what all patches share (the light, the table) grows in
    training until it drowns the position embeddings. For small models: with patches of 32 pixels it
    costs a quarter of what a patch convolution of 14 pixels does.
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
            num_doublings = num_convs - 1 - index
            widths.append(min(width, max(32, width >> num_doublings)))
        convs = []
        for in_width, out_width in pairwise(widths):
            convs.append(StemConv(in_width, out_width, kernel_size=3, stride=2, padding=1))
        self.convs = nn.ModuleList(convs)
        self.norm = nn.LayerNorm(width)

    @property
    def weight(self) -> nn.Parameter:
        """The first kernel: Transformers' encoders ask their patch embedding for its dtype."""
        return self.convs[0].weight  # type: ignore[return-value]

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch embeddings of normalized pixels."""
        x = self.convs[0](pixels.contiguous(memory_format=torch.channels_last))
        for conv in self.convs[1:]:
            x = conv(nn.functional.relu_(x))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchConv(nn.Conv2d):
    """A convolution of patches that do not overlap, computed as one matrix product.

    [B, 3, h, w] -> [B, width, h / patch, w / patch]. The kernel is as large as the stride. The
    matrix product takes a GPU a tenth of the time that PyTorch's convolution takes.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch embeddings of normalized pixels."""
        patch_height, patch_width = self.kernel_size
        # [B, 3, rows, patch_height, columns, patch_width]
        grid = pixels.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))
        # [B, rows, columns, 3 · patch_height · patch_width]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _WithStem:
    """Chooses the stem of a Transformers vision model.

    A class lists it before that model among its bases, so that its methods override the model's.
    """

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StemConv):
            # He initialization: without norms the default would let the signal vanish.
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _add_stem(self: Any, owner: nn.Module, name: str, positions: Tensor) -> None:
        """Make the patch embedding `owner.name` the stem that `config.stem` asks for.

        "conv" is a `ConvStem`, "patch" a `PatchConv`.

        Behind a `ConvStem`, position embeddings [..., tokens, width] begin as
        `make_sinusoidal_positions`.
        """
        if getattr(self.config, "stem", "patch") == "patch":
            getattr(owner, name).__class__ = PatchConv
            return
        setattr(owner, name, ConvStem(self.config.hidden_size, self.config.patch_size))
        self.post_init()
        if positions.device.type == "meta":
            return
        num_tokens, width = positions.shape[-2:]
        waves = make_sinusoidal_positions(math.isqrt(num_tokens), width)
        num_class_tokens = num_tokens - len(waves)  # they come first
        waves = nn.functional.pad(waves, (0, 0, num_class_tokens, 0))
        init.copy_(positions, waves.expand_as(positions))


# Position embeddings


def make_sinusoidal_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of rows and columns, with a root mean square of 0.7: [side², width].

    Position embeddings behind a `ConvStem` begin with these values. Large models begin with values
    near zero instead; from there, small models hardly learn where things are.
    """
    position = torch.arange(side, dtype=torch.float32)
    # From 0.5π down to 0.5π / 8 rad per patch: wavelengths of 4 to 32 patches
    frequency = 0.5 * math.pi * 8.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float32)
    angle_rad = position[:, None] * frequency
    waves = torch.cat([angle_rad.sin(), angle_rad.cos()], dim=-1)  # [side, width / 2]
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, -1)


def resample_positions(
    table: Tensor, num_rows: int, num_columns: int, offset: float = 0.0
) -> Tensor:
    """Resample position embeddings [side², D], row by row, to a grid: [num_rows · num_columns, D].

    Bicubic, as Transformers and MoGe do it, but by products with constant matrices: PyTorch's
    kernel takes 1.8 ms for 1,024 channels on an H200. The products are in float64: autocast would
    round float32 to bfloat16, but it leaves float64 alone.

    offset: See `DinoEmbeddings`.
    """
    side = math.isqrt(len(table))
    if num_rows == num_columns == side:
        return table
    can_cache = not isinstance(table, FakeTensor)  # under torch.compile, tensors have no values
    row_weights = _interpolation_weights(side, num_rows, offset, table.device, can_cache)
    column_weights = _interpolation_weights(side, num_columns, offset, table.device, can_cache)
    grid = (row_weights @ table.double().view(side, -1)).view(num_rows, side, -1)
    return (column_weights @ grid).flatten(0, 1).to(table.dtype)


_interpolation_cache: dict[Hashable, Tensor] = {}


def _interpolation_weights(
    side: int, count: int, offset: float, device: torch.device, can_cache: bool
) -> Tensor:
    """The weight of each of `side` positions in each of `count` resampled ones, [count, side]."""
    key = (side, count, offset, device)
    if key in _interpolation_cache and can_cache:
        return _interpolation_cache[key]

    size: dict[str, Any] = {"size": (count, 1)}
    if offset:
        # As MoGe: the scale is (count + offset) / side, and the size follows from it.
        size = {"scale_factor": ((count + offset) / side, 1.0)}
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(side, dtype=torch.float64, device=device)[None, ..., None]
        resampled = nn.functional.interpolate(identity, mode="bicubic", align_corners=False, **size)
        weights = resampled[0, :, :, 0].T.contiguous()
    if can_cache:
        _interpolation_cache[key] = weights
    return weights


# Attention


class _FusedProjections:
    """Computes queries, keys and values in one product, in inference on a GPU.

    Stands before Transformers' attention of images among a class's bases.
    """

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """[B, S, width] -> [B, S, width], None."""
        is_ours = self.config._attn_implementation == ATTENTION_NAME
        is_on_cpu = hidden_states.device.type == "cpu"
        if not is_ours or is_on_cpu or not torch.is_inference_mode_enabled():
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = self.fused_projections()(hidden_states)
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

    def fused_projections(self: Any) -> FusedLinear:
        """The three projections, whose weights lie side by side in memory from then on."""
        return FusedLinear(self.q_proj, self.k_proj, self.v_proj)


def fuse_attention_projections(model: nn.Module) -> None:
    """Lay the weights of images' attention side by side.

    This must happen before a CUDA graph that reads them is recorded.
    """
    for module in model.modules():
        if isinstance(module, _FusedProjections):
            module.fused_projections()


class _SiglipAttention(_FusedProjections, SiglipAttention):
    pass


class _DinoAttention(_FusedProjections, Dinov2Attention):
    pass


def run_layers(config: Any, layers: nn.ModuleList, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """Run sequences [B, S, D] that do not see each other through layers; yield each layer's output.

    The sequences lie side by side in the output, and run as one: one after the other would be more
    products, and smaller ones. If the user asked for another attention than ours, they run one
    after the other.
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
    """SigLIP's embeddings, with positions by `resample_positions`."""

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
        self._add_stem(self.embeddings, "patch_embedding", positions)
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = _SiglipAttention

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """Features of uint8 images [B, 3, h, w]: [B, T, width].

        They are ordered view by view, patches row by row.
        """
        embedded = []
        for view in views:
            images = normalize_pixels(view, SIGLIP_MEAN, SIGLIP_STD)
            embedded.append(self.embeddings(images, interpolate_pos_encoding=True))
        # Only the last layer's output is needed. A loop lets go of the others, where a list would
        # hold them.
        for hidden in run_layers(self.config, self.encoder.layers, embedded):
            last_hidden = hidden
        return self.post_layernorm(last_hidden)


# MoGe


class DinoEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings, with positions by `resample_positions`.

    If `config.position_offset` is set (DINOv2's own code has 0.1, and so has MoGe), a grid of m
    positions is resampled to n patches with the scale (n + offset) / m instead of n / m, as
    Transformers does it. The positions differ by up to a patch, which matters to trained weights.
    """

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings [1, 1 + patches, width] of an image, the class token's first."""
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
        self._add_stem(embeddings.patch_embeddings, "projection", embeddings.position_embeddings)
        for layer in self.encoder.layer:
            layer.attention.__class__ = _DinoAttention


class MogeEncoder(nn.Module):
    """MoGe's image encoder: uint8 views [B, 3, h, w] -> [B, patches of all views, 4·width].

    The features of a patch are those of the last four DINOv2 layers, each after the backbone's
    final LayerNorm, side by side, the earliest layer first. Patches run view by view, row by row.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.backbone = DinoEncoder(config)

    def forward(self, *views: Tensor) -> Tensor:
        """Features of uint8 images, which are normalized here with ImageNet's statistics."""
        embedded = []
        for view in views:
            images = normalize_pixels(view, IMAGENET_MEAN, IMAGENET_STD)
            embedded.append(self.backbone.embeddings(images))

        num_layers = len(self.backbone.encoder.layer)
        last_layers = range(num_layers - NUM_FEATURE_LAYERS, num_layers)
        features = torch.cat(self._run(embedded, last_layers), dim=-1)

        # Leave out the class token, the first of each view.
        per_view = features.split([sequence.shape[1] for sequence in embedded], dim=1)
        return torch.cat([view_features[:, 1:] for view_features in per_view], dim=1)

    def layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Outputs of the layers of these indices (from 0, rising), each after the final LayerNorm.

        images: [B, 3, h, w], normalized. Each result is [B, 1 + patches, width], the class token
            first.
        """
        return self._run([self.backbone.embeddings(images)], indices)

    def _run(self, embedded: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        outputs = []
        layer_outputs = run_layers(self.backbone.config, self.backbone.encoder.layer, embedded)
        for index, hidden in enumerate(layer_outputs):
            if index in indices:
                outputs.append(self.backbone.layernorm(hidden))
        return outputs
