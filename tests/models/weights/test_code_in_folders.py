"""Python code in a model folder never runs, even if stdin answers yes to Transformers' question.

The code here creates a file when it runs, the marker. So the tests check that there is no such
file.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Sam2Model

from data_tiny import make_episode, write_store
from labels_tiny import save_grounding_dino, save_owlv2, save_sam2
from models_tiny import TINY
from published_checkpoints import make_paligemma, publish_paligemma
from refusals import refuses
from spear.labels.models.open_vocabulary import GroundingDinoDetector, Owlv2Detector
from spear.labels.models.pretrained import load_model
from spear.models.presets import PRESETS
from spear.models.weights.backbones import plan_backbones
from spear.models.weights.load import load_tokenizer
from spear.policy import Spear1Policy, load_vlm, locate_checkpoint
from train_tiny import run_recipe, save_policy

REFUSAL = "run Python code from its folder"  # part of the message
MODULE = "hostile_code"  # the name of the Python file in the folder
# The classes of Transformers that a config can replace by classes of its folder.
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoModelForZeroShotObjectDetection")


@pytest.fixture(autouse=True)
def stdin_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stdin answer yes to every question of Transformers."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that the code creates when it runs."""
    return tmp_path / "code-has-run"


@pytest.fixture
def nano_folder(tmp_path: Path) -> Path:
    """A copy of the weights nano, which the tests may change."""
    folder = tmp_path / "nano"
    shutil.copytree(locate_checkpoint("nano"), folder)
    return folder


def add_code(folder: Path, marker: Path) -> None:
    """Write a Python file that creates the marker when it is imported, and has a class `Evil`."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n"
    (folder / f"{MODULE}.py").write_text(code)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, or write a new one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def make_tokenizer_hostile(folder: Path, marker: Path) -> None:
    """Name a class of the folder as the tokenizer's class."""
    add_code(folder, marker)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": [f"{MODULE}.Evil", f"{MODULE}.Evil"]},
    )


def make_model_hostile(folder: Path, marker: Path, **changes: Any) -> None:
    """Name a class of the folder as the class of the config, the model and the processor."""
    add_code(folder, marker)
    auto_map = {name: f"{MODULE}.Evil" for name in AUTO_CLASSES}
    edit_json(folder / "config.json", auto_map=auto_map, **changes)
    edit_json(folder / "processor_config.json", auto_map=auto_map)


@pytest.mark.parametrize("load", [Spear1Policy.load, load_vlm])
def test_a_tokenizer_in_a_policy_runs_no_code(load: Any, nano_folder: Path, marker: Path) -> None:
    make_tokenizer_hostile(nano_folder, marker)

    refuses(REFUSAL, load, nano_folder)

    assert not marker.exists()


def test_a_network_in_a_policy_runs_no_code(nano_folder: Path, marker: Path) -> None:
    make_model_hostile(nano_folder, marker)

    # Loading succeeds, because Transformers takes the class that spear has registered.
    Spear1Policy.load(nano_folder)

    assert not marker.exists()


def test_a_policy_of_unknown_architecture_runs_no_code(nano_folder: Path, marker: Path) -> None:
    make_model_hostile(nano_folder, marker, model_type="evil")

    refuses("architecture", Spear1Policy.load, nano_folder)

    assert not marker.exists()


@pytest.mark.usefixtures("tiny_published_presets")
def test_a_tokenizer_in_a_paligemma_runs_no_code(tmp_path: Path, marker: Path) -> None:
    folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma", with_tokenizer=True)
    make_tokenizer_hostile(folder, marker)

    refuses(REFUSAL, plan_backbones, folder, moge=None, size="tiny14")

    assert not marker.exists()


def test_a_folder_with_a_tokenizer_alone_runs_no_code(tmp_path: Path, marker: Path) -> None:
    make_tokenizer_hostile(tmp_path, marker)

    refuses(REFUSAL, load_tokenizer, tmp_path)

    assert not marker.exists()


def test_training_from_a_folder_runs_no_code(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    store = write_store([make_episode(0)], tmp_path / "store")
    init = save_policy(tmp_path / "init")
    make_tokenizer_hostile(init, marker)

    def train() -> None:
        run_recipe("nano-post", tmp_path / "out", store=store, init=init, preset="tiny", steps=1)

    refuses(REFUSAL, train)

    assert not marker.exists()


@pytest.mark.parametrize(
    ("detector", "save"),
    [(GroundingDinoDetector, save_grounding_dino), (Owlv2Detector, save_owlv2)],
)
@pytest.mark.parametrize("make_hostile", [make_tokenizer_hostile, make_model_hostile])
def test_a_detector_runs_no_code(
    detector: Any, save: Any, make_hostile: Any, tmp_path: Path, marker: Path
) -> None:
    folder = save(tmp_path / "detector")
    make_hostile(folder, marker)

    # Loading succeeds, because Transformers takes its own classes.
    detector(str(folder), vocabulary=["cup"])

    assert not marker.exists()


@pytest.mark.parametrize("detector", [GroundingDinoDetector, Owlv2Detector])
def test_a_detector_of_unknown_architecture_runs_no_code(
    detector: Any, tmp_path: Path, marker: Path
) -> None:
    make_model_hostile(tmp_path, marker, model_type="evil")

    refuses(REFUSAL, detector, str(tmp_path), vocabulary=["cup"])

    assert not marker.exists()


def test_a_network_for_masks_runs_no_code(tmp_path: Path, marker: Path) -> None:
    folder = save_sam2(tmp_path / "sam2")
    make_model_hostile(folder, marker, model_type="evil")

    refuses(REFUSAL, load_model, Sam2Model, kind="sam2", model=str(folder), device="cpu")

    assert not marker.exists()
