"""MoGe v1 (arXiv 2410.19115) and MoGe-2 (arXiv 2507.02546): one image -> a point map and where it is known.

v1 labelled SPEAR's images; its points are up to a scale and a shift along z. MoGe-2's are up to a shift, with
their metric scale. The modules are nested so that they carry the names of the published checkpoints, which
`spear.models.moge.checkpoint.load_moge` reads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config

from spear.errors import SpearError, check_known
from spear.models.vision import MogeEncoder, standardize
from spear.types import Unit

PATCH_SIZE_PX = 14
ENCODERS = {
    "dinov2_vits14": (384, 12, 6),
    "dinov2_vitb14": (768, 12, 12),
    "dinov2_vitl14": (1024, 24, 16),
}
"""DINOv2's names -> (width, layers, attention heads)."""


@dataclass(frozen=True)
class MogeOutput:
    """What a network says of B images, before a camera is fitted (see `spear.models.moge.infer.infer`).

    points  [B, h, w, 3] float32, affine: z is off by a shift, and all by a scale.
    mask    [B, h, w] float32, over 0.5 where a point is known.
    scale   [B] float32 metres per unit of the points, or None.
    """

    points: Tensor
    mask: Tensor
    scale: Tensor | None = None


def dinov2_config(encoder: str) -> Dinov2Config:
    """The config of one of `ENCODERS` as MoGe uses it. Raises `SpearError` for another name."""
    check_known("MoGe encoder", ENCODERS, encoder)
    width, layers, heads = ENCODERS[encoder]
    ours: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    ours |= {"patch_size": PATCH_SIZE_PX, "image_size": 37 * PATCH_SIZE_PX, "position_offset": 0.1}
    ours |= {"use_mask_token": False, "attn_implementation": "sdpa"}
    return Dinov2Config(**ours)


def check_supported(part: str, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuse a published config whose fields, where given, are not what is built here."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            why = f"{part}{key} is {config[key]!r}, only {value!r} is"
            raise SpearError(
                f"MoGe config not supported: {why}: use one of the published checkpoints"
            )


def build_conv3x3(width: int, out: int) -> nn.Conv2d:
    """A 3×3 convolution that repeats the edge outwards."""
    return nn.Conv2d(width, out, 3, padding=1, padding_mode="replicate")


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the norms over groups, or none. [B, width, h, w]."""

    def __init__(self, width: int, hidden: int, norms: bool) -> None:
        super().__init__()
        first = nn.GroupNorm(1, width) if norms else nn.Identity()
        second = nn.GroupNorm(hidden // 32, hidden) if norms else nn.Identity()
        one, other = build_conv3x3(width, hidden), build_conv3x3(hidden, width)
        self.layers = nn.Sequential(first, nn.ReLU(), one, second, nn.ReLU(), other)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] -> the same."""
        return x + self.layers(x)


def build_upsampler(kind: str, width: int, out: int) -> nn.Sequential:
    """[B, width, h, w] -> [B, out, 2h, 2w], learned ("conv_transpose") or "bilinear", then a convolution."""
    if kind == "bilinear":
        return nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"), build_conv3x3(width, out)
        )
    return nn.Sequential(nn.ConvTranspose2d(width, out, 2, stride=2), build_conv3x3(out, out))


