"""MoGe checkpoints: every weight is matched by name and shape, and other files are refused.

The fixture `shared` is the folder of reference outputs. `make_checkpoint(shared, version)` makes a
checkpoint of MoGe v1 or MoGe-2 with weights that follow from their names.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moge_reference import build_reference_model, make_checkpoint
from refusals import refuses
from spear.models.moge.checkpoint import Checkpoint, build_moge, load_moge
from spear.models.moge.networks import MogeV1


def test_a_file_is_loaded_as_the_network(shared: Path, tmp_path: Path) -> None:
    published = make_checkpoint(shared, 1)
    content = {"model_config": published.config, "model": published.weights}
    torch.save(content, tmp_path / "model.pt")

    model = load_moge(tmp_path / "model.pt")

    assert model.unit == "relative"
    assert model.max_tokens == 2500  # of the checkpoint's config
    assert not model.training
    expected = build_reference_model(shared, 1).state_dict()
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def add_weights(published: Checkpoint, **weights: torch.Tensor) -> Checkpoint:
    """A copy of the checkpoint with these weights added or replaced."""
    return dataclasses.replace(published, weights={**published.weights, **weights})


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
    published = make_checkpoint(shared, version)
    weights = dict(published.weights)
    del weights[name]
    incomplete = dataclasses.replace(published, weights=weights)

    refuses(rf"1 weight missing, first {name} \[[\d, ]+\]", build_moge, incomplete)


@pytest.mark.parametrize(
    ("version", "name"),
    [(1, "backbone.register_tokens"), (2, "edge_head.bias"), (2, "image_mean")],
)
def test_an_unknown_weight_is_named(shared: Path, version: int, name: str) -> None:
    published = add_weights(make_checkpoint(shared, version), **{name: torch.zeros(3)})
    refuses(rf"1 weight unknown, first {name} \[3\]", build_moge, published)


def test_a_weight_of_another_shape_is_named(shared: Path) -> None:
    name = "head.projects.0.bias"
    published = add_weights(make_checkpoint(shared, 1), **{name: torch.zeros(5)})
    refuses(rf"1 weight of the wrong shape, first {name} \[5\], not \[512\]", build_moge, published)


def test_other_image_statistics_are_refused(shared: Path) -> None:
    gray = torch.full((1, 3, 1, 1), 0.5)
    published = add_weights(make_checkpoint(shared, 1), image_mean=gray)
    refuses(r"image_mean of .* is not ImageNet's", build_moge, published)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("remap_output", "sinh", "'sinh', but only 'exp'"), ("last_res_blocks", 1, "is 1")],
)
def test_configs_that_were_never_published_are_refused(
    shared: Path, field: str, value: Any, message: str
) -> None:
    config = {**make_checkpoint(shared, 1).config, field: value}
    refuses(f"in MoGe.s config is .*{message}|in MoGe.s config {message}", MogeV1, config)


def test_a_config_without_a_field_is_refused(shared: Path) -> None:
    published = make_checkpoint(shared, 2)
    neck = dict(published.config["neck"])
    del neck["dim_in"]
    incomplete = dataclasses.replace(published, config={**published.config, "neck": neck})

    message = r"MoGe v2 cannot be built from the config in .*KeyError 'dim_in'"
    refuses(message, build_moge, incomplete)


class RunsCodeWhenLoaded:
    """An object whose unpickling creates a file, the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "harmful.pt"
    torch.save({"model": {}, "model_config": RunsCodeWhenLoaded(marker)}, file)

    reason = r"harmful\.pt is not a PyTorch file of tensors and plain data alone"
    refuses(reason, load_moge, file)

    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"conv.weight": torch.zeros(2)}}, r"has no backbone\.cls_token"),
        ([1, 2], "contains no weights by name"),
        ({"backbone.cls_token": torch.zeros(1, 1, 384)}, "no model_config"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    refuses(message, load_moge, tmp_path / "other.pt")


def test_a_truncated_or_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"backbone.cls_token": torch.zeros(1, 1, 384)}, file)
    content = file.read_bytes()
    for size in (len(content) // 2, 0):
        file.write_bytes(content[:size])
        refuses(r"(is broken|it is not opened)", load_moge, file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path, "runs/absent.pt", tmp_path / "nowhere.pt"):
        refuses("there is no MoGe checkpoint", load_moge, name)
