import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Sam2Model

from labels_tiny import save_sam2
from refusals import refuses
from spear.labels.models.pretrained import load_model
from spear.models.weights.load import download_from_hub


def load(model: str | Path, **changes: Any) -> Any:
    return load_model(Sam2Model, model=str(model), **{"kind": "sam2", "device": "cpu", **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_sam2(tmp_path / "sam2")


@pytest.mark.parametrize(
    "model", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "nobody/nothing", "no name!"]
)
def test_a_model_that_is_not_there_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(model, load, model)


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://nowhere.invalid")
    refuses(r"no/body.*sam2=FOLDER", load, "no/body")
    refuses(r"no/body.*a file", download_from_hub, "no/body", "a file", "model.pt")


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.startswith("mask_decoder"))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    refuses(rf"lacks 1 weight, the first is {name}", load, folder)


def test_another_kind_and_broken_folders_are_said(folder: Path) -> None:
    refuses(r"a sam2 model, not a owlv2 model", load, folder, kind="owlv2")
    (folder / "model.safetensors").write_bytes(b"\0" * 40)
    refuses(str(folder), load, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    refuses(str(folder), load, folder)
