"""What is wrong with a training is found before its data are made, by all commands, and leaves nothing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from data_tiny import make
from labels_boxes import labelled
from refusals import Command, refuses
from spear.data.store.episode_store import write_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.labels.store import write_labels
from spear.policy import locate
from spear.train.options import TrainingInputs, check_inputs
from spear.train.recipes import get_recipe


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine` must be prepared before it can be learned from; `cut` is nano with half of its weights."""
    root = tmp_path_factory.mktemp("given")
    write_lerobot([make(0), make(1)], root / "mine")
    weights = shutil.copytree(locate("nano"), root / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (root / "empty").mkdir()
    (root / "file").touch()
    write_labels([labelled(0)], root / "labels" / "labels-00000.parquet")
    write_episodes([make(0, images={"wrist": make(0).images["external"]})], root / "wrist")
    state = {
        "step": 1,
        "skipped": 0,
        "counts": {},
        "settings": {"seed": 5, "pieces": 1, "about": {}},
    }
    for name, settings in (("of-seed-5", {}), ("of-2-pieces", {"seed": 0, "pieces": 2})):
        begun = root / name / "checkpoints" / "step-00000001"
        begun.mkdir(parents=True)
        (begun / "state.json").write_text(
            json.dumps(state | {"settings": state["settings"] | settings})
        )
    return root


@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param(
            "--device cuda",
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one"),
        ),
        ("--shares 1 2", "--shares"),
        ("--init {}/cut", "model.safetensors"),
        ("--init {}/of-seed-5", "not finished"),
        ("--init nano-depth", "nano-depth"),
        ("--init nano --preset small", "small"),
        ("--moge {}/cut", "--moge"),
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
        ("--set bins=9", "bins"),
        ("--set moge=false", "MoGe"),
        ("--set precision=fp32 frozen_precision=bf16", "frozen_precision"),
        ("--split trian", "trian"),
        ("--split train[5:]", "train[5:]"),
        ("--episodes {}/mine {}/missing", "missing"),
        ("--out {}/file/run", "file"),
        ("--out {}/labels", "holds other files"),
        ("--episodes {}/wrist", "no camera external"),
        ("--out {}/of-seed-5", "seed"),
        ("--out {}/of-2-pieces --steps 0", "1 step,"),
    ],
)
def test_mistakes_are_found_before_data_are_made(
    words: str,
    named: str,
    given: Path,
    tmp_path: Path,
    refused: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "spear.data.store.prepare.prepare", Mock(side_effect=AssertionError("too late"))
    )
    told = words.replace("{}", str(given)).split()
    usual = {"--init": "nano", "--episodes": str(given / "mine"), "--out": str(tmp_path / "run")}
    more = [word for pair in usual.items() if pair[0] not in told for word in pair]
    assert named in refused("train", "nano-post", *told, *more) and not (tmp_path / "run").exists()


