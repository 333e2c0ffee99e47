"""MoGe v1 and MoGe-2 compute the numbers of the reference implementation, with the same weights.

The fixture `shared` is the folder of reference outputs. It has cases: an image for one version of
MoGe, with the outputs of the reference for it. "forward" is the network alone, and "infer" includes
the fit of the camera.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import conv2d
from transformers import Dinov2Config

from moge_reference import (
    build_reference_model,
    build_small_v1,
    load_arrays,
    load_description,
    make_checkpoint,
    relative_error,
)
from refusals import refuses
from spear.models.moge.checkpoint import fill_encoder
from spear.models.moge.infer import infer_geometry
from spear.models.moge.networks import MogeV1, MogeV2, make_dinov2_config
from spear.models.presets import build_vlm_config, get_preset
from spear.models.vision import MogeEncoder, normalize_by_imagenet
from spear.types import Array

# (version of MoGe, case). The name of a case has the size of its image.
CASES = [
    (1, "v1_140x196"),
    (1, "v1_168x224"),
    (2, "v2_196x140"),
    (2, "v2_168x224"),
]
SQUARE_CASE = (2, "v2_square_37x37")  # patches in the grid that position embeddings were learned on
# (version, case, label of the settings of an inference).
INFERENCE_CASES = [
    *[(version, case, "tokens") for version, case in CASES],
    (1, "v1_168x224", "tokens_fp16"),
    (2, "v2_168x224", "tokens_fp16"),
]

# How many pixels of a mask may differ from the reference, because their value is so near the
# threshold of 0.5 that rounding decides.
MAX_MASK_FLIPS = 13  # the pixels within 1e-4 of the threshold
MAX_MASK_FLIPS_HALF = 40  # in half precision, about a thousandth of the pixels


def resize_and_normalize(
    model: MogeV1 | MogeV2, image: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """The input of a model's encoder."""
    if isinstance(model, MogeV1):
        encoder_input, _ = model.resize_and_normalize(image, num_tokens)
        return encoder_input
    return model.resize_and_normalize(image, num_tokens)


def get_subsampled(
    expected: dict[str, Array], name: str, steps: dict[str, int]
) -> tuple[Array, int]:
    """An array of a case, and the step between its elements in the full array.

    `steps` maps the suffixes that the array's name may have to their steps, such as "_s2" -> 2.
    """
    for suffix, step in steps.items():
        if f"{name}{suffix}" in expected:
            return expected[f"{name}{suffix}"], step
    raise KeyError(name)


@pytest.mark.parametrize(("version", "case"), [*CASES, SQUARE_CASE])
@torch.inference_mode()
def test_features_are_the_references(shared: Path, version: int, case: str) -> None:
    model = build_reference_model(shared, version)
    expected = load_arrays(shared, case)
    settings = load_description(shared, version)["cases"][case]["forward"]
    # The layers whose outputs the reference has: the last four of 12, or 5 and 11.
    recorded_layers = [8, 9, 10, 11] if version == 1 else [5, 11]

    image = torch.tensor(expected["image"])[None]
    encoder_input = resize_and_normalize(model, image, settings["num_tokens"])
    layers = torch.cat(model.encoder.compute_layer_outputs(encoder_input, recorded_layers))

    # The reference calls the encoder's input `image_14`, after its patches of 14 pixels.
    assert list(encoder_input.shape[2:]) == settings["image_14_hw"]
    if "features.image_14" in expected:
        assert relative_error(encoder_input[0], expected["features.image_14"]) < 5e-6
    # The first token of a layer is the class token, the others are those of patches.
    assert relative_error(layers[:, 0], expected["features.cls"]) < 5e-6
    patch_features, step = get_subsampled(expected, "features.patch", {"": 1, "_s37": 37})
    assert relative_error(layers[:, 1::step], patch_features) < 5e-6


