"""Outcomes on disk as they come: interrupted runs go on, shards come together, nothing mixes by mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear.cli import main
from spear.errors import SpearError
from spear.evaluate.journal import Journal, Shard, load, missing_parts
from spear.evaluate.load import fingerprint
from spear.evaluate.results import Outcome, Results, merge
from spear.types import Array


def outcome(seed: int, success: bool = True, family: str = "a") -> Outcome:
    return Outcome(family, seed, "go", success, True, success, False, 0, 10)


def test_a_line_cut_short_is_run_again_and_the_others_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "me", {"replan": 5}, Shard())
    for seed in (2, 0, 1):
        journal.add(outcome(seed), 1.5)
    path = tmp_path / "episodes-1-of-1.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 2):
        path.write_bytes(whole[:-cut])
        again = Journal(tmp_path, "me", {"replan": 5}, Shard())
        assert sorted(seed for _, seed in again.done) == [0, 2]
    again.add(outcome(1), 1.5)
    assert path.read_bytes() == whole
    assert load(tmp_path) == Results("me", {"replan": 5}, [outcome(0), outcome(1), outcome(2)], 4.5)


def test_a_head_cut_short_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "episodes-1-of-1.jsonl").write_bytes(b'{"pol')
    Journal(tmp_path, "me", {}, Shard()).add(outcome(0), 1.0)
    assert load(tmp_path).outcomes == [outcome(0)]


def test_results_of_another_policy_or_settings_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "me", {"replan": 5, "weights": "x"}, Shard()).add(outcome(0), 1.0)
    for policy, settings, hint in (
        ("you", {"replan": 5, "weights": "x"}, "me, not you"),
        ("me", {"replan": 2, "weights": "x"}, "replan 5, not 2"),
        ("me", {"replan": 5, "weights": "y"}, "other weights"),
    ):
        with pytest.raises(SpearError, match=f"{hint}.*another --out"):
            Journal(tmp_path, policy, settings, Shard(2, 2))
    (tmp_path / "episodes-2-of-2.jsonl").write_text("nonsense\n")
    with pytest.raises(SpearError, match="not a journal"):
        load(tmp_path)


def test_shards_come_together_and_contradictions_are_refused() -> None:
    one, two = (Results("me", {"r": 1}, [outcome(s) for s in seeds], 1.0) for seeds in ((2, 0), (1, 0)))
    assert [o.seed for o in merge([one, two]).outcomes] == [0, 1, 2]
    with pytest.raises(SpearError, match="different r:"):
        merge([one, replace(two, settings={"r": 2})])
    with pytest.raises(SpearError, match="compare them"):
        merge([one, replace(two, policy="you")])
    with pytest.raises(SpearError, match="scene 0 ended differently"):
        merge([one, replace(two, outcomes=[outcome(0, success=False)])])


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_shard_is_k_of_n(text: str) -> None:
    with pytest.raises(SpearError, match="2/5"):
        Shard.parse(text)
    assert Shard.parse("2/5") == Shard(2, 5)


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert fingerprint(tmp_path) != first


def test_an_interrupted_sharded_evaluation_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    from spear.evaluate.agents import ExpertActor
    from spear.evaluate.closed_loop import evaluate

    class Stopped(ExpertActor):
        """The expert in even scenes, idle in odd ones; Ctrl-C after so many steps."""

        def __init__(self, steps: int) -> None:
            self.steps = steps
            self.scenes: set[int] = set()

        def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
            from spear.evaluate.agents import NOTHING

            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt
            self.scenes |= {e.world.spec.seed for e in envs}
            acted = super().act(envs, observations)
            return [
                a if e.world.spec.seed % 2 == 0 else NOTHING[None] for a, e in zip(acted, envs, strict=True)
            ]

    whole, _ = evaluate(Stopped(10**6), ("put_on",), scenes=4, quiet=True)
    common: dict[str, Any] = {
        "families": ("put_on",),
        "scenes": 4,
        "batch": 1,
        "quiet": True,
        "out": tmp_path,
    }
    first = Stopped(whole.outcomes[0].steps + 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, **common, shard=Shard(1, 2))
    assert load(tmp_path).outcomes == whole.outcomes[:1]
    second = Stopped(10**6)
    evaluate(second, **common, shard=Shard(1, 2))
    assert second.scenes == {2}  # scene 0 was done
    evaluate(Stopped(10**6), **common, shard=Shard(2, 2))
    assert load(tmp_path).outcomes == whole.outcomes


def test_parts_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (1, 3):
        journal = Journal(tmp_path / f"part-{index}", "me", {}, Shard(index, 3))
        journal.add(outcome(index - 1), 1.0)
    parts = [str(tmp_path / f"part-{index}") for index in (1, 3)]
    assert main(["evaluate", "merge", *parts, "--out", str(tmp_path / "all")]) == 0
    said = capsys.readouterr().err
    assert said == "note: not all of the evaluation: part 2/3 is in none of these folders\n"
    assert missing_parts([tmp_path / "part-1"]) == ["2/3", "3/3"]
    Journal(tmp_path / "part-1", "me", {}, Shard(2, 3)).add(outcome(1), 1.0)
    assert missing_parts([tmp_path / "part-1", tmp_path / "part-3", tmp_path / "all"]) == []


def test_a_part_without_scenes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    argv = ["evaluate", "--policy", "expert", "--scenes", "1", "--shard", "2/2", "--films", "0"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "--shard 2/2: holds no scene, as there are only 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seeds in (("one", (0, 2)), ("two", (1, 3))):
        journal = Journal(tmp_path / name, "me", {"replan": 5}, Shard())
        for seed in seeds:
            journal.add(outcome(seed, success=seed < 3), 1.0)
        (tmp_path / name / f"a-success-{seeds[0]}.mp4").write_bytes(b"film")
    out = tmp_path / "all"
    assert main(["evaluate", "merge", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]) == 0
    assert "75%" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["a-success-0.mp4", "a-success-1.mp4", "results.json"]
    assert len(load(out).outcomes) == 4
    assert main(["evaluate", "merge", str(out), str(tmp_path / "two"), "--out", str(tmp_path / "one")]) == 2
    assert "holds an evaluation of its own" in capsys.readouterr().err
    assert len(load(tmp_path / "one").outcomes) == 2
    (tmp_path / "data" / "meta").mkdir(parents=True)
    assert main(["evaluate", "merge", str(out), "--out", str(tmp_path / "data")]) == 2
    assert "holds other files: merge into a folder of its own" in capsys.readouterr().err
    assert main(["evaluate", "merge", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--policy", "expert", "--films", "some"]) == 2
    assert "--films some" in capsys.readouterr().err
