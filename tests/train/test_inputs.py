"""What a training is given: refused in one line where it is missing, changes nothing, or is another run's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from data_tiny import make
from spear.cli import main
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.errors import SpearError
from spear.policy import locate
from spear.train import loop
from spear.train.inputs import check_inputs
from spear.train.optimize import Optimization
from spear.train.recipes import recipe
from spear.train.run import train
from train_tiny import Regression

FEW = {
    "steps": 1,
    "batch_size": 2,
    "flow_samples": 1,
    "warmup": 0,
    "workers": 0,
    "quiet": True,
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("nano-vla", "labels init", "learns from demonstrations: give --episodes"),
        ("nano-vlm-1", "labels init moge episodes", "leave --episodes out"),
        ("nano-vlm-1", "init moge", "needs --labels"),
        ("nano-vla", "episodes init", "needs --labels"),  # for the questions beside
        ("nano-post", "episodes", "needs --labels"),  # for the tokenizer of a model from random weights
        ("nano-depth", "labels init", "begins with random weights: leave --init out"),
        ("nano-siglip", "labels init", "begins with random weights: leave --init out"),
        ("nano-post", "episodes init moge", "takes no --moge"),
        ("nano-vlm-1", "labels moge", "without --init takes no --moge"),
    ],
)
def test_what_is_missing_or_would_change_nothing_is_named(name: str, given: str, words: str) -> None:
    there = {part: part in given.split() for part in ("labels", "episodes", "init", "moge")}
    with pytest.raises(SpearError, match=f"recipe {name} .*{words}"):
        check_inputs(recipe(name), **there)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", math.nan, "finite"),
        ("lr", math.inf, "finite"),
        ("lr", -1e-4, "at least 0"),
        ("lr_scale", {"vlm": -1.0}, "at least 0"),
        ("ema", 1.0, "less than 1"),
        ("betas", [0.9, 3], "less than 1"),
        ("weight_decay", -5, "at least 0"),
        ("grad_clip", 0, "more than 0"),
        ("augment", 7, "at most 1"),
        ("wrist", 5, "at most 1"),
        ("max_skipped", -1, "at least 0"),
        ("pairs", [4, 1], "the fewest come first"),
        ("pairs", [0, 1], "at least 1"),
        ("families", [], "at least one of"),
        ("families", ["keypont"], "did you mean 'keypoint'"),
        ("flow", {"rotation_weight": math.nan}, "finite"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(SpearError, match=words):
        recipe("nano-vla").changed(**{key: value})


def test_a_run_is_continued_only_by_the_same(tmp_path: Path) -> None:
    small = Optimization(steps=4, lr=1e-2, warmup=0)
    about = {"--init": "one", "preset": "nano"}
    loop.run(Regression(), small, tmp_path, seed=0, workers=0, quiet=True, about=about)
    for changed in ({"--init": "two"}, {"--init": None}, {"preset": "small"}):
        with pytest.raises(
            SpearError, match=f"another {next(iter(changed))} .*: use the same, or a new --out"
        ):
            loop.run(Regression(), small, tmp_path, 0, 0, quiet=True, about={**about, **changed})
    with pytest.raises(SpearError, match="of 4 steps already, more than 2"):
        loop.run(
            Regression(), Optimization(steps=2, lr=1e-2, warmup=0), tmp_path, 0, 0, quiet=True, about=about
        )
    longer = Optimization(steps=6, lr=1e-3, warmup=0)
    loop.run(Regression(), longer, tmp_path, 0, 0, quiet=True, about=about)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    folder = tmp_path_factory.mktemp("store")
    write_episodes([make(0), make(1)], folder)
    return EpisodeStore(folder)


def test_a_finished_folder_is_not_given_to_others(store: EpisodeStore, tmp_path: Path) -> None:
    """Other episodes, weights to begin with or settings in the same --out: refused, and nothing in it
    changes."""
    out, nano = tmp_path / "run", locate("nano")
    final = train("nano-post", out, None, [("one", store, 1.0)], nano, **FEW)
    (state,) = out.glob("checkpoints/*/state.json")
    about = json.loads(state.read_text())["settings"]["about"]
    assert about["--init"] and about["--labels"] is about["--moge"] is None  # none is told from some, too
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    half = store.subset([0])
    for changes, words in (
        ({"episodes": [("one", half, 1.0)]}, "another --episodes .*2 episodes.* not .*1 episodes"),
        ({"init": final}, "another --init"),
        ({"normalization": "minmax"}, "another normalization .quantile, not minmax"),
    ):
        given: dict[str, Any] = {"episodes": [("one", store, 1.0)], "init": nano, **FEW, **changes}
        with pytest.raises(SpearError, match=words):
            train("nano-post", out, None, **given)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    train("nano-post", out, None, [("one", store, 1.0)], nano, **{**FEW, "steps": 2, "lr": 1e-5})


def test_a_policy_that_would_see_nothing_is_not_trained(tmp_path: Path) -> None:
    import dataclasses

    episode = make(0)
    front = dataclasses.replace(episode, images={"front": episode.images["external"]})
    write_episodes([front], tmp_path / "store")
    with pytest.raises(SpearError, match="no camera external or wrist: it has front"):
        train(
            "nano-post",
            tmp_path / "run",
            None,
            [("mine", EpisodeStore(tmp_path / "store"), 1.0)],
            locate("nano"),
            **FEW,
        )


def test_a_model_of_another_size_is_not_taken_for_the_presets(store: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(SpearError, match="not of preset small: give the --preset that it was made with"):
        train("nano-post", tmp_path, None, [("one", store, 1.0)], locate("nano"), **FEW, preset="small")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_batch_is_one_line(workers: int, tmp_path: Path) -> None:
    class Broken(Regression):
        def batch(self, step: int) -> dict[str, Any]:
            raise SpearError("broken image: step 3: leave it out")

    with pytest.raises(SpearError) as caught:
        loop.run(Broken(), Optimization(steps=2, lr=1e-2), tmp_path, 0, workers, quiet=True)
    assert str(caught.value) == "broken image: step 3: leave it out"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--seed", "-1"], "--seed -1: give at least 0"),
        (["--nodes", "4"], "--launch slurm"),
        (["--split", "train[:0]"], "split 'train[:0]' is empty"),
        (["--weights", "0"], "--weights 0: give positive numbers"),
        (["--weights", "nan"], "--weights nan: give positive numbers"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: list[str], hint: str, store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--init", "nano", "--episodes", str(store.path), "--out", str(tmp_path / "run")]
    assert main(["train", "nano-post", *given, *words]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


def test_episodes_that_have_changed_are_not_taken_for_those_that_were_prepared(tmp_path: Path) -> None:
    from spear.data.store.lerobot_write import write_lerobot
    from spear.data.store.prepare import open_store

    source = tmp_path / "mine"
    write_lerobot([make(0), make(1)], source)
    assert len(open_store(source, tmp_path / "work")[0]) == 2
    assert len(open_store(source, tmp_path / "work")[0]) == 2  # as it is
    source.rename(tmp_path / "before")
    write_lerobot([make(0), make(1), make(2)], source)
    with pytest.raises(
        SpearError, match=r"prepared from other episodes.*mine or its layout may have changed"
    ):
        open_store(source, tmp_path / "work")
