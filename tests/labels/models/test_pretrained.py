"""Loading networks of Transformers: missing, broken and unsuitable models are refused."""

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


def load(model: str | Path, kind: str = "sam2") -> Any:
    """Load a model as SAM 2, or as a network of another kind."""
    return load_model(Sam2Model, kind, str(model), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a tiny SAM 2."""
    return save_sam2(tmp_path / "sam2")


# Four paths, a name that may be on the Hub, and text that is neither
@pytest.mark.parametrize(
    "model", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "nobody/nothing", "no name!"]
)
def test_a_model_that_does_not_exist_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    refuses(model, load, model)


def test_without_a_network_only_the_cache_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://nowhere.invalid")

    refuses(r"no/body.*sam2=FOLDER", load, "no/body")
    refuses(r"no/body.*a file", download_from_hub, "no/body", "a file", "model.pt")


def test_a_model_without_all_weights_is_refused(folder: Path) -> None:
    """Transformers itself would load it, with random numbers as the missing weights."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.startswith("mask_decoder"))
    del weights[name]
    save_file(weights, path, {"format": "pt"})

    refuses(rf"lacks 1 weight, the first is {name}", load, folder)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    refuses(r"a sam2 model, not a owlv2 model", load, folder, kind="owlv2")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\0" * 40),  # no valid header
        ("config.json", json.dumps({"model_type": "unheard-of"}).encode()),
    ],
)
def test_a_broken_folder_is_named(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)

    refuses(str(folder), load, folder)