@pytest.mark.parametrize(("version", "case"), CASES)
@torch.inference_mode()
def test_raw_outputs_are_the_references(shared: Path, version: int, case: str) -> None:
    model = build_reference_model(shared, version)
    expected = load_arrays(shared, case)
    num_tokens = load_description(shared, version)["cases"][case]["forward"]["num_tokens"]

    output = model(torch.tensor(expected["image"])[None], num_tokens)

    for name, tensor in (("points", output.points), ("mask", output.mask)):
        array, step = get_subsampled(expected, f"forward.{name}", {"": 1, "_s2": 2})
        assert relative_error(tensor[0, ::step, ::step], array) < 1e-4
    if version == 2:
        expected_scale = float(expected["forward.metric_scale"])
        assert output.scale.item() == pytest.approx(expected_scale, rel=1e-5)


@torch.inference_mode()
def test_projected_features_of_moge2_are_the_references(shared: Path) -> None:
    case = "v2_196x140"
    model = build_reference_model(shared, 2)
    expected = load_arrays(shared, case)
    num_tokens = load_description(shared, 2)["cases"][case]["forward"]["num_tokens"]

    image = torch.tensor(expected["image"])[None]
    projected, _ = model.encode(resize_and_normalize(model, image, num_tokens))

    assert relative_error(projected[0], expected["features.projected"]) < 1e-5


def conv2d_of_halves(*arguments: Any) -> torch.Tensor:
    """A convolution of float16 that sums in float32, as a GPU does.

    PyTorch's convolution of float16 takes a hundred times as long on a CPU.
    """
    widened = [x.half().float() if torch.is_tensor(x) else x for x in arguments]
    with torch.autocast("cpu", enabled=False):
        return conv2d(*widened).half()


@pytest.mark.parametrize(("version", "case", "label"), INFERENCE_CASES)
def test_inference_is_the_references(shared: Path, version: int, case: str, label: str) -> None:
    model = build_reference_model(shared, version)
    expected = load_arrays(shared, case)
    settings = load_description(shared, version)["cases"][case]["infer"][label]
    is_half = settings.get("use_fp16", True)  # the reference's default is half precision
    if is_half:
        dtype = torch.float16
        convolution = conv2d_of_halves
        tolerance = 1e-2
        max_mask_flips = MAX_MASK_FLIPS_HALF
    else:
        dtype = torch.float32
        convolution = conv2d
        tolerance = 1e-3
        max_mask_flips = MAX_MASK_FLIPS
    image = (255 * torch.tensor(expected["image"])).byte()[None]

    with (
        patch.object(model, "max_tokens", settings["num_tokens"]),
        patch.object(torch.nn.functional, "conv2d", convolution),
    ):
        geometry = infer_geometry(model, image, dtype)

    prefix = f"infer.{label}."
    expected_mask = torch.tensor(expected[prefix + "mask"])
    assert int((expected_mask != geometry.mask[0]).sum()) <= max_mask_flips
    # The reference's intrinsics are in image widths and heights.
    height, width = image.shape[2:]
    intrinsics = geometry.intrinsics[0] / torch.tensor([[width], [height], [1]])
    assert relative_error(intrinsics, expected[prefix + "intrinsics"]) < tolerance
    # Points and depth are stored whole, or every fourth row and column ("_s4"), or not at all.
    num_compared = 0
    for suffix, step in (("", 1), ("_s4", 4)):
        points = geometry.points[0, ::step, ::step]
        if f"{prefix}points{suffix}" in expected:
            assert relative_error(points, expected[f"{prefix}points{suffix}"]) < tolerance
            num_compared += 1
        if f"{prefix}depth{suffix}" in expected:
            assert relative_error(points[..., 2], expected[f"{prefix}depth{suffix}"]) < tolerance
            num_compared += 1
    assert num_compared