def make_view_plane(
    width: int, height: int, aspect: float | None = None, device: torch.device | None = None
) -> Tensor:
    """MoGe's uv grid: view-plane coordinates of a grid's cell centres, [height, width, 2] float32.

    MoGe measures the view plane in half diagonals of the image. u runs to the right and v down; both are 0 at
    the image's centre. aspect: width / height of the image that the grid covers, if cells are not square.
    """
    ratio = width / height if aspect is None else aspect
    diagonal = math.sqrt(1 + ratio**2)
    ends = [(n - 1) / n * span / diagonal for n, span in ((width, ratio), (height, 1.0))]
    u, v = (
        torch.linspace(-end, end, n, device=device)
        for end, n in zip(ends, (width, height), strict=True)
    )
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def make_uv_channels(batch: int, width: int, height: int, aspect: float, like: Tensor) -> Tensor:
    """`view_plane` as two channels [B, 2, height, width], of the type and device of another tensor;
    computed in float32 first: in float16 the errors of the steps would add up along a row."""
    uv = make_view_plane(width, height, aspect, like.device).to(like.dtype)
    return uv.permute(2, 0, 1).expand(batch, -1, -1, -1)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialias. [B, c, h, w] -> [B, c, height, width]."""
    return nn.functional.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def upsample_output(raw: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """MoGe's "exp" output (x / z, y / z, log z) [B, 3, h, w] and raw mask [B, 1, h, w] -> points [B, H, W, 3]
    and mask [B, H, W], float32, at the size of the images [B, 3, H, W]."""
    with torch.autocast(images.device.type, enabled=False):
        points, mask = (resize(x.float(), *images.shape[2:]) for x in raw)
        plane, log_z = points.permute(0, 2, 3, 1).split([2, 1], dim=-1)
        z = log_z.exp()
        return torch.cat([plane * z, z], dim=-1), mask[:, 0]


_FIXED_V1 = {
    "remap_output": "exp",
    "output_mask": True,
    "split_head": True,
    "res_block_norm": "group_norm",
    "last_res_blocks": 0,
    "last_conv_size": 1,
    "mask_threshold": 0.5,
}
_FIXED_STACK = {
    "res_block_in_norm": "none",
    "res_block_hidden_norm": "none",
    "activation": "relu",
    "dim_times_res_block_hidden": 1,
}


class MogeV1(nn.Module):
    """DINOv2's last layers, summed after a projection each, and a convolutional head.

    config: a published checkpoint's `model_config`; `SpearError` for one that is not supported. max_tokens:
    the most patches that it was trained to cut an image into.
    """

    unit: Unit = "relative"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_supported("", {"remap_output": "linear", **config}, _FIXED_V1)
        self.max_tokens = int(config.get("num_tokens_range", (1200, 2500))[1])
        if "trained_area_range" in config:  # the released checkpoint's older field, in pixels
            self.max_tokens = int(config["trained_area_range"][1]) // PATCH_SIZE_PX**2
        self.encoder = MogeEncoder(dinov2_config(config.get("encoder", "dinov2_vitb14")))
        read, depth = (
            config.get("intermediate_layers", 4),
            self.encoder.backbone.config.num_hidden_layers,
        )
        self.layers = range(depth - read, depth)
        self.head = MogeV1Head(config, self.encoder.backbone.config.hidden_size)

    def cut_into_patches(self, images: Tensor, num_tokens: int) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, 3, h, w] in 0 … 1 -> encoder input [B, 3, 14·rows, 14·columns], and the head's size.

        The size (height, width) lies between the image's and the encoder's. Raises `SpearError` when an image
        is too long and thin for so few tokens.
        """
        height, width = images.shape[2:]
        factor = math.sqrt(num_tokens * PATCH_SIZE_PX**2 / (height * width))
        size = int(height * factor), int(width * factor)
        if min(size) < PATCH_SIZE_PX:
            raise SpearError(
                f"image of {width}×{height} is too thin for {num_tokens} MoGe tokens: crop it"
            )
        resized = nn.functional.interpolate(
            images, size, mode="bicubic", antialias=True, align_corners=False
        )
        patches = [side // PATCH_SIZE_PX * PATCH_SIZE_PX for side in size]
        normal = standardize(resized)
        cut = nn.functional.interpolate(
            normal, patches, mode="bilinear", antialias=True, align_corners=False
        )
        return cut, size

    def forward(self, images: Tensor, num_tokens: int) -> MogeOutput:
        """Points and mask of images [B, 3, h, w] in 0 … 1, cut into about `num_tokens` patches."""
        patches, size = self.cut_into_patches(images, num_tokens)
        tokens = self.encoder.layers(patches, self.layers)
        grid = (patches.shape[2] // PATCH_SIZE_PX, patches.shape[3] // PATCH_SIZE_PX)
        raw = self.head([layer[:, 1:].mT.unflatten(2, grid) for layer in tokens], size)
        return MogeOutput(*upsample_output(raw, images))


class MogeV1Head(nn.Module):
    """From the encoder's patch features to raw points (x/z, y/z, log z) and raw mask."""

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        project, widths = config.get("dim_proj", 512), config.get("dim_upsample", (256, 128, 128))
        times, blocks = config.get("dim_times_res_block_hidden", 1), config.get("num_res_blocks", 1)
        last, layers = config.get("last_conv_channels", 32), config.get("intermediate_layers", 4)
        self.projects = nn.ModuleList(nn.Conv2d(width, project, 1) for _ in range(layers))
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(
                build_upsampler("conv_transpose", before + 2, after),
                *(ResidualBlock(after, after * times, True) for _ in range(blocks)),
            )
            for before, after in pairwise((project, *widths))
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(build_conv3x3(widths[-1] + 2, last), nn.ReLU(), nn.Conv2d(last, out, 1))
            for out in (3, 1)
        )

    def forward(self, layers: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Features [B, width, rows, columns] of each layer -> [B, 3, height, width] and [B, 1, height, width]
        at size (height, width), whose aspect the uv channels have throughout."""
        height, width = size
        x = torch.stack([p(layer) for p, layer in zip(self.projects, layers, strict=True)]).sum(
            dim=0
        )
        for block in self.upsample_blocks:
            x = block(append_uv(x, width / height))
        x = append_uv(resize(x, height, width), width / height)
        return [block(x) for block in self.output_block]


def append_uv(x: Tensor, aspect: float) -> Tensor:
    """[B, c, h, w] -> [B, c + 2, h, w]: where each cell lies on the view plane of an image of that aspect."""
    batch, _, height, width = x.shape
    return torch.cat([x, make_uv_channels(batch, width, height, aspect, x)], dim=1)


class MogeV2(nn.Module):
    """The network: DINOv2, projected and summed, a neck shared by all heads, one head per output.

    config, max_tokens: as of `MogeV1`.
    """

    unit: Unit = "metre"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_supported("", {"remap_output": "linear", **config}, {"remap_output": "exp"})
        encoder = config["encoder"]
        self.max_tokens = int(config.get("num_tokens_range", (1200, 3600))[1])
        self.encoder = MogeEncoder(dinov2_config(encoder["backbone"]))
        read, depth = encoder["intermediate_layers"], self.encoder.backbone.config.num_hidden_layers
        self.layers = range(depth - read, depth) if isinstance(read, int) else read
        width, project = self.encoder.backbone.config.hidden_size, encoder["dim_out"]
        self.output_projections = nn.ModuleList(nn.Conv2d(width, project, 1) for _ in self.layers)
        names = "neck", "points_head", "mask_head"  # some have normals as well
        self.neck, self.points_head, self.mask_head = (
            ConvStack(name, config[name]) for name in names
        )
        layers: list[nn.Module] = []
        for before, after in pairwise(config["scale_head"]["dims"]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.scale_head = nn.Sequential(*layers[:-1])

    def cut_into_patches(self, images: Tensor, num_tokens: int) -> Tensor:
        """Images [B, 3, h, w] in 0 … 1 -> the encoder's input [B, 3, 14·rows, 14·columns]. Raises
        `SpearError` when an image is too long and thin for so few tokens."""
        height, width = images.shape[2:]
        aspect = width / height
        rows, columns = round(math.sqrt(num_tokens / aspect)), round(math.sqrt(num_tokens * aspect))
        if min(rows, columns) < 1:
            raise SpearError(
                f"image of {width}×{height} is too thin for {num_tokens} MoGe tokens: crop it"
            )
        size = (rows * PATCH_SIZE_PX, columns * PATCH_SIZE_PX)
        cut = nn.functional.interpolate(
            images, size, mode="bilinear", antialias=True, align_corners=False
        )
        return standardize(cut)

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised [B, 3, 14·rows, 14·columns] -> features [B, project, rows, columns], and the class token
        [B, width] of the last layer that is read."""
        tokens = self.encoder.layers(patches, self.layers)
        grid = (patches.shape[2] // PATCH_SIZE_PX, patches.shape[3] // PATCH_SIZE_PX)
        pairs = zip(self.output_projections, tokens, strict=True)
        projected = [projection(layer[:, 1:].mT.unflatten(2, grid)) for projection, layer in pairs]
        return torch.stack(projected).sum(dim=0), tokens[-1][:, 0]

    def forward(self, images: Tensor, num_tokens: int) -> MogeOutput:
        """Points, mask and scale of images [B, 3, h, w] in 0 … 1, cut into about `num_tokens` patches."""
        features, token = self.encode(self.cut_into_patches(images, num_tokens))
        batch, _, rows, columns = features.shape
        height, width = images.shape[2:]
        sizes = (
            (columns << level, rows << level) for level in range(1, len(self.neck.input_blocks))
        )
        finer = [make_uv_channels(batch, *size, width / height, features) for size in sizes]
        levels = self.neck([append_uv(features, width / height), *finer])
        raw = [head(levels)[-1] for head in (self.points_head, self.mask_head)]
        scale = self.scale_head(token)
        points, mask = upsample_output(raw, images)
        return MogeOutput(points, mask.sigmoid(), scale.float()[:, 0].exp())


class ConvStack(nn.Module):
    """A pyramid from coarse to fine: each level is the upsampled one before, plus its input, refined.

    config: the published fields; a single value stands for all levels. Raises `SpearError`, naming the stack,
    for what is not supported.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        norms = {
            "res_block_in_norm": "layer_norm",
            "res_block_hidden_norm": "group_norm",
        }  # when not given
        check_supported(f"{name}.", {**norms, **config}, _FIXED_STACK)
        widths = config["dim_res_blocks"]

        def each(value: Any, levels: int = len(widths)) -> Sequence[Any]:
            return value if isinstance(value, list | tuple) else [value] * levels

        kinds = each(config["resamplers"], len(widths) - 1)
        check_known(f"{name} resampler", ("conv_transpose", "bilinear"), *kinds)
        sizes = zip(each(config["dim_in"]), widths, strict=True)
        self.input_blocks = nn.ModuleList(nn.Conv2d(before, width, 1) for before, width in sizes)
        pairs = zip(kinds, pairwise(widths), strict=True)
        self.resamplers = nn.ModuleList(build_upsampler(kind, *pair) for kind, pair in pairs)
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, width, False) for _ in range(count)))
            for width, count in zip(widths, each(config.get("num_res_blocks", 1)), strict=True)
        )
        self.output_blocks = nn.ModuleList(
            nn.Conv2d(width, out, 1) if out else nn.Identity()
            for out, width in zip(each(config.get("dim_out")), widths, strict=True)
        )

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """[B, channels, h, w] per level, each twice the size of the one before -> the same, refined."""
        found: list[Tensor] = []
        x: Tensor | None = None
        for level, features in enumerate(pyramid):
            inside = self.input_blocks[level](features)
            x = inside if x is None else self.resamplers[level - 1](x) + inside
            x = self.res_blocks[level](x)
            found.append(self.output_blocks[level](x))
        return found
