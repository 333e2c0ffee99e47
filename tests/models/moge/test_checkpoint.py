"""MoGe checkpoints: every name accounted for, files that are refused, and the Hub."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moge_reference import checkpoint, reference
from refusals import refuses
from spear.models.moge.checkpoint import Checkpoint, build_moge, load_moge
from spear.models.moge.networks import MogeV1


def test_a_file_gives_the_network(shared: Path, tmp_path: Path) -> None:
    published = checkpoint(shared, 1)
    torch.save(
        {"model_config": published.config, "model": published.weights}, tmp_path / "model.pt"
    )
    model = load_moge(tmp_path / "model.pt")
    assert model.unit == "relative" and not model.training and model.max_tokens == 2500
    torch.testing.assert_close(
        model.state_dict(), reference(shared, 1).state_dict(), rtol=0, atol=0
    )


def changed(published: Checkpoint, drop: str = "", **extra: torch.Tensor) -> Checkpoint:
    weights = {k: v for k, v in published.weights.items() if k != drop}
    return dataclasses.replace(published, weights={**weights, **extra})


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (1, "backbone.blocks.3.attn.qkv.bias"),
        (1, "head.upsample_blocks.1.2.layers.3.weight"),
        (1, "image_std"),
        (2, "neck.resamplers.3.1.weight"),
        (2, "scale_head.4.bias"),
    ],
)
def test_a_missing_weight_is_named(shared: Path, version: int, name: str) -> None:
    lacking = changed(checkpoint(shared, version), drop=name)
    refuses(rf"weights missing: 1, first {name} \[[\d, ]+\]: ", build_moge, lacking)


def test_unknown_misshapen_and_foreign_weights_are_named(shared: Path) -> None:
    v1, v2 = checkpoint(shared, 1), checkpoint(shared, 2)
    for published, extra in (
        (v1, "backbone.register_tokens"),
        (v2, "edge_head.bias"),
        (v2, "image_mean"),
    ):
        more = changed(published, **{extra: torch.zeros(3)})
        refuses(rf"weights unknown: 1, first {extra} \[3\]: ", build_moge, more)
    other = changed(v1, **{"head.projects.0.bias": torch.zeros(5)})
    refuses(r"wrong shape: 1, first head\.projects\.0\.bias \[5\], not \[512\]", build_moge, other)
    grey = changed(v1, image_mean=torch.full((1, 3, 1, 1), 0.5))
    refuses(r"image_mean is not ImageNet's", build_moge, grey)


def test_configs_that_were_never_published_are_refused(shared: Path) -> None:
    config = checkpoint(shared, 1).config
    refuses(
        "MoGe config not supported: .*'sinh', only 'exp'",
        MogeV1,
        {**config, "remap_output": "sinh"},
    )
    refuses("MoGe config not supported: .*is 1", MogeV1, {**config, "last_res_blocks": 1})
    v2 = checkpoint(shared, 2)
    cut = {k: v for k, v in v2.config["neck"].items() if k != "dim_in"}
    without = dataclasses.replace(v2, config={**v2.config, "neck": cut})
    refuses(r"MoGe v2 cannot be built from the config in .*KeyError 'dim_in'", build_moge, without)


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": {}, "model_config": Harmful(marker)}, tmp_path / "harmful.pt")
    why = r"harmful\.pt is not a PyTorch file of tensors and plain data alone"
    refuses(rf"refused: .*{why}", load_moge, tmp_path / "harmful.pt")
    assert not marker.exists()
    for name, content, words in (
        ("other.pt", {"model": {"conv.weight": torch.zeros(2)}}, r"has no backbone\.cls_token"),
        ("list.pt", [1, 2], "holds no weights by name"),
        ("part.pt", {"backbone.cls_token": torch.zeros(1, 1, 384)}, "no model_config"),
    ):
        torch.save(content, tmp_path / name)
        refuses(words, load_moge, tmp_path / name)
    whole = (tmp_path / "part.pt").read_bytes()
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        refuses(r"(broken checkpoint|checkpoint refused): ", load_moge, tmp_path / name)
    for name in (tmp_path, "runs/absent.pt", tmp_path / "nowhere.pt"):
        refuses("MoGe checkpoint not found", load_moge, name)
