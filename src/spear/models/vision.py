"""The two visual encoders, SigLIP's and MoGe's: pixels in, the stem, the transformers."""

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

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_FEATURE_LAYERS = 4
"""MoGe reads the last four layers of its backbone, and so does SPEAR-VLM (the paper, SPEAR-VLM)."""


def normalize_pixels(
    pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """uint8 [B, 3, h, w], however it lies in memory -> contiguous float32, (pixel / 255 − mean) / std."""
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    same = len(set(mean)) == len(set(std)) == 1
    # Without a tensor of constants: copying one to a GPU would mean waiting.
    for channel, m, s in zip([x] if same else x.unbind(1), mean, std, strict=False):
        channel.mul_(1 / (255 * s)).sub_(m / s)
    return x


def standardize(images: Tensor) -> Tensor:
    """Images [..., 3, h, w] in 0 … 1 -> (image − mean) / std per channel, ImageNet's."""
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images - mean) / std


class ConvStem(nn.Module):
    """Stride-2 3×3 convolutions with ReLU between them, in place of one big patch convolution.

    Each patch is normalised at the end: else what all patches share (the light, the table) grows in training
    until it drowns the position embeddings. Our choice for small models: at a total stride of 32 it costs a
    quarter of what 14-pixel patches do. Widths double up to the encoder's width.
    [B, 3, h, w] -> [B, width, h / patch, w / patch].
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        steps = int(math.log2(patch))
        if 2**steps != patch:
            raise ValueError(
                f"the conv stem needs a patch size that is a power of two, got {patch}"
            )
        widths = [3] + [min(width, max(32, width >> (steps - 1 - i))) for i in range(steps)]
        convs = (StemConv(a, b, kernel_size=3, stride=2, padding=1) for a, b in pairwise(widths))
        self.convs = nn.ModuleList(convs)
        self.norm = nn.LayerNorm(width)

    @property
    def weight(self) -> nn.Parameter:
        """The first kernel: Transformers' encoders ask their patch embedding for its dtype."""
        return self.convs[0].weight  # type: ignore[return-value]

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch embeddings of normalised pixels."""
        x = self.convs[0](pixels.contiguous(memory_format=torch.channels_last))
        for conv in self.convs[1:]:
            x = conv(nn.functional.relu_(x))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StemConv(nn.Conv2d):
    """A convolution of the stem."""


class PatchConv(nn.Conv2d):
    """A convolution whose kernels lie side by side: a product of patches, which takes a GPU a tenth of the
    time. [B, 3, h, w] -> [B, width, h / patch, w / patch]."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch embeddings of normalised pixels."""
        down, across = self.kernel_size
        cut = pixels.unflatten(3, (-1, across)).unflatten(2, (-1, down))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, 3 · down · across]
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _InitializesStem:
    """Goes before a Transformers model among a class's bases."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StemConv):
            # He initialisation: without norms the default would let the signal vanish.
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _add_stem(self: Any, owner: nn.Module, name: str, table: Tensor) -> None:
        """Where `config.stem` is "conv": a `ConvStem` as the embedding of that name in `owner`, and the
        `make_sinusoidal_positions` of its patches at the end of `table` [..., places, width]."""
        if getattr(self.config, "stem", "patch") == "patch":
            getattr(owner, name).__class__ = PatchConv
        else:
            setattr(owner, name, ConvStem(self.config.hidden_size, self.config.patch_size))
            self.post_init()
            if table.device.type != "meta":
                waves = make_sinusoidal_positions(math.isqrt(table.shape[-2]), table.shape[-1])
                others = table.shape[-2] - len(waves)  # a class token
                init.copy_(table, nn.functional.pad(waves, (0, 0, others, 0)).expand_as(table))


def make_sinusoidal_positions(side: int, width: int) -> Tensor:
    """[side², width] sines and cosines of rows and columns, root mean square 0.7: the first positions behind
    a `ConvStem` (our choice). Near zero, as in large models, small ones hardly learn where things are."""
    place = torch.arange(side, dtype=torch.float32)
    frequency = 0.5 * math.pi * 8.0 ** -torch.linspace(0, 1, width // 4)
    angle = place[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [side, width / 2]
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, -1)


def resample_positions(table: Tensor, rows: int, columns: int, offset: float = 0.0) -> Tensor:
    """Position embeddings [side², D], row by row, read off at rows × columns places: [rows · columns, D].

    Bicubic, as Transformers and MoGe do it. offset: see `DinoEmbeddings`. Done by products with constants:
    PyTorch's kernel takes 1.8 ms for 1,024 channels on an H200. In float64, which autocast leaves alone.
    """
    side = math.isqrt(len(table))
    if rows == columns == side:
        return table
    down, across = (_axis(side, count, offset, table) for count in (rows, columns))
    grid = (down @ table.double().view(side, -1)).view(rows, side, -1)
    return (across @ grid).flatten(0, 1).to(table.dtype)


_AXES: dict[Hashable, Tensor] = {}


def _axis(side: int, count: int, offset: float, like: Tensor) -> Tensor:
    """[count, side]: what each of `side` places adds to each of `count` that are read off; kept."""
    key, fake = (side, count, offset, like.device), isinstance(like, FakeTensor)
    if key in _AXES and not fake:
        return _AXES[key]
    how: Any = {"scale_factor": ((count + offset) / side, 1.0)} if offset else {"size": (count, 1)}
    with torch.inference_mode(False), torch.no_grad():
        each = torch.eye(side, dtype=torch.float64, device=like.device)[None, ..., None]
        found = nn.functional.interpolate(each, mode="bicubic", align_corners=False, **how)
        weights = found[0, :, :, 0].T.contiguous()
    if not fake:
        _AXES[key] = weights
    return weights


class _OneProduct:
    """Goes before Transformers' attention of images: on a GPU, acting takes queries, keys and values of one
    product. See `fuse_attention_projections`."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """[B, S, width] -> [B, S, width], None."""
        ours = self.config._attn_implementation == ATTENTION_NAME
        if not ours or hidden_states.device.type == "cpu" or not torch.is_inference_mode_enabled():
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.fused_projections()(hidden_states)
        )
        found, _ = grouped_attention(self, query, key, value, attention_mask, self.head_dim**-0.5)
        last = self.out_proj if hasattr(self, "out_proj") else self.o_proj
        return last(found.flatten(2)), None

    def fused_projections(self: Any) -> FusedLinear:
        """The three, whose weights lie together from then on."""
        return FusedLinear(self.q_proj, self.k_proj, self.v_proj)


def fuse_attention_projections(model: nn.Module) -> None:
    """Lay the weights of images' attention together, before a CUDA graph is recorded that reads them."""
    for module in model.modules():
        if isinstance(module, _OneProduct):
            module.fused_projections()


