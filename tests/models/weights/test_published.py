"""The list of tensors that published files must contain (`PUBLISHED`) is right.

The conversions read exactly these tensors, and files of these tensors have the size of the
published files.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PaliGemmaConfig

from spear.models.moge.checkpoint import IMAGE_STATISTICS, Checkpoint, build_moge
from spear.models.presets import PRESETS, build_vlm_config
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import action_expert, backbones
from spear.models.weights.load import StoredCheckpoint, StoredTensor
from spear.models.weights.pi0_policy import plan_pi0
from spear.models.weights.published import PUBLISHED
from spear.util.network import is_hub_name

# Sizes of the files on the Hub.
MOGE_FILE_BYTES = 1_256_823_446
PI0_FILE_BYTES = 14_005_618_584
MAX_HEADER_BYTES = 2e5  # of the part of a file that is not tensors
BYTES_PER_NUMBER = 4  # both files are float32


ROBOT_WEIGHTS = {
    *(f"{layer}.weight" for layer in action_expert.ROBOT_LAYERS),
    *(f"{layer}.bias" for layer in action_expert.ROBOT_LAYERS),
}


def make_stored_checkpoint(shapes: dict[str, Any], config: Any = None) -> StoredCheckpoint:
    """A checkpoint with tensors of these shapes, listed as if from files, but without files."""
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = StoredTensor(Path("x"), tuple(shape), "BF16")
    fields = {} if config is None else config.to_dict()
    return StoredCheckpoint(Path("nowhere"), fields, tensors)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_all_tensors_of_paligemma_are_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = PUBLISHED[name]
    tensors = network.list_tensors()
    vision_config = {
        **PRESETS["spear1"].vision,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        vision_config=vision_config,
        text_config=dict(network.config),
        projection_dim=network.config["hidden_size"],
    )
    checkpoint = make_stored_checkpoint(tensors, config)
    monkeypatch.setattr(StoredCheckpoint, "open", lambda *_: checkpoint)

    # The folder does not exist, because `StoredCheckpoint.open` is replaced. There is no MoGe.
    report = backbones.plan_backbones("nowhere", None).report

    report.check(source_in_message="nowhere")  # raises SpearError if a weight is missing or refused
    assert len(report.select_by_status("loaded")) == len(tensors)
    assert not report.select_by_status("left out")


def test_all_tensors_of_pi0_but_those_of_its_robot_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        vlm = SpearVLMForConditionalGeneration(build_vlm_config(PRESETS["spear1"]))
    vlm_shapes = {name: weight.shape for name, weight in vlm.state_dict().items()}
    checkpoints = {
        "SPEAR-VLM": make_stored_checkpoint(vlm_shapes, vlm.config),
        "π0": make_stored_checkpoint(PUBLISHED["pi0"].list_tensors()),
    }
    monkeypatch.setattr(StoredCheckpoint, "open", lambda _, what: checkpoints[what])

    # The folders do not exist, because `StoredCheckpoint.open` is replaced.
    report = action_expert.plan_policy(vlm="a", expert="b").report

    report.check(source_in_message="nowhere")  # raises SpearError if a weight is missing or refused
    assert {entry.name for entry in report.select_by_status("new")} == ROBOT_WEIGHTS


def test_all_tensors_of_pi0_and_its_vlm_but_those_of_its_robot_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = PUBLISHED["pi0"].list_tensors()
    # A file of LeRobot, whose config says nothing about the networks.
    checkpoint = make_stored_checkpoint(tensors)
    monkeypatch.setattr(StoredCheckpoint, "open", lambda *_: checkpoint)

    # The folder does not exist, because `StoredCheckpoint.open` is replaced. There is no MoGe.
    plan = plan_pi0("nowhere", None)

    plan.check()  # raises SpearError if a weight is missing or refused
    # The rows of the 3D tokens are new, too. They are an entry of the form "name[first:end]".
    new_names = {
        entry.name for entry in plan.report.select_by_status("new") if "[" not in entry.name
    }
    assert new_names == ROBOT_WEIGHTS
    left_out_names = {entry.name for entry in plan.report.select_by_status("left out")}
    assert left_out_names == {f"model.{name}" for name in ROBOT_WEIGHTS}


def test_sizes_of_pi0_are_those_of_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of LeRobot does not say them, so they follow from the shapes of its weights."""
    preset = PRESETS["spear1"]
    checkpoint = make_stored_checkpoint(PUBLISHED["pi0"].list_tensors())
    monkeypatch.setattr(StoredCheckpoint, "open", lambda *_: checkpoint)

    config = plan_pi0("nowhere", None).config

    for network_config, fields in (
        (config.vlm_config.vision_config, preset.vision),
        (config.vlm_config.text_config, preset.text),
        (config.expert_config, preset.expert),
    ):
        for name, value in fields.items():
            assert getattr(network_config, name) == value, name


@pytest.mark.parametrize("name", ["moge", "moge-2"])
def test_moge_is_built_from_its_tensors(name: str) -> None:
    """Building checks all names and shapes, and raises `SpearError` if one is wrong."""
    network = PUBLISHED[name]
    tensors = {}
    for tensor_name, shape in network.list_tensors().items():
        tensors[tensor_name] = torch.empty(shape, device="meta")
    prefix = "encoder." if name == "moge-2" else ""  # of the statistics' names
    for constant, values in IMAGE_STATISTICS.items():
        tensors[prefix + constant] = torch.tensor(values)[None, :, None, None]
    version = 2 if name == "moge-2" else 1

    build_moge(Checkpoint(Path("x"), tensors, network.config, version))


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_are_known_by_their_revision(name: str) -> None:
    network = PUBLISHED[name]

    assert is_hub_name(f"{network.repository}@{network.revision}")
    assert len(network.revision) == 40  # the digits of a commit's hash


def count_numbers(name: str) -> int:
    """How many numbers the tensors of a published network have in total."""
    return sum(math.prod(shape) for shape in PUBLISHED[name].list_tensors().values())


def test_moges_file_is_as_large_as_its_tensors() -> None:
    header_bytes = MOGE_FILE_BYTES - BYTES_PER_NUMBER * count_numbers("moge")

    assert 0 < header_bytes < MAX_HEADER_BYTES


def test_pi0s_file_is_as_large_as_its_tensors_and_its_vlm() -> None:
    # π0's file also contains the output head of its expert (vocabulary × width), which is not read.
    num_in_head = 257_152 * 1024
    num_numbers = count_numbers("pi0") + num_in_head
    header_bytes = PI0_FILE_BYTES - BYTES_PER_NUMBER * num_numbers

    assert 0 < header_bytes < MAX_HEADER_BYTES
