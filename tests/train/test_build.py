"""What a recipe puts together: other 3D tokens than those learned before, and what cannot be put together."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from data_tiny import make, stored
from labels_boxes import labelled
from refusals import no_warning, refuses
from spear.data.normalize import Normalizer
from spear.errors import Notice
from spear.flow import FlowConfig
from spear.labels.store import write_labels
from spear.models.presets import build_vlm_config, get_preset
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.policy import load_vlm, locate
from spear.tokens import init_new_embeddings
from spear.train.build import build
from spear.train.optimize import set_weight_precision
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.tasks import DepthTask, load_labels


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    """Labels, and the shipped SPEAR-VLM."""
    folder = tmp_path_factory.mktemp("labels")
    write_labels((labelled(i) for i in range(12)), folder / "labels-00000.parquet")
    return TrainingInputs(labels=[folder], init=locate("nano-vlm"))


@pytest.mark.parametrize(("bins", "spacing"), [(256, None), (1500, "uniform")])
def test_a_stage_with_new_tokens(
    bins: int, spacing: str | None, inputs: TrainingInputs, tmp_path: Path
) -> None:
    begun = load_vlm(inputs.init)
    before = begun.model.get_parameter("language_model.embed_tokens.weight")
    model, task, save = build(
        get_recipe("nano-vlm-2").with_changes(bins=bins, spacing=spacing, batch_size=2), inputs
    )
    assert isinstance(model, SpearVLMForConditionalGeneration)
    first = model.config.coordinate_start
    rows = model.get_parameter("language_model.embed_tokens.weight")
    assert model.config.coordinate_bins == bins
    assert len(rows) == model.config.text_config.vocab_size == first + max(bins, 1024)
    assert torch.equal(rows[:first], before[:first])
    words, seeded = before[: begun.processor.location_start], torch.Generator().manual_seed(0)
    assert torch.equal(rows[first : first + bins], init_new_embeddings(words, bins, seeded))
    assert not torch.isclose(rows[first : first + 256], before[first : first + 256]).all(1).any()
    loss, parts = task.loss(task.batch(0), torch.Generator())
    loss.backward()
    assert torch.isfinite(loss) and rows.grad is not None and parts["coordinates"] > 0
    save(tmp_path / "out")
    after = load_vlm(tmp_path / "out")
    edges = after.processor.coordinates.bin_edges
    assert after.processor.coordinates.num_bins == bins
    assert np.allclose(np.diff(edges), np.diff(edges)[0]) == (spacing == "uniform")
    image = np.zeros((128, 192, 3), np.uint8)
    (answer,) = after.answer([image], ["Where is the mug?"], "box_vertices", distributions=True)
    assert len(answer.values) == 24 and answer.distribution is not None
    assert answer.distribution.probabilities.shape == (24, bins)


def test_numbers_that_no_3d_token_means_are_said(inputs: TrainingInputs, tmp_path: Path) -> None:
    """As when a VLM of a tabletop goes on with images of rooms: its answers would end at the last token."""
    write_labels(
        (labelled(i, scale=9.0) for i in range(4)), tmp_path / "rooms/labels-00000.parquet"
    )
    rooms = dataclasses.replace(inputs, labels=[tmp_path / "rooms"])
    with pytest.warns(Notice, match="outside of the 3D tokens.*bins=1024$"):
        build(get_recipe("nano-vlm-2").with_changes(batch_size=2), rooms)
    for changes, given in (
        ({"bins": 1024}, rooms),
        ({"families": ["what_at"]}, rooms),
        ({}, inputs),
    ):
        with no_warning():
            build(get_recipe("nano-vlm-2").with_changes(batch_size=2, **changes), given)


def test_labels_that_do_not_go_together_are_said(inputs: TrainingInputs, tmp_path: Path) -> None:
    shard = tmp_path / "labels-00002.parquet"
    write_labels([dataclasses.replace(labelled(0), unit="relative")], shard)
    with no_warning():
        load_labels(inputs.labels, ["external"])
        load_labels([shard], ["external"])  # asked for alone, it lacks none
    with pytest.warns(Notice, match=r"^12 of 24 .* twice: give each folder once"):
        load_labels([*inputs.labels] * 2, ["external"])
    with pytest.warns(Notice, match="lacks 2 of its shards"):
        load_labels([tmp_path], ["external"])
    refuses("metre, relative", load_labels, [*inputs.labels, tmp_path], ["external"])


def test_an_expert_is_as_deep_as_the_vlm_that_a_policy_begins_with(tmp_path: Path) -> None:
    """A VLM of a preset's encoders may have another language model: PaliGemma 2's."""
    processor, size = load_vlm("nano").processor, get_preset("nano")
    config = build_vlm_config(size, len(processor.tokenizer), processor.coordinate_ids.start)
    sizes = dict(hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    fields = {**config.text_config.to_dict(), **sizes, "num_key_value_heads": 3, "head_dim": 32}
    config.text_config = AutoConfig.for_model(
        "gemma2", **{k: fields[k] for k in fields if k != "model_type"}
    )
    SpearVLMForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    processor.save(tmp_path / "vlm")
    mine = [("it", stored([make(0)], tmp_path / "mine"), 1.0)]
    with pytest.warns(Notice, match="random weights"):
        model, task, _ = build(
            get_recipe("nano-post").with_changes(batch_size=1),
            TrainingInputs((), mine, tmp_path / "vlm"),
        )
    made = model.get_submodule("expert").config
    assert (made.num_hidden_layers, made.num_key_value_heads, made.head_dim) == (2, 3, 32)
    assert made.hidden_size == size.expert["hidden_size"]
    assert torch.isfinite(task.loss(task.batch(0), torch.Generator())[0])


def test_a_policy_is_trained_on_in_the_units_that_it_has(tmp_path: Path) -> None:
    """Else it would begin with steps of another length: nano's three times as long."""
    mine = [("it", stored([make(0, steps=9)], tmp_path / "mine"), 1.0)]
    for name, changes, mode in (
        ("nano", {}, "meanstd"),
        ("nano-vlm", {}, "quantile"),
        ("nano", {"normalization": "minmax"}, "minmax"),
    ):
        stage = get_recipe("nano-post", batch_size=1, **changes)
        with pytest.warns(Notice, match="'external': .* black bars"):  # as acting says it, too
            _, task, _ = build(stage, TrainingInputs((), mine, locate(name)))
        assert task.normalizer == Normalizer.fit([(mine[0][1], 1.0)], mode)