class _SiglipAttention(_OneProduct, SiglipAttention):
    pass


class _DinoAttention(_OneProduct, Dinov2Attention):
    pass


class SiglipEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's embeddings, with positions by `resample_positions`."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """[1, patches, width] for an image of height × width pixels."""
        patch = self.patch_size
        assert isinstance(patch, int)
        return resample_positions(self.position_embedding.weight, height // patch, width // patch)[
            None
        ]


class SiglipEncoder(_InitializesStem, SiglipVisionModel):
    """SigLIP's vision transformer, with a `ConvStem` where `config.stem` is "conv"."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings.__class__ = SiglipEmbeddings
        self._add_stem(
            self.embeddings, "patch_embedding", self.embeddings.position_embedding.weight
        )
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = _SiglipAttention

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """Features of uint8 images [B, 3, h, w], view by view, patches row by row: [B, T, width]."""
        normal = (normalize_pixels(view, SIGLIP_MEAN, SIGLIP_STD) for view in views)
        embedded = [self.embeddings(images, interpolate_pos_encoding=True) for images in normal]
        for hidden in run_layers(self.config, self.encoder.layers, embedded):
            last = hidden  # and no longer the one before
        return self.post_layernorm(last)


class DinoEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings, with positions by `resample_positions`.

    With `config.position_offset` (DINOv2's own code, and so MoGe's, has 0.1) a grid of n patches is read off
    the learned one of m with the scale (n + offset) / m, not n / m as Transformers does: the positions differ
    by up to a patch, and trained weights notice.
    """

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """[1, 1 + patches, width] for an image of height × width pixels, the class token's first."""
        table, patch = self.position_embeddings[0], self.patch_size
        assert isinstance(patch, int)
        offset = getattr(self.config, "position_offset", 0.0)
        return torch.cat(
            [table[:1], resample_positions(table[1:], height // patch, width // patch, offset)]
        )[None]


class DinoEncoder(_InitializesStem, Dinov2Model):
    """DINOv2's vision transformer, with a `ConvStem` where `config.stem` is "conv"."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        own = self.embeddings
        own.__class__ = DinoEmbeddings
        self._add_stem(own.patch_embeddings, "projection", own.position_embeddings)
        for layer in self.encoder.layer:
            layer.attention.__class__ = _DinoAttention


class MogeEncoder(nn.Module):
    """MoGe's image encoder: uint8 views [B, 3, h, w] -> [B, patches of all, 4·width].

    The patch features of the last four DINOv2 layers, each after the backbone's final LayerNorm, side by
    side, earliest layer first. Patches run view by view, row by row.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.backbone = DinoEncoder(config)

    def forward(self, *views: Tensor) -> Tensor:
        """Features of uint8 images, normalised here with ImageNet's statistics."""
        normal = (normalize_pixels(view, IMAGENET_MEAN, IMAGENET_STD) for view in views)
        embedded = [self.backbone.embeddings(images) for images in normal]
        count = len(self.backbone.encoder.layer)
        read = torch.cat(self._read(embedded, range(count - NUM_FEATURE_LAYERS, count)), dim=-1)
        parts = read.split([each.shape[1] for each in embedded], dim=1)
        return torch.cat([part[:, 1:] for part in parts], dim=1)

    def layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of the layers of these indices (from 0, rising), each after the final LayerNorm.

        images [B, 3, h, w] normalised. Each result is [B, 1 + patches, width], the class token first.
        """
        return self._read([self.backbone.embeddings(images)], indices)

    def _read(self, embedded: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        outputs = enumerate(run_layers(self.backbone.config, self.backbone.encoder.layer, embedded))
        return [self.backbone.layernorm(hidden) for index, hidden in outputs if index in indices]


def run_layers(config: Any, layers: nn.ModuleList, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """What each layer makes of sequences [B, S, D] that do not see each other, side by side. They go through
    it as one: one after the other would be more products, and smaller ones. (Where the user asked for another
    attention than ours, they go one after the other.)"""
    one = len(sequences) > 1 and config._attn_implementation == ATTENTION_NAME
    apart = BlockDiagonalMask([each.shape[1] for each in sequences]) if one else None
    hidden = [torch.cat(list(sequences), dim=1)] if one else list(sequences)
    for layer in layers:
        hidden = [layer(each, apart) for each in hidden]
        yield hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)


def check_pixels(name: str, pixels: Any, patch: int) -> None:
    """Refuse anything but uint8 [B, 3, h, w] in whole patches: what is left of one would be cut off."""
    tensor = isinstance(pixels, Tensor)
    if not tensor or pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if tensor else type(pixels).__name__
        raise SpearError(
            f"wrong image type: view {name!r} is {what}: pass uint8 tensors [B, 3, h, w]"
        )
    height, width = pixels.shape[2:]
    if height % patch or width % patch:
        raise SpearError(
            f"wrong image size: view {name!r} is {width}×{height}: give multiples of {patch}"
        )