def test_the_first_process_says_that_it_is_done(
    tmp_path: Path, done: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_episodes([make(0)], tmp_path / "store")
    monkeypatch.setattr("spear.train.run.train", lambda *_: "it")
    for rank, said in (("0", "trained: it\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert (
            done("train", "nano-post", "--init", "nano", "--episodes", str(tmp_path / "store"))
            == said
        )


def test_a_vlm_with_moge_is_no_beginning_without(tmp_path: Path, refused: Command) -> None:
    write_labels([labelled(0)], tmp_path / "labels-00000.parquet")
    for words in ("nano-vlm-0", "nano-vlm-2 --set moge=false lr_scale={}"):
        assert "MoGe" in refused(
            "train", *words.split(), "--init", "nano", "--labels", str(tmp_path)
        )
    twice = "nano-vlm-2", "--init", "nano", "--labels", str(tmp_path), "--moge", "nano-depth"
    assert "--moge" in refused("train", *twice)
    depth = shutil.copytree(locate("nano-depth"), tmp_path / "depth")
    (depth / "recipe.json").write_text('{"learned": 3}')  # read again at the end
    broken = "nano-vlm-1", "--init", "nano-vlm-0", "--labels", str(tmp_path), "--moge", str(depth)
    assert "recipe.json" in refused("train", *broken)


def test_evaluation_asks_first(
    given: Path, tmp_path: Path, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spear.data.store.prepare.prepare", None)
    for words in (
        ["nowhere"],
        ["nano", "--split", "nowhere"],
        ["nano", "--train-split", "nowhere"],
    ):
        assert "nowhere" in refused("evaluate", "data", words[0], str(given / "mine"), *words[1:])
    same = "nano", str(given / "mine"), "--split", "train[:1]", "--train-split", "train"
    assert "--train-split train: " in refused("evaluate", "data", *same)


@pytest.mark.parametrize(
    ("name", "given", "key"),
    [
        ("nano-vla", "labels init", "--episodes"),
        ("nano-vlm-1", "labels init moge episodes", "--episodes"),
        ("nano-vlm-1", "init moge", "--labels"),
        ("nano-vla", "episodes init", "--labels"),  # for the questions beside
        (
            "nano-post",
            "episodes",
            "--init .*--labels",
        ),  # for the tokenizer of a model from random weights
        ("nano-depth", "labels init", "--init"),
        ("nano-post", "episodes init labels", "--labels"),
        ("nano-vlm-1", "labels moge", "--moge"),
    ],
)
def test_what_is_missing_or_would_change_nothing_is_named(name: str, given: str, key: str) -> None:
    words: dict[str, Any] = {word: Path(word) for word in given.split() if word != "episodes"}
    if "episodes" in given:
        words["episodes"] = [("mine", None, 1.0)]
    refuses(f"recipe {name} .*{key}", check_inputs, get_recipe(name), TrainingInputs(**words))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *(("nano-depth", key) for key in ("lora_rank=4", "bins=9", "augment=1")),
        *(("nano-vlm-2", key) for key in ("normalization=minmax", "committed=2")),
        *(
            ("nano-post", key)
            for key in ("coordinate_rows_only=true", "wrist=0.5", "question_weight=2")
        ),
        *(("nano-post", key) for key in ("coordinate_weight=4", "lora_alpha=32")),
        ("nano-post", "final_lr=0.1 schedule=constant"),  # others leave the first without effect
        ("nano-post", 'lr_scale={"vlm.moge.layers":2} frozen=["vlm.moge"]'),
        ("nano-post", 'lr_scale={"vlm.moge":2} lora_rank=4 frozen=["vlm"]'),
    ],
)
def test_keys_that_a_recipe_does_not_use_are_refused(
    name: str, keys: str, refused: Command
) -> None:
    given = "--init nano --episodes mine" if name == "nano-post" else "--labels labels"
    said = refused("train", name, *given.split(), "--set", *keys.split())
    assert f"--set {keys.split()[0]}: recipe {name}" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", bad) for bad in (math.nan, math.inf, -1e-4, True, "fast")),
        *(("steps", bad) for bad in (-1, 2.5)),
        ("lr_scale", {"vlm": -1.0}),
        ("ema", 1.0),
        *(("betas", bad) for bad in ([0.9, 3], [0.9])),
        *(("grad_clip", 0), ("augment", 7), ("bins", 1), ("frozen", "vlm")),
        *(("precision", "bf61"), ("spacing", "unifrom")),
        *(("pairs", bad) for bad in ([4, 1], [0, 1])),
        ("families", []),
        ("flow", {"rotation_weight": math.nan}),
        *(("lora_rank", -1), ("augment", None)),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(key: str, value: Any) -> None:
    refuses(key, get_recipe("nano-vla").with_changes, **{key: value})


def test_values_are_taken_as_json_has_them() -> None:
    stage = get_recipe("nano-vla").with_changes(
        frozen=["vlm.moge"], betas=[0.5, 0.9], lr=1, pairs=[2, 2]
    )
    assert stage.optimization.lr == 1 and stage.questions.pairs == [2, 2]
