"""`examples/nano_pi0.py` writes nano as a π0, which `plan_pi0` converts to a SPEAR-1."""

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from parity import relative_error
from refusals import refuses
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.stage0 import MogeForDepth
from spear.models.weights import load as weights
from spear.models.weights.depth_encoder import open_depth_encoder
from spear.models.weights.pi0_policy import plan_pi0
from spear.policy import locate_checkpoint

EXAMPLE = Path(__file__).parents[3] / "examples" / "nano_pi0.py"
MAX_ERROR = 1e-5  # relative to the largest value


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "pi0"
    runpy.run_path(str(EXAMPLE))["main"](folder)
    return folder


@pytest.fixture(scope="module")
def converted(pi0: Path) -> Spear1ForActionPrediction:
    """The π0 with the 3D encoder of nano-depth."""
    return plan_pi0(pi0, "nano-depth", "nano").run().eval()


@pytest.fixture(scope="module")
def nano_without_moge() -> Spear1ForActionPrediction:
    """nano, whose visual tokens are not changed by MoGe."""
    model = weights.load(Spear1ForActionPrediction, locate_checkpoint("nano"), torch.float32)
    projector = model.vlm.moge_projector
    assert projector is not None
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    return model


def draw_inputs() -> dict[str, Any]:
    """Draw the inputs of the VLM: two images, and a text without 3D tokens."""
    generator = torch.Generator().manual_seed(0)
    external = torch.randint(0, 256, (1, 3, 128, 192), dtype=torch.uint8, generator=generator)
    wrist = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 700, (1, 7), generator=generator)
    return {
        "pixel_values": {"external": external, "wrist": wrist},
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


@torch.no_grad()
def test_the_converted_vlm_computes_what_nano_computes_without_moge(
    converted: Spear1ForActionPrediction, nano_without_moge: Spear1ForActionPrediction
) -> None:
    expected = nano_without_moge.encode_prefix(**draw_inputs()).cache

    actual = converted.encode_prefix(**draw_inputs()).cache

    for layer, keys in enumerate(expected.keys):
        assert relative_error(actual.keys[layer], keys) < MAX_ERROR
        assert relative_error(actual.values[layer], expected.values[layer]) < MAX_ERROR


def test_the_expert_has_nanos_weights(
    converted: Spear1ForActionPrediction, nano_without_moge: Spear1ForActionPrediction
) -> None:
    expected_weights = nano_without_moge.expert.state_dict()

    for name, weight in converted.expert.state_dict().items():
        assert weight.equal(expected_weights[name]), name


def test_layers_for_states_and_actions_are_new(pi0: Path) -> None:
    report = plan_pi0(pi0, None, "nano").report

    new_layers = {entry.name.split(".")[0] for entry in report.select_by_status("new")}
    assert new_layers == {"vlm", "state_proj", "action_in_proj", "action_out_proj"}


class TestDepthEncoderOfOurOwn:
    """In place of a published MoGe, an encoder that `spear train nano-depth` has trained."""

    def test_its_weights_are_loaded(self, converted: Spear1ForActionPrediction) -> None:
        trained = weights.load(MogeForDepth, locate_checkpoint("nano-depth"), torch.float32).moge

        assert converted.vlm.moge is not None
        for name, weight in converted.vlm.moge.state_dict().items():
            assert weight.equal(trained.state_dict()[name]), name

    def test_its_head_is_reported_as_not_used(self, pi0: Path) -> None:
        report = plan_pi0(pi0, "nano-depth", "nano").report

        reasons = {entry.name: entry.note for entry in report.select_by_status("left out")}
        assert reasons["head.weight"] == "the head that predicts depth"

    def test_the_plan_can_run_twice(self, pi0: Path) -> None:
        plan = plan_pi0(pi0, "nano-depth", "nano")

        first = copy.deepcopy(plan.run().state_dict())

        for name, weight in plan.run().state_dict().items():
            assert weight.equal(first[name]), name

    def test_a_folder_of_another_model_is_refused(self) -> None:
        refuses("nano", open_depth_encoder, locate_checkpoint("nano"))
