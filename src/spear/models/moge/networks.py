"""MoGe v1 (arXiv 2410.19115) and MoGe-2 (arXiv 2507.02546): networks that predict point maps.

A point map has a 3D point for each pixel. The points of MoGe v1, with which the authors of SPEAR-1
labeled their images, are correct up to a scale and a shift along z. The points of MoGe-2 are
correct up to a shift, because it also predicts a metric scale.

The encoder is a DINOv2, which cuts an image into patches of 14 × 14 pixels; MoGe calls them tokens.
Modules are nested so that their weights have the names of the published checkpoints, which
`spear.models.moge.checkpoint.load_moge` reads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Dinov2Config

from spear.errors import SpearError, check_known
from spear.models.vision import FeatureMap, MogeEncoder, normalize_by_imagenet
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
    """The prediction of a network about B images, before a camera is fitted.

    points  [B, h, w, 3] float32. They are affine: there is an unknown shift of z, and an unknown
            scale of all coordinates.
    mask    [B, h, w] float32, above 0.5 where a point is known.
    scale   [B] float32, the length in meters of a unit of the points. None for MoGe v1.
    """

    points: Tensor
    mask: Tensor
    scale: Tensor | None = None


def make_dinov2_config(encoder: str) -> Dinov2Config:
    """The config of the encoder with a name in `ENCODERS`, with MoGe's settings.

    Raises:
        SpearError: The name is not in `ENCODERS`.
    """
    check_known("MoGe encoder", ENCODERS, encoder)
    width, num_layers, num_heads = ENCODERS[encoder]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "patch_size": PATCH_SIZE_PX,
        "image_size": 37 * PATCH_SIZE_PX,  # published position embeddings are for 37 × 37 patches
        "position_offset": 0.1,  # see `spear.models.vision.DinoEmbeddings`
        "use_mask_token": False,
        "attn_implementation": "sdpa",
    }
    return Dinov2Config(**fields)


def check_supported(prefix: str, config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Check that a published config has no other values than `supported`.

    Raises:
        SpearError: A value differs. The message names its key after `prefix`.
    """
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise SpearError(
                f"{prefix}{key} in MoGe's config is {config[key]!r}, but only {value!r} is "
                "supported. Use one of the published checkpoints."
            )


# Building blocks


