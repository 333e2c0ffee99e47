"""Other 3D tokens than those a model has learned: fewer, more, equally wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from labels_boxes import labelled
from spear.errors import SpearError
from spear.labels.store import write_shards
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.policy import load_vlm
from spear.train.build import build
from spear.train.recipes import recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Labels, and the shipped SPEAR-VLM by itself."""
    root = tmp_path_factory.mktemp("bins")
    write_shards((labelled(i) for i in range(12)), root / "labels")
    bundle = load_vlm("nano")
    bundle.model.save_pretrained(root / "init")
    bundle.processor.save(root / "init")
    return root / "labels", root / "init"


@pytest.mark.parametrize(("bins", "spacing"), [(256, None), (1500, "uniform")])
def test_a_stage_starts_with_new_tokens(
    bins: int, spacing: str | None, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    labels, init = folders
    before = load_vlm(init)
    stage = recipe("nano-vlm-2").changed(bins=bins, spacing=spacing, batch_size=2)
    model, task, save = build(stage, labels, init=init)
    assert isinstance(model, SpearVLMForConditionalGeneration)
    first = model.config.coordinate_start
    rows = model.get_parameter("language_model.embed_tokens.weight")
    was = before.model.get_parameter("language_model.embed_tokens.weight")
    assert model.config.coordinate_bins == bins
    assert len(rows) == model.config.text_config.vocab_size == first + max(bins, 1024)
    assert torch.equal(rows[:first], was[:first])
    assert not torch.isclose(rows[first : first + 256], was[first : first + 256]).all(1).any()
    loss, parts = task.loss(task.batch(0), torch.Generator())
    loss.backward()
    assert torch.isfinite(loss) and rows.grad is not None and parts["coordinates"] > 0
    save(tmp_path / "out")
    after = load_vlm(tmp_path / "out")
    edges = after.processor.coordinates.edges
    assert after.processor.coordinates.bins == bins
    assert np.allclose(np.diff(edges), np.diff(edges)[0]) == (spacing == "uniform")
    image = np.zeros((128, 192, 3), np.uint8)
    (answer,) = after.answer([image], ["Where is the mug?"], "box_vertices", distributions=True)
    assert len(answer.values) == 24 and answer.distribution is not None
    assert answer.distribution.probabilities.shape == (24, bins)


def test_what_cannot_be_is_refused(folders: tuple[Path, Path]) -> None:
    labels, init = folders
    with pytest.raises(SpearError, match="bins is 1: give at least 2"):
        build(recipe("nano-vlm-2").changed(bins=1), labels, init=init)
    with pytest.raises(SpearError, match="did you mean 'uniform'"):
        build(recipe("nano-vlm-2").changed(spacing="unifrom"), labels, init=init)
