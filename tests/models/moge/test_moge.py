"""MoGe v1 and MoGe-2: the reference implementation's numbers, with its weights' names."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import conv2d
from transformers import Dinov2Config

from moge_reference import arrays, checkpoint, description, error, random_v1, reference
from refusals import refuses
from spear.models.moge.checkpoint import fill_encoder
from spear.models.moge.infer import infer_geometry
from spear.models.moge.networks import MogeV1, MogeV2, dinov2_config
from spear.models.presets import build_vlm_config, get_preset
from spear.models.vision import MogeEncoder, standardize

CASES = [
    (1, "v1_140x196"),
    (1, "v1_168x224"),
    (2, "v2_196x140"),
    (2, "v2_168x224"),
    (2, "v2_square_37x37"),
]
INFER = [(*case, "tokens") for case in CASES[:4]] + [
    (n, f"v{n}_168x224", "tokens_fp16") for n in (1, 2)
]
FLIPS = 13
"""Pixels of a case whose mask value is within 1e-4 of the threshold, so that rounding may decide."""
FLIPS_HALF = 40
"""The same in half precision, a thousandth of the pixels (our choice)."""


@pytest.mark.parametrize(("version", "case"), CASES)
@torch.inference_mode()
def test_features_and_raw_outputs_are_the_references(shared: Path, version: int, case: str) -> None:
    model, expected = reference(shared, version), arrays(shared, case)
    image = torch.tensor(expected["image"])[None]
    about = description(shared, version)["cases"][case]["forward"]
    tokens = about["num_tokens"]
    if isinstance(model, MogeV1):
        patches, read = model.cut_into_patches(image, tokens)[0], range(8, 12)
    else:
        patches, read = model.cut_into_patches(image, tokens), range(5, 12, 6)
    assert list(patches.shape[2:]) == about["image_14_hw"]
    if "features.image_14" in expected:
        assert error(patches[0], expected["features.image_14"]) < 5e-6
    layers = torch.cat(model.encoder.layers(patches, read))
    assert error(layers[:, 0], expected["features.cls"]) < 5e-6
    name, step = (
        ("features.patch", 1) if "features.patch" in expected else ("features.patch_s37", 37)
    )
    assert error(layers[:, 1::step], expected[name]) < 5e-6
    if (
        case == "v2_square_37x37"
    ):  # the grid that positions were learned on; the rest is as elsewhere
        return
    output, compared = model(image, tokens), set()
    for name, tensor in (("points", output.points), ("mask", output.mask)):
        for suffix, step in (("", 1), ("_s2", 2)):
            if f"forward.{name}{suffix}" in expected:
                assert error(tensor[0, ::step, ::step], expected[f"forward.{name}{suffix}"]) < 1e-4
                compared.add(name)
    assert compared == {"points", "mask"}
    if isinstance(model, MogeV2):
        assert output.scale.item() == pytest.approx(
            float(expected["forward.metric_scale"]), rel=1e-5
        )
        if "features.projected" in expected:
            assert error(model.encode(patches)[0][0], expected["features.projected"]) < 1e-5


@pytest.mark.parametrize(("version", "case", "label"), INFER)
def test_inference_is_the_references(shared: Path, version: int, case: str, label: str) -> None:
    about, expected = (
        description(shared, version)["cases"][case]["infer"][label],
        arrays(shared, case),
    )
    half = about.get("use_fp16", True)
    image = (255 * torch.tensor(expected["image"])).byte()[None]
    model, plain = reference(shared, version), torch.autocast("cpu", enabled=False)(conv2d)

    # Of halves, summed in float32 as on a GPU: PyTorch's own take a CPU a hundred times as long.
    def halves(*arguments: Any) -> torch.Tensor:
        widened = [x.half().float() if torch.is_tensor(x) else x for x in arguments]
        return plain(*widened).half()

    cut = patch.object(model, "max_tokens", about["num_tokens"])
    with cut, patch.object(torch.nn.functional, "conv2d", halves if half else conv2d):
        found = infer_geometry(model, image, torch.float16 if half else torch.float32)
    prefix, most = f"infer.{label}.", 1e-2 if half else 1e-3
    known = torch.tensor(expected[prefix + "mask"])
    assert int((known != found.mask[0]).sum()) <= (FLIPS_HALF if half else FLIPS)
    size = torch.tensor(
        [[image.shape[3]], [image.shape[2]], [1]]
    )  # theirs are in image widths and heights
    assert error(found.intrinsics[0] / size, expected[prefix + "intrinsics"]) < most
    compared = 0
    for suffix, step in (("", 1), ("_s4", 4)):
        for name, tensor in (("points", found.points[0]), ("depth", found.points[0, ..., 2])):
            if prefix + name + suffix in expected:
                assert error(tensor[::step, ::step], expected[prefix + name + suffix]) < most
                compared += 1
    assert compared


@pytest.mark.parametrize(("version", "case"), [(1, "v1_140x196"), (2, "v2_196x140")])
@torch.inference_mode()
def test_the_vlms_encoder_takes_moges_weights(shared: Path, version: int, case: str) -> None:
    encoder = MogeEncoder(dinov2_config("dinov2_vits14")).eval()
    fill_encoder(encoder, checkpoint(shared, version))
    expected = arrays(shared, case)
    patches = torch.tensor(expected["features.image_14"])[None]
    features = torch.cat([x[:, 1:] for x in encoder.layers(patches, range(8, 12))], -1)
    assert features.shape[-1] == 4 * 384
    wanted = torch.tensor(expected["features.patch"])
    if version == 1:
        assert error(features[0], torch.cat(list(wanted), dim=-1).numpy()) < 5e-6
    else:  # the reference recorded the layers 5 and 11
        assert error(features[0, :, -384:], wanted[1].numpy()) < 5e-6


def test_the_paper_sized_vlm_has_moges_large_encoder() -> None:
    config, large = (
        build_vlm_config(get_preset("spear1")).moge_config,
        dinov2_config("dinov2_vitl14"),
    )
    sizes = "hidden_size num_hidden_layers num_attention_heads mlp_ratio patch_size image_size layer_norm_eps"
    for field in f"{sizes} hidden_act position_offset use_mask_token qkv_bias".split():
        assert getattr(config, field) == getattr(large, field), field


def test_an_encoder_of_another_kind_is_refused(shared: Path) -> None:
    plain = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.device("meta"):
        encoder = MogeEncoder(plain)
        smaller = MogeEncoder(dinov2_config("dinov2_vitb14"))
    refuses(
        r"position_offset is 0\.0: MoGe needs 0\.1", fill_encoder, encoder, checkpoint(shared, 1)
    )
    first = r"wrong shape: 174, first backbone\.blocks\.0\.attn\.proj\.bias"
    refuses(first, fill_encoder, smaller, checkpoint(shared, 1))


@torch.inference_mode()
def test_the_encoder_gives_the_same_of_pixels_and_of_normalised_images() -> None:
    encoder = random_v1().encoder
    pixels = torch.randint(
        0, 256, (2, 3, 28, 42), generator=torch.Generator().manual_seed(0)
    ).byte()
    images = standardize(pixels / 255)
    layers = encoder.layers(images, range(8, 12))
    expected = torch.cat([x[:, 1:] for x in layers], -1)
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layers[-1], encoder.backbone(images).last_hidden_state)


def test_what_does_not_fit_is_refused() -> None:
    model = random_v1()
    refuses(
        r"wrong image type: .*torch\.float32 \(1, ",
        infer_geometry,
        model,
        torch.zeros(1, 3, 40, 60),
    )
    refuses(
        r"wrong image type: .*torch\.uint8 \(40, ",
        infer_geometry,
        model,
        torch.zeros(40, 60, 3).byte(),
    )
    refuses(
        "image of 400×2 is too thin for 24 MoGe tokens",
        infer_geometry,
        model,
        torch.zeros(1, 3, 2, 400).byte(),
    )
    refuses(r"unknown MoGe encoder 'dinov2_vitg14': did you mean", dinov2_config, "dinov2_vitg14")
