"""The command `spear label`, with photos, scenes of the simulator and RGB-D folders."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from labels_scenes import make_random_frame
from labels_stand_ins import BoxSegmenter, BrightDetector, SlopePointMap, write_photos
from refusals import Command
from rgbd_folders import write_scannet
from spear.cli import main
from spear.doctor import MachineSpeed
from spear.labels import model_factories
from spear.labels.fit.accuracy import compare_labels
from spear.labels.models import resources
from spear.labels.questions.store import read_questions
from spear.labels.store import read_labels

TRUE_MASKS_AND_DEPTH = ["--segmenter", "ground-truth", "--pointmap", "ground-truth"]
GROUND_TRUTH = ["--detector", "ground-truth", *TRUE_MASKS_AND_DEPTH]


@pytest.fixture(scope="module")
def scene_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the labels of two scenes, and questions about them."""
    pytest.importorskip("mujoco")
    out = tmp_path_factory.mktemp("scenes") / "labels"
    assert main(["label", "sim:3-4", *make_scene_options(out)]) == 0
    return out


def make_scene_options(out: Path) -> list[str]:
    """Return the options that label scenes from their ground truth in the folder `out`."""
    return ["--out", str(out), "--workers", "0", "--questions", *GROUND_TRUTH]


def test_scenes_are_labeled_and_the_folder_says_from_what(scene_labels: Path) -> None:
    labels = list(read_labels(scene_labels))

    assert [label.source for label in labels] == ["sim:3", "sim:4"]
    assert labels[0].objects
    run = json.loads((scene_labels / "run.json").read_text())
    assert run["inputs"] == ["sim:3-4"]
    assert run["pointmap"] == "ground-truth"


def test_questions_are_asked_about_the_labeled_scenes(scene_labels: Path) -> None:
    sources = {source for source, _ in read_questions(scene_labels)}

    assert sources  # there are questions
    assert sources <= {"sim:3", "sim:4"}


def test_the_same_command_finds_its_labels_finished(
    scene_labels: Path, run_command: Command
) -> None:
    output = run_command("label", "sim:3-4", make_scene_options(scene_labels))

    for words in ("2 labeled images", "0 skipped", "questions about"):
        assert words in output


def test_a_folder_with_labels_of_other_inputs_is_refused(
    scene_labels: Path, run_refused_command: Command
) -> None:
    output = run_refused_command("label", "sim:3-5", make_scene_options(scene_labels))

    assert "PHOTOS is" in output  # the error names the argument that differs


def test_labels_are_shown_with_point_clouds(
    scene_labels: Path, tmp_path: Path, run_command: Command
) -> None:
    pytest.importorskip("rerun")
    recording = tmp_path / "x.rrd"

    run_command("label", "show", str(scene_labels), "--save-rerun", str(recording))

    assert recording.stat().st_size > 500_000  # the clouds are in it


