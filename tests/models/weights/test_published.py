"""The tensors that published files are expected to hold are those that the loaders take, all of
them."""

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
from spear.models.weights.published import PUBLISHED
from spear.util.network import is_hub_name


def stored(config: Any, tensors: dict[str, Any]) -> StoredCheckpoint:
    weights = {
        name: StoredTensor(Path("x"), tuple(shape), "BF16") for name, shape in tensors.items()
    }
    return StoredCheckpoint(Path("nowhere"), config.to_dict(), weights)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_paligemma(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, tensors = PUBLISHED[name], PUBLISHED[name].tensors()
    vision = {
        **PRESETS["spear1"].vision,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    width = known.config["hidden_size"]
    config = PaliGemmaConfig(
        vision_config=vision, text_config=dict(known.config), projection_dim=width
    )
    monkeypatch.setattr(StoredCheckpoint, "open", lambda *_: stored(config, tensors))
    report = backbones.plan_backbones("nowhere", None).report
    report.check("")
    assert len(report.with_status("loaded")) == len(tensors) and not report.with_status("left out")


def test_pi0(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        vlm = SpearVLMForConditionalGeneration(build_vlm_config(PRESETS["spear1"]))
    files = {
        "SPEAR-VLM": stored(
            vlm.config, {name: weight.shape for name, weight in vlm.state_dict().items()}
        ),
        "π0": stored(vlm.config, PUBLISHED["pi0"].tensors()),
    }
    monkeypatch.setattr(StoredCheckpoint, "open", lambda _, what: files[what])
    report = action_expert.plan_policy("a", "b").report
    report.check("")
    ends = {
        key.name for key in report.with_status("new")
    }  # states and actions have other sizes there
    assert ends == {
        f"{layer}.{part}" for layer in action_expert._ENDS for part in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["moge", "moge-2"])
def test_moge(name: str) -> None:
    known = PUBLISHED[name]
    weights = {name: torch.empty(shape, device="meta") for name, shape in known.tensors().items()}
    for constant, values in IMAGE_STATISTICS.items():
        prefix = "encoder." if name == "moge-2" else ""
        weights[prefix + constant] = torch.tensor(values)[None, :, None, None]
    build_moge(Checkpoint(Path("x"), weights, known.config, int(known.kind[-1])))


def test_the_published_files_are_known_by_revision_and_as_large_as_these_tensors() -> None:
    for known in PUBLISHED.values():
        assert is_hub_name(f"{known.repository}@{known.revision}") and len(known.revision) == 40
    numbers = {
        n: sum(map(math.prod, PUBLISHED[n].tensors().values()))
        for n in ("moge", "paligemma", "pi0")
    }
    assert 0 < 1_256_823_446 - 4 * numbers["moge"] < 2e5
    # π0 holds its VLM, whose vocabulary is 64 rows shorter, and a head of the expert that is not
    # read.
    assert (
        0
        < 14_005_618_584 - 4 * (numbers["paligemma"] - 64 * 2048 + numbers["pi0"] + 257_152 * 1024)
        < 2e5
    )