def test_what_a_mapping_of_settings_drops_is_said() -> None:
    with pytest.warns(Notice, match="rotation_loss, rotation_weight"):
        assert get_recipe("nano-vla", flow={"steps": 5}).flow == {"steps": 5}
    with no_warning():
        get_recipe("nano-vla", lr_scale={}, flow={"rotation_loss": "mse", "rotation_weight": 1.0})


def test_encoders_learn_from_images_of_the_wrist_alone(tmp_path: Path) -> None:
    write_labels((labelled(i) for i in range(3)), tmp_path / "wrist/labels-00000.parquet")
    _, naming, _ = build(
        get_recipe("nano-siglip").with_changes(batch_size=1), TrainingInputs([tmp_path])
    )
    depth = DepthTask(torch.nn.Identity(), {"wrist": [(labelled(0).image, np.ones((4, 4)))]}, 1, 0)
    for step in range(8):
        assert len(naming.batch(step)["pixels"]) == len(depth.batch(step)["pixels"]) == 1


def test_flow_and_delay_are_kept_until_a_recipe_says_otherwise(tmp_path: Path) -> None:
    given = TrainingInputs(
        episodes=[("it", stored([make(0)], tmp_path / "mine"), 1.0)], init=locate("nano")
    )
    for committed, expected in ((None, 0), (3, 3), (None, 3), (0, 0)):
        model, _, save = build(get_recipe("nano-post").with_changes(committed=committed), given)
        assert model.config.committed == expected
        save(tmp_path / "out")
        given = dataclasses.replace(given, init=tmp_path / "out")
    own: Any = model.flow
    model, _, _ = build(get_recipe("nano-post").with_changes(flow={"rotation_weight": 7.0}), given)
    assert (
        model.flow
        == dataclasses.replace(own, rotation_weight=7.0)
        == FlowConfig(**model.config.flow)
    )
    model.to(torch.bfloat16)  # as a checkpoint in it is loaded
    set_weight_precision(model, get_recipe("nano-post").optimization)
    assert float(model.vlm.language_model.embed_tokens.embed_scale) == pytest.approx(
        192**0.5, rel=1e-6
    )