@pytest.mark.parametrize(
    ("words", "hint"),  # the words after "spear label"; what the error says, among other words
    [
        ("photos --pointmap ground-truth", "rgbd:FOLDER"),
        ("photos --detector file:bad.json", "bad.json"),
        ("photos --detector owlv2 --vocabulary mug", "owlv2=PATH"),
        ("photos --detector owlv2", "--vocabulary"),
        ("photos", "--detector owlv2"),
        ("sim:5-2", "sim:2-5"),
        ("photos --fps 0", "--fps"),
        ("photos --engine ray --replicas 0 1 1", "--replicas"),
        ("photos --gpus 0 -1 0", "--gpus"),
        ("photos --gpus 1 1 1", "--gpus"),
        ("photos --engine ray", "--workers"),
        ("photos --detector file:bad.json --vocabulary mug", "--vocabulary"),
        (
            "photos --detector owlv2 --vocabulary mug --requests-per-minute 9",
            "--requests-per-minute",
        ),
        ("--num-scenes 2 --engine ray", "--engine"),
        ("simpler:10000 --detector owlv2", "--detector"),
        ("simpler:10000 --suites libero_object", "--suites"),
        ("--num-scenes 2 --retry-skipped", "--retry-skipped"),
        ("photos --seed 3", "--questions"),
        ("photos --detector gemni", "Did you mean 'gemini'"),
        ("photos --detector file:absent.json", "names no existing file. Write file:PATH"),
        ("photos --detector ground-truth+gemini", "only file:PATH"),
        ("photos --segmenter ground-truth=foo", "names weights"),
    ],
)
def test_what_cannot_be_labeled_is_refused_with_a_way_out_and_leaves_nothing(
    words: str,
    hint: str,
    tmp_path: Path,
    run_refused_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # Without keys and network, so that neither Gemini nor the Hub is asked.
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_photos(tmp_path / "photos", 2, bad=False)
    (tmp_path / "bad.json").write_text("{}")
    files = set(tmp_path.iterdir())

    message = run_refused_command("label", words.split(), "--workers", "0")

    assert hint in message
    assert set(tmp_path.iterdir()) == files


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that plans to label three photos, two at a time.

    The speed of the machine is given, so that it is not measured.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    speed = MachineSpeed(bytes_per_s=1e10, flops_per_s=1e11)
    monkeypatch.setattr("spear.doctor.measure_machine", lambda *_: speed)
    folder = write_photos(tmp_path / "photos", 3, bad=False)
    out = str(tmp_path / "out")
    return ["label", str(folder), "--batch-size", "2", "--out", out, "--dry-run"]


def test_a_plan_says_what_labeling_costs_and_labels_nothing(
    plan: list[str], tmp_path: Path, run_command: Command
) -> None:
    output = run_command(plan, "--segmenter", "sam2=somebody/else", "--pointmap", "moge")

    assert output.startswith("3 images, 2 at a time, longer side 840 pixels;")
    assert "314 M parameters, 1.17 GiB" in output  # MoGe
    assert "sam2            not known before it is loaded: somebody/else" in output  # its cost
    assert "tokens in" in output  # Gemini, the detector by default
    moge = resources.estimate_resources("moge", batch_size=2, width_px=840, num_vocabulary_names=8)
    assert f"activations {moge.activations / 2**30:.2f} GiB" in output
    assert not (tmp_path / "out").exists()


def test_planned_operations_are_those_of_the_encoder_and_a_head() -> None:
    """MoGe's encoder is a ViT-L, and its head needs less than half as many operations."""
    num_tokens = 2500
    num_layers = 24
    width = 1024
    matrix_flops = 24 * num_tokens * width**2  # two for each of the layer's 12 width² weights
    # Two products, of queries with keys and of attention with values, of num_tokens² · width each.
    attention_flops = 4 * num_tokens**2 * width
    encoder_flops = num_layers * (matrix_flops + attention_flops)

    moge = resources.estimate_resources("moge", batch_size=2, width_px=840, num_vocabulary_names=8)

    assert 1.1 * encoder_flops < moge.flops
    assert moge.flops < 1.5 * encoder_flops


def test_a_plan_needs_depth(plan: list[str], run_refused_command: Command) -> None:
    """Photos have no true masks and depth."""
    assert run_refused_command(plan, "--detector", "grounding-dino", TRUE_MASKS_AND_DEPTH)


class BillingDetector(BrightDetector):
    """A detector that is paid for."""

    def describe_costs_so_far(self) -> str:
        return "3 requests"


@pytest.fixture
def label_with_gemini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that labels three photos with stand-ins for all models; returns the exit code.

    Its arguments are the ending of the names of photos for which Gemini cannot be reached, and the
    value of --detector.
    """
    folder = write_photos(tmp_path / "photos", 3, bad=False)

    def label(unreached: str, detector: str) -> int:
        makers: dict[str, Any] = {
            "gemini:GeminiDetector": partial(BillingDetector, unreached=(unreached,)),
            "sam2:Sam2Segmenter": BoxSegmenter,
            "pointmap:load_point_map_model": SlopePointMap,
        }
        monkeypatch.setattr(
            model_factories, "_make_model", lambda entry, *_: makers[entry.location]()
        )
        out = str(tmp_path / "labels")
        return main(["label", str(folder), "--out", out, "--workers", "0", "--detector", detector])

    return label


# Names of photos end in ".png", and none ends in "none". So Gemini is reached for all or no photos.
@pytest.mark.parametrize(("unreached", "exit_code"), [("none", 0), (".png", 2)])
def test_the_bill_is_printed_however_the_work_ends(
    unreached: str,
    exit_code: int,
    label_with_gemini: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert label_with_gemini(unreached=unreached, detector="gemini") == exit_code

    assert "3 requests" in capsys.readouterr().out  # the bill of `BillingDetector`


def test_the_bill_is_printed_where_gemini_completes_a_file(
    label_with_gemini: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = tmp_path / "boxes.json"  # has no photo, so that Gemini finds the objects in all of them
    boxes.write_text('{"images": [], "annotations": [], "categories": []}')

    assert label_with_gemini(unreached="none", detector=f"file:{boxes}+gemini") == 0

    assert "3 requests" in capsys.readouterr().out


def test_a_broken_frame_is_skipped_and_labeled_when_it_is_mended(
    tmp_path: Path, run_command: Command
) -> None:
    """An RGB-D folder has three frames; the depth image of the first one is truncated."""
    frames = [
        make_random_frame(np.random.default_rng(seed), width=96, height=64) for seed in (0, 0, 1)
    ]
    folder = write_scannet(tmp_path / "scan", frames)
    out = tmp_path / "labels"
    depth = folder / "depth" / "0.png"
    depth.write_bytes(depth.read_bytes()[:100])
    command = ("label", f"rgbd:{folder}", "--out", str(out), "--workers", "0", *GROUND_TRUTH)

    assert "2 labeled images" in run_command(command)

    (skipped,) = pq.read_table(out / "skipped.parquet").to_pylist()
    assert skipped["source"] == str(folder / "color" / "0.png")
    labels = list(read_labels(out))
    expected_sources = [str(folder / f"color/{number}.png") for number in (1, 2)]
    assert [label.source for label in labels] == expected_sources
    # The folder has one list of names for all frames, in which later frames overwrite names.
    true_frames = [replace(frame, names=frames[2].names) for frame in frames[1:]]
    assert compare_labels(labels, true_frames).center < 0.005  # meters

    depth.write_bytes((folder / "depth" / "1.png").read_bytes())
    assert "3 labeled images" in run_command(command)
