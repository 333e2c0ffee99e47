"""Mistakes in a training are found before its data are prepared, and leave no files.

Preparing a dataset (`spear.data.store.prepare.prepare`) may take hours. The tests run the command
or call `check_inputs` and `Recipe.with_changes`, and look at what the error names.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from data_tiny import make_episode
from labels_boxes import make_labeled_image
from refusals import Command, refuses
from spear.data.store.episode_store import WeightedStore, append_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.labels.store import write_labels
from spear.policy import locate_checkpoint
from spear.train.options import TrainingInputs, check_inputs
from spear.train.recipes import get_recipe


def write_checkpoint(out: Path, seed: int = 0, pieces: int = 1) -> None:
    """Write the checkpoint's state of a run that has done one step."""
    folder = out / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    settings = {"seed": seed, "pieces": pieces, "about": {}}
    state = {"step": 1, "skipped": 0, "counts": {}, "settings": settings}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad inputs.

    mine        two episodes as a LeRobot dataset, which has to be prepared before a training.
    cut         the nano policy, with the second half of its weights cut off.
    empty       an empty folder.
    file        a file.
    labels      one labeled image.
    wrist       an episode without an external camera.
    of-seed-5, of-2-pieces  unfinished runs with another seed or another number of pieces.
    """
    root = tmp_path_factory.mktemp("folders")
    write_lerobot([make_episode(0), make_episode(1)], root / "mine")
    weights = shutil.copytree(locate_checkpoint("nano"), root / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (root / "empty").mkdir()
    (root / "file").touch()
    write_labels([make_labeled_image(0)], root / "labels" / "labels-00000.parquet")
    append_episodes(
        [make_episode(0, images={"wrist": make_episode(0).images["external"]})], root / "wrist"
    )
    write_checkpoint(root / "of-seed-5", seed=5)
    write_checkpoint(root / "of-2-pieces", pieces=2)
    return root


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


# Options of `spear train nano-post`, where {} is the fixture's folder, and what the error names.
@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param("--device cuda", "cuda", marks=no_gpu),
        ("--sampling-weights 1 2", "--sampling-weights"),
        ("--init {}/cut", "model.safetensors"),
        ("--init {}/of-seed-5", "not finished"),
        ("--init nano-depth", "nano-depth"),
        ("--init nano --preset small", "small"),
        ("--init-depth-encoder {}/cut", "--init-depth-encoder"),
        ("--labels {}/empty --set question_images=4", "empty"),
        ("--labels {}/file --set question_images=4", "--labels"),
        ("--set accumulate=3", "batch_size 32"),
        ('--set frozen=["vlm.moeg"]', "'vlm.moeg'"),
        ('--set frozen=["vlm"] trained=["vlm"]', "nothing learns"),
        ('--set flow={"rotatoin":1}', "'rotation'"),
        ('--set flow={"rotation":"linear"}', "recipe key flow"),
        ('--set flow={"time_alpha":-1}', "time_alpha"),
        ('--set flow={"geodesic_step":0.1}', "geodesic_step"),
        ("--set committed=5", "committed"),
        ("--set normalization=bounds", "bounds_m"),
        ("--set bounds_m=[0.1,0.1,0.1]", "bounds_m"),
        ("--set action_reference=observd", "observed"),
        ("--set bins=9", "bins"),
        ("--set moge=false", "MoGe"),
        ("--set precision=fp32 frozen_precision=bf16", "frozen_precision"),
        ("--split trian", "trian"),
        ("--split train[5:]", "train[5:]"),
        ("--episodes {}/mine {}/missing", "missing"),
        ("--out {}/file/run", "file"),
        ("--out {}/labels", "contains other files"),
        ("--episodes {}/wrist", "no camera external"),
        ("--out {}/of-seed-5", "seed"),
        ("--out {}/of-2-pieces --steps 0", "1 step,"),
    ],
)
def test_mistakes_are_found_before_data_are_made(
    words: str,
    named: str,
    folders: Path,
    tmp_path: Path,
    run_refused_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    too_late = Mock(side_effect=AssertionError("too late"))
    monkeypatch.setattr("spear.data.store.prepare.prepare", too_late)
    arguments = ["train", "nano-post", *words.replace("{}", str(folders)).split()]
    defaults = {
        "--init": "nano",
        "--episodes": str(folders / "mine"),
        "--out": str(tmp_path / "run"),
    }
    for option, value in defaults.items():
        if option not in arguments:
            arguments += [option, value]

    message = run_refused_command(arguments)

    assert named in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "printed"), [("0", "trained: runs/final\n"), ("1", "")])
def test_only_the_first_process_says_that_the_training_is_done(
    rank: str, printed: str, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_episodes([make_episode(0)], tmp_path / "store")
    monkeypatch.setattr("spear.train.run.train", lambda *_: "runs/final")
    monkeypatch.setenv("RANK", rank)

    output = run_command(
        "train", "nano-post", "--init", "nano", "--episodes", str(tmp_path / "store")
    )

    assert output == printed


@pytest.fixture
def run_refused_vlm(tmp_path: Path, run_refused_command: Command) -> Callable[[str], str]:
    """A function that runs `spear train WORDS --labels …`, which must be refused.

    It returns the error.
    """
    labels = tmp_path / "labels"
    write_labels([make_labeled_image(0)], labels / "labels-00000.parquet")
    return lambda words: run_refused_command("train", words.split(), "--labels", str(labels))


# Without MoGe, the factor on its learning rate in `lr_scale` of nano-vlm-2 would be refused, too.
@pytest.mark.parametrize("recipe", ["nano-vlm-0", "nano-vlm-2 --set moge=false lr_scale={}"])
def test_a_recipe_without_moge_does_not_begin_with_a_vlm_that_has_it(
    recipe: str, run_refused_vlm: Callable[[str], str]
) -> None:
    assert "MoGe" in run_refused_vlm(f"{recipe} --init nano")


def test_a_second_moge_is_refused(run_refused_vlm: Callable[[str], str]) -> None:
    assert "--init-depth-encoder" in run_refused_vlm(
        "nano-vlm-2 --init nano --init-depth-encoder nano-depth"
    )


def test_a_broken_origin_of_weights_is_found_before_it_is_needed(
    run_refused_vlm: Callable[[str], str], tmp_path: Path
) -> None:
    """The result would record the origin of the depth encoder, which its recipe.json says."""
    depth = shutil.copytree(locate_checkpoint("nano-depth"), tmp_path / "depth")
    (depth / "recipe.json").write_text('{"learned": 3}')

    assert "recipe.json" in run_refused_vlm(
        f"nano-vlm-1 --init nano-vlm-0 --init-depth-encoder {depth}"
    )


@pytest.mark.parametrize(
    "words",
    [
        "--policy nowhere --episodes {}",
        "--policy nano --episodes {} --split nowhere",
        "--policy nano --episodes {} --train-split nowhere",
    ],
)
def test_evaluation_finds_unknown_names_before_data_are_made(
    words: str, folders: Path, run_refused_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Preparing data would call None, which is another error than the expected one.
    monkeypatch.setattr("spear.data.store.prepare.prepare", None)

    arguments = words.format(folders / "mine").split()
    assert "nowhere" in run_refused_command("evaluate", "data", arguments)


def test_evaluation_refuses_episodes_that_were_trained_on(
    folders: Path, run_refused_command: Command
) -> None:
    data = folders / "mine"
    words = f"evaluate data --policy nano --episodes {data} --split train[:1] --train-split train"

    assert "--train-split train. " in run_refused_command(words.split())


# A recipe, the inputs that are given, and the option that is missing or has no effect.
@pytest.mark.parametrize(
    ("name", "inputs", "option"),
    [
        ("nano-vla", "labels init", "--episodes"),
        ("nano-vlm-1", "labels init init_depth_encoder episodes", "--episodes"),
        ("nano-vlm-1", "init init_depth_encoder", "--labels"),
        ("nano-vla", "episodes init", "--labels"),  # for its questions
        ("nano-post", "episodes", "--init .*--labels"),  # for the tokenizer of a new model
        ("nano-post", "episodes init labels", "--labels"),
        ("nano-vlm-1", "labels init_depth_encoder", "--init-depth-encoder"),
    ],
)
def test_inputs_that_are_missing_or_without_effect_are_named(
    name: str, inputs: str, option: str
) -> None:
    values: dict[str, Any] = {word: Path(word) for word in inputs.split()}
    if "episodes" in values:
        values["episodes"] = [WeightedStore("mine", Mock(), weight=1.0)]

    words = f"recipe {name} .*{option}"
    refuses(words, check_inputs, get_recipe(name), TrainingInputs(**values))


# A recipe and changes, the first of which has no effect in it.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nano-depth", "lora_rank=4"),
        ("nano-depth", "bins=9"),
        ("nano-depth", "augment=1"),
        ("nano-vlm-2", "normalization=minmax"),
        ("nano-vlm-2", "committed=2"),
        ("nano-post", "coordinate_rows_only=true"),
        ("nano-post", "wrist=0.5"),
        ("nano-post", "question_weight=2"),
        ("nano-post", "coordinate_weight=4"),
        ("nano-post", "lora_alpha=32"),
        ("nano-post", "final_lr=0.1 schedule=constant"),  # the second makes the first ineffective
        ("nano-post", 'lr_scale={"vlm.moge.layers":2} frozen=["vlm.moge"]'),
        ("nano-post", 'lr_scale={"vlm.moge":2} lora_rank=4 frozen=["vlm"]'),
    ],
)
def test_keys_that_a_recipe_does_not_use_are_refused(
    name: str, changes: str, run_refused_command: Command
) -> None:
    inputs = "--init nano --episodes mine" if name == "nano-post" else "--labels labels"

    message = run_refused_command("train", name, inputs.split(), "--set", changes.split())

    first_change = changes.split()[0]
    assert f"--set {first_change} has no effect, because recipe {name}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", -1e-4),
        ("lr", True),
        ("lr", "fast"),
        ("steps", -1),
        ("steps", 2.5),
        ("lr_scale", {"vlm": -1.0}),
        ("ema", 1.0),
        ("betas", [0.9, 3]),
        ("betas", [0.9]),
        ("grad_clip", 0),
        ("augment", 7),
        ("augment", None),
        ("bins", 1),
        ("frozen", "vlm"),
        ("precision", "bf61"),
        ("spacing", "unifrom"),
        ("pairs", [4, 1]),
        ("pairs", [0, 1]),
        ("families", []),
        ("flow", {"rotation_weight": math.nan}),
        ("lora_rank", -1),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(key: str, value: Any) -> None:
    refuses(key, get_recipe("nano-vla").with_changes, **{key: value})


def test_values_may_be_as_json_has_them() -> None:
    """JSON has lists instead of tuples, and may have whole numbers for floats."""
    recipe = get_recipe("nano-vla").with_changes(
        frozen=["vlm.moge"], betas=[0.5, 0.9], lr=1, pairs=[2, 2]
    )

    assert recipe.optimization.lr == 1
    assert recipe.questions.pairs == [2, 2]