def build_conv3x3(in_width: int, out_width: int) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size, by repeating the pixels at the edge."""
    return nn.Conv2d(in_width, out_width, 3, padding=1, padding_mode="replicate")


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with norms over groups of channels or none."""

    def __init__(self, width: int, hidden_width: int, has_norms: bool) -> None:
        super().__init__()
        first_norm: nn.Module = nn.Identity()
        second_norm: nn.Module = nn.Identity()
        if has_norms:
            first_norm = nn.GroupNorm(1, width)  # one group of all channels
            second_norm = nn.GroupNorm(hidden_width // 32, hidden_width)  # groups of 32 channels
        self.layers = nn.Sequential(
            first_norm,
            nn.ReLU(),
            build_conv3x3(width, hidden_width),
            second_norm,
            nn.ReLU(),
            build_conv3x3(hidden_width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] -> the same."""
        return x + self.layers(x)


def build_upsampler(kind: str, in_width: int, out_width: int) -> nn.Sequential:
    """A module that doubles the resolution: [B, in, h, w] -> [B, out, 2h, 2w].

    `kind` is the method of upsampling, "conv_transpose" (learned) or "bilinear". A convolution
    follows.
    """
    if kind == "bilinear":
        upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        return nn.Sequential(upsample, build_conv3x3(in_width, out_width))
    return nn.Sequential(
        nn.ConvTranspose2d(in_width, out_width, 2, stride=2), build_conv3x3(out_width, out_width)
    )


def make_view_plane(
    width: int, height: int, aspect: float | None = None, device: torch.device | None = None
) -> Tensor:
    """MoGe's uv grid: view-plane coordinates of a grid's cell centers, [height, width, 2] float32.

    MoGe measures the view plane in half diagonals of the image. u points right and v down. Both are
    0 at the image's center.

    Args:
        width: Number of columns of the grid.
        height: Number of rows of the grid.
        aspect: Width / height of the image that the grid covers. By default the grid's cells are
            square.
        device: Where the result is.
    """
    # In units of half the image's height, the half width is `ratio` and the half diagonal
    # `diagonal`. The outermost cell centers are half a cell from the edge.
    ratio = width / height if aspect is None else aspect
    diagonal = math.sqrt(1 + ratio**2)
    u_end = (width - 1) / width * ratio / diagonal
    v_end = (height - 1) / height * 1.0 / diagonal
    u = torch.linspace(-u_end, u_end, width, device=device, dtype=torch.float32)
    v = torch.linspace(-v_end, v_end, height, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def make_uv_channels(
    batch: int, width: int, height: int, aspect: float, template: Tensor
) -> Tensor:
    """`make_view_plane` as channels [B, 2, height, width], with the type and device of `template`.

    The grid is computed in float32 and then converted, because in float16 the rounding errors would
    add up along a row.
    """
    uv = make_view_plane(width, height, aspect, template.device).to(template.dtype)
    return uv.permute(2, 0, 1).expand(batch, -1, -1, -1)


def append_uv(x: Tensor, aspect: float) -> Tensor:
    """Append the uv channels of an image with `aspect`: [B, c, h, w] -> [B, c + 2, h, w]."""
    batch, _, height, width = x.shape
    return torch.cat([x, make_uv_channels(batch, width, height, aspect, x)], dim=1)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly, without antialias: [B, c, h, w] -> [B, c, height, width]."""
    return nn.functional.interpolate(x, (height, width), mode="bilinear", align_corners=False)


class RawMogeOutput(NamedTuple):
    """What MoGe's heads predict, in the form that its config calls "exp".

    points  [B, 3, h, w], the channels x / z, y / z and log z.
    mask    [B, 1, h, w].
    """

    points: Tensor
    mask: Tensor


def upsample_to_points_and_mask(raw_output: RawMogeOutput, images: Tensor) -> tuple[Tensor, Tensor]:
    """Resize a head's raw output to the size of the images, and convert it to points.

    Args:
        raw_output: The head's output.
        images: [B, 3, H, W], of which only the size is read.

    Returns:
        Points [B, H, W, 3] and mask [B, H, W], float32.
    """
    height, width = images.shape[2:]
    with torch.autocast(images.device.type, enabled=False):
        points = resize(raw_output.points.float(), height, width)
        mask = resize(raw_output.mask.float(), height, width)
        xy_over_z, log_z = points.permute(0, 2, 3, 1).split([2, 1], dim=-1)
        z = log_z.exp()
        return torch.cat([xy_over_z * z, z], dim=-1), mask[:, 0]


def to_feature_map(layer_output: Tensor, encoder_input: Tensor) -> FeatureMap:
    """Reshape a layer's output to an image of patches, without the class token.

    Args:
        layer_output: [B, 1 + rows · columns, width].
        encoder_input: [B, 3, 14 · rows, 14 · columns], of which only the size is read.

    Returns:
        [B, width, rows, columns].
    """
    rows = encoder_input.shape[2] // PATCH_SIZE_PX
    columns = encoder_input.shape[3] // PATCH_SIZE_PX
    patch_features = layer_output[:, 1:]  # [B, rows · columns, width]
    return patch_features.mT.unflatten(2, (rows, columns))


def _make_too_thin_error(width: int, height: int, num_tokens: int) -> SpearError:
    return SpearError(
        f"image of {width}×{height} is too thin for {num_tokens} MoGe tokens. Crop it to a less"
        " extreme aspect."
    )


# MoGe v1

# The only values that these fields of a published config may have.
_SUPPORTED_V1 = {
    "remap_output": "exp",
    "output_mask": True,
    "split_head": True,
    "res_block_norm": "group_norm",
    "last_res_blocks": 0,
    "last_conv_size": 1,
    "mask_threshold": 0.5,
}


class MogeV1Input(NamedTuple):
    """Images that `MogeV1` has resized.

    encoder_input     [B, 3, 14 · rows, 14 · columns], normalized.
    head_output_size  (height, width) of the head's output. It has the aspect of the images, and
                      nearly as many pixels as the encoder's input.
    """

    encoder_input: Tensor
    head_output_size: tuple[int, int]


class MogeV1(nn.Module):
    """MoGe v1: DINOv2, and a convolutional head on the outputs of its last layers.

    unit        The unit of the points.
    max_tokens  The largest number of patches per image for which the network was trained.
    """

    unit: Unit = "relative"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network from a published checkpoint's `model_config`.

        Raises:
            SpearError: The config is not supported.
        """
        super().__init__()
        # Where a config does not name `remap_output`, it is "linear", which is not supported.
        check_supported(
            prefix="", config={"remap_output": "linear", **config}, supported=_SUPPORTED_V1
        )
        num_tokens_range = config.get("num_tokens_range", (1200, 2500))
        self.max_tokens = int(num_tokens_range[1])
        if "trained_area_range" in config:  # an older field of the released checkpoint, in pixels
            self.max_tokens = int(config["trained_area_range"][1]) // PATCH_SIZE_PX**2
        self.encoder = MogeEncoder(make_dinov2_config(config.get("encoder", "dinov2_vitb14")))
        encoder_config = self.encoder.backbone.config
        num_layers = encoder_config.num_hidden_layers
        num_feature_layers = config.get("intermediate_layers", 4)
        self.feature_layers = range(num_layers - num_feature_layers, num_layers)
        self.head = MogeV1Head(config, encoder_config.hidden_size)

    def resize_and_normalize(self, images: Tensor, num_tokens: int) -> MogeV1Input:
        """Resize and normalize images, so that they consist of about `num_tokens` patches.

        Args:
            images: [B, 3, h, w], values from 0 to 1.
            num_tokens: Number of patches.

        Raises:
            SpearError: The images are too long and thin for so few patches.
        """
        height, width = images.shape[2:]
        num_pixels = num_tokens * PATCH_SIZE_PX**2
        factor = math.sqrt(num_pixels / (height * width))
        head_size = int(height * factor), int(width * factor)
        if min(head_size) < PATCH_SIZE_PX:
            raise _make_too_thin_error(width, height, num_tokens)
        resized = nn.functional.interpolate(
            images, head_size, mode="bicubic", antialias=True, align_corners=False
        )
        # The largest size in whole patches.
        input_size = [side // PATCH_SIZE_PX * PATCH_SIZE_PX for side in head_size]
        encoder_input = nn.functional.interpolate(
            normalize_by_imagenet(resized),
            input_size,
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        return MogeV1Input(encoder_input, head_size)

    def forward(self, images: Tensor, num_tokens: int) -> MogeOutput:
        """Points and mask of images, whose arguments are those of `resize_and_normalize`."""
        encoder_input, head_size = self.resize_and_normalize(images, num_tokens)
        layer_outputs = self.encoder.compute_layer_outputs(encoder_input, self.feature_layers)
        features = [to_feature_map(output, encoder_input) for output in layer_outputs]
        points, mask = upsample_to_points_and_mask(self.head(features, head_size), images)
        return MogeOutput(points, mask)


class MogeV1Head(nn.Module):
    """Turns the encoder's patch features into raw points (x / z, y / z, log z) and a raw mask."""

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        # Where a config does not name a field, the default is that of MoGe's own code.
        num_feature_layers = config.get("intermediate_layers", 4)
        project_width = config.get("dim_proj", 512)
        widths = config.get("dim_upsample", (256, 128, 128))
        num_res_blocks = config.get("num_res_blocks", 1)
        hidden_factor = config.get("dim_times_res_block_hidden", 1)
        last_width = config.get("last_conv_channels", 32)

        self.projects = nn.ModuleList(
            nn.Conv2d(width, project_width, 1) for _ in range(num_feature_layers)
        )

        # Every block gets two more channels, u and v (`append_uv`).
        upsample_blocks = []
        for in_width, out_width in pairwise((project_width, *widths)):
            layers: list[nn.Module] = [build_upsampler("conv_transpose", in_width + 2, out_width)]
            for _ in range(num_res_blocks):
                layers.append(ResidualBlock(out_width, out_width * hidden_factor, has_norms=True))
            upsample_blocks.append(nn.Sequential(*layers))
        self.upsample_blocks = nn.ModuleList(upsample_blocks)

        output_blocks = []
        for num_channels in (3, 1):  # points, mask
            first_conv = build_conv3x3(widths[-1] + 2, last_width)
            last_conv = nn.Conv2d(last_width, num_channels, 1)
            output_blocks.append(nn.Sequential(first_conv, nn.ReLU(), last_conv))
        self.output_block = nn.ModuleList(output_blocks)

    def forward(
        self, features: Sequence[FeatureMap], output_size: tuple[int, int]
    ) -> RawMogeOutput:
        """Compute raw points and a raw mask.

        Args:
            features: [B, width, rows, columns] of each layer.
            output_size: (height, width) of the result. All uv channels have its aspect.
        """
        height, width = output_size
        aspect = width / height
        projected = []
        for project, layer_features in zip(self.projects, features, strict=True):
            projected.append(project(layer_features))
        x = torch.stack(projected).sum(dim=0)
        for block in self.upsample_blocks:
            x = block(append_uv(x, aspect))
        x = append_uv(resize(x, height, width), aspect)
        points_block, mask_block = self.output_block
        return RawMogeOutput(points_block(x), mask_block(x))


# MoGe-2

# The only values that these fields of a published `ConvStack` may have.
_SUPPORTED_STACK = {
    "res_block_in_norm": "none",
    "res_block_hidden_norm": "none",
    "activation": "relu",
    "dim_times_res_block_hidden": 1,
}


class MogeV2(nn.Module):
    """MoGe-2: a DINOv2, whose features are projected and summed, a neck, and one head per output.

    unit        The unit of the points after multiplication by the scale.
    max_tokens  The largest number of patches per image for which the network was trained.
    """

    unit: Unit = "metre"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network from a published checkpoint's `model_config`.

        Raises:
            SpearError: The config is not supported.
        """
        super().__init__()
        # Where a config does not name `remap_output`, it is "linear", which is not supported.
        check_supported(
            prefix="",
            config={"remap_output": "linear", **config},
            supported={"remap_output": "exp"},
        )
        num_tokens_range = config.get("num_tokens_range", (1200, 3600))
        self.max_tokens = int(num_tokens_range[1])

        encoder_fields = config["encoder"]
        self.encoder = MogeEncoder(make_dinov2_config(encoder_fields["backbone"]))
        encoder_config = self.encoder.backbone.config
        # A config has either the indices of the layers, or how many of the last layers are read.
        feature_layers = encoder_fields["intermediate_layers"]
        if isinstance(feature_layers, int):
            num_layers = encoder_config.num_hidden_layers
            feature_layers = range(num_layers - feature_layers, num_layers)
        self.feature_layers = feature_layers
        self.output_projections = nn.ModuleList(
            nn.Conv2d(encoder_config.hidden_size, encoder_fields["dim_out"], 1)
            for _ in self.feature_layers
        )

        # Some checkpoints also have a head for normals, which we do not read.
        self.neck = ConvStack("neck", config["neck"])
        self.points_head = ConvStack("points_head", config["points_head"])
        self.mask_head = ConvStack("mask_head", config["mask_head"])
        layers: list[nn.Module] = []
        for in_width, out_width in pairwise(config["scale_head"]["dims"]):
            layers += [nn.Linear(in_width, out_width), nn.ReLU()]
        self.scale_head = nn.Sequential(*layers[:-1])  # no ReLU at the end

    def resize_and_normalize(self, images: Tensor, num_tokens: int) -> Tensor:
        """Resize and normalize images, so that they consist of about `num_tokens` patches.

        Args:
            images: [B, 3, h, w], values from 0 to 1.
            num_tokens: Number of patches.

        Returns:
            The encoder's input [B, 3, 14 · rows, 14 · columns], normalized.

        Raises:
            SpearError: The images are too long and thin for so few patches.
        """
        height, width = images.shape[2:]
        aspect = width / height
        rows = round(math.sqrt(num_tokens / aspect))
        columns = round(math.sqrt(num_tokens * aspect))
        if min(rows, columns) < 1:
            raise _make_too_thin_error(width, height, num_tokens)
        size = (rows * PATCH_SIZE_PX, columns * PATCH_SIZE_PX)
        resized = nn.functional.interpolate(
            images, size, mode="bilinear", antialias=True, align_corners=False
        )
        return normalize_by_imagenet(resized)

    def encode(self, encoder_input: Tensor) -> tuple[FeatureMap, Tensor]:
        """Encode normalized images [B, 3, 14 · rows, 14 · columns].

        Returns:
            The features [B, project width, rows, columns], which are the sum over the layers
            `feature_layers`; and the class token [B, width] of the last of these layers.
        """
        layer_outputs = self.encoder.compute_layer_outputs(encoder_input, self.feature_layers)
        projected = []
        for projection, output in zip(self.output_projections, layer_outputs, strict=True):
            projected.append(projection(to_feature_map(output, encoder_input)))
        class_token = layer_outputs[-1][:, 0]
        return torch.stack(projected).sum(dim=0), class_token

    def forward(self, images: Tensor, num_tokens: int) -> MogeOutput:
        """Points, mask and scale of images, whose arguments are those of `resize_and_normalize`."""
        features, class_token = self.encode(self.resize_and_normalize(images, num_tokens))
        batch, _, rows, columns = features.shape
        height, width = images.shape[2:]
        aspect = width / height

        # The input of the neck is a pyramid, in which each level has twice the resolution of the
        # level before. The coarsest level has the features and uv channels, the others uv channels
        # alone.
        pyramid = [append_uv(features, aspect)]
        for level in range(1, len(self.neck.input_blocks)):
            upsampling = 2**level
            pyramid.append(
                make_uv_channels(
                    batch,
                    width=upsampling * columns,
                    height=upsampling * rows,
                    aspect=aspect,
                    template=features,
                )
            )
        levels = self.neck(pyramid)

        # A head's output is that of its finest level.
        raw_output = RawMogeOutput(self.points_head(levels)[-1], self.mask_head(levels)[-1])
        log_scale = self.scale_head(class_token)
        points, mask = upsample_to_points_and_mask(raw_output, images)
        return MogeOutput(points, mask.sigmoid(), log_scale.float()[:, 0].exp())


class ConvStack(nn.Module):
    """Convolutions on a pyramid, from its coarsest to its finest level.

    A level adds its own input to the upsampled result of the level before, and refines the sum with
    residual blocks.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        """Build the stack from published fields, in which a single value stands for all levels.

        Raises:
            SpearError: A field is not supported. The message names the stack by `name`.
        """
        super().__init__()
        # A config that does not name these fields means these norms, which our stack does not have.
        # So such a config is refused: `_SUPPORTED_STACK` has "none" for both.
        norm_defaults = {"res_block_in_norm": "layer_norm", "res_block_hidden_norm": "group_norm"}
        check_supported(
            prefix=f"{name}.", config={**norm_defaults, **config}, supported=_SUPPORTED_STACK
        )

        widths = config["dim_res_blocks"]
        num_levels = len(widths)
        in_widths = _repeat_for_levels(config["dim_in"], num_levels)
        resamplers = _repeat_for_levels(config["resamplers"], num_levels - 1)
        check_known(f"{name} resampler", ("conv_transpose", "bilinear"), *resamplers)
        res_block_counts = _repeat_for_levels(config.get("num_res_blocks", 1), num_levels)
        out_widths = _repeat_for_levels(config.get("dim_out"), num_levels)

        self.input_blocks = nn.ModuleList(
            nn.Conv2d(in_width, width, 1) for in_width, width in zip(in_widths, widths, strict=True)
        )
        self.resamplers = nn.ModuleList(
            build_upsampler(kind, coarse_width, fine_width)
            for kind, (coarse_width, fine_width) in zip(resamplers, pairwise(widths), strict=True)
        )
        res_blocks = []
        for width, count in zip(widths, res_block_counts, strict=True):
            blocks = [ResidualBlock(width, width, has_norms=False) for _ in range(count)]
            res_blocks.append(nn.Sequential(*blocks))
        self.res_blocks = nn.ModuleList(res_blocks)
        self.output_blocks = nn.ModuleList(
            nn.Conv2d(width, out_width, 1) if out_width else nn.Identity()
            for out_width, width in zip(out_widths, widths, strict=True)
        )

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Run the stack on a pyramid [B, channels, h, w] per level, and return the same per level.

        Each level's h and w are twice those of the level before.
        """
        outputs: list[Tensor] = []
        x: Tensor | None = None
        for level, features in enumerate(pyramid):
            level_input = self.input_blocks[level](features)
            if x is None:
                x = level_input
            else:
                x = self.resamplers[level - 1](x) + level_input
            x = self.res_blocks[level](x)
            outputs.append(self.output_blocks[level](x))
        return outputs


def _repeat_for_levels(value: Any, num_levels: int) -> Sequence[Any]:
    """A config's value for each level, where a single value stands for all levels."""
    if isinstance(value, list | tuple):
        return value
    return [value] * num_levels