class TestVlmEncoder:
    """The encoder of a SPEAR-VLM, which is that of a MoGe."""

    @pytest.mark.parametrize(("version", "case"), [(1, "v1_140x196"), (2, "v2_196x140")])
    @torch.inference_mode()
    def test_takes_moges_weights(self, shared: Path, version: int, case: str) -> None:
        encoder = MogeEncoder(make_dinov2_config("dinov2_vits14")).eval()
        fill_encoder(encoder, make_checkpoint(shared, version))
        expected = load_arrays(shared, case)

        # The reference's image, resized to multiples of the patches' 14 px and normalized
        encoder_input = torch.tensor(expected["features.image_14"])[None]
        outputs = encoder.compute_layer_outputs(
            encoder_input, range(8, 12)
        )  # the last four of 12 layers
        layers = [output[:, 1:] for output in outputs]  # without the class token
        features = torch.cat(layers, -1)

        assert features.shape[-1] == 4 * 384  # four layers of the encoder's width
        recorded = torch.tensor(expected["features.patch"])
        if version == 1:
            all_layers = torch.cat(list(recorded), dim=-1).numpy()
            assert relative_error(features[0], all_layers) < 5e-6
        else:
            # The reference has the layers 5 and 11, of which only layer 11 is among our four.
            last_layer = features[0, :, -384:]
            assert relative_error(last_layer, recorded[1].numpy()) < 5e-6

    @pytest.mark.parametrize(
        "field",
        [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "mlp_ratio",
            "patch_size",
            "image_size",
            "layer_norm_eps",
            "hidden_act",
            "position_offset",
            "use_mask_token",
            "qkv_bias",
        ],
    )
    def test_of_the_papers_size_is_moges_large_encoder(self, field: str) -> None:
        config = build_vlm_config(get_preset("spear1")).moge_config
        assert getattr(config, field) == getattr(make_dinov2_config("dinov2_vitl14"), field)

    def test_that_resamples_positions_otherwise_is_refused(self, shared: Path) -> None:
        config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
        with torch.device("meta"):
            encoder = MogeEncoder(config)
        checkpoint = make_checkpoint(shared, 1)
        refuses(r"position_offset is 0\.0, and MoGe's is 0\.1", fill_encoder, encoder, checkpoint)

    def test_of_another_size_is_refused(self, shared: Path) -> None:
        """The checkpoint's encoder is a "dinov2_vits14", which is narrower in all 174 weights."""
        with torch.device("meta"):
            encoder = MogeEncoder(make_dinov2_config("dinov2_vitb14"))
        checkpoint = make_checkpoint(shared, 1)
        message = r"174 weights of the wrong shape, first backbone\.blocks\.0\.attn\.proj\.bias"
        refuses(message, fill_encoder, encoder, checkpoint)

    @torch.inference_mode()
    def test_gives_the_same_for_pixels_and_for_normalized_images(self) -> None:
        encoder = build_small_v1().encoder
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (2, 3, 28, 42), generator=generator).byte()
        images = normalize_by_imagenet(pixels / 255)

        layers = encoder.compute_layer_outputs(images, range(8, 12))

        features = torch.cat([layer[:, 1:] for layer in layers], -1)
        torch.testing.assert_close(encoder(pixels), features, atol=1e-4, rtol=1e-4)
        last_hidden = encoder.backbone(images).last_hidden_state
        torch.testing.assert_close(layers[-1], last_hidden)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 40, 60), r"is torch\.float32 \(1, "),
        (torch.zeros(40, 60, 3).byte(), r"is torch\.uint8 \(40, "),
        (torch.zeros(1, 3, 2, 400).byte(), "image of 400×2 is too thin for 24 MoGe tokens"),
    ],
)
def test_unfit_images_are_refused(images: torch.Tensor, message: str) -> None:
    refuses(message, infer_geometry, build_small_v1(), images)


def test_an_unknown_encoder_is_refused() -> None:
    message = "unknown MoGe encoder 'dinov2_vitg14'. Did you mean"
    refuses(message, make_dinov2_config, "dinov2_vitg14")
