"""`spear serve` and `spear evaluate` against a server: one clear line for bad input; the same outcomes as
here."""

from __future__ import annotations

import pytest

from serve_here import Homing, serving
from spear.cli import main
from spear.evaluate.agents import PolicyActor
from spear.evaluate.closed_loop import evaluate
from spear.serve.client import RemotePolicy


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["serve"], "CHECKPOINT"),
        (["serve", "nanno"], "no model 'nanno'"),
        (["serve", "nano", "--prot", "1"], "did you mean '--port'?"),
        (["serve", "nano", "--embodiment", "droit"], "did you mean 'droid'?"),
        (["serve", "nano", "--embodiment", "/nowhere.py"], "no such file"),
        (["serve", "nano", "--embodiment", "droid", "--control", "joints"], "did you mean 'joint_"),
        (["serve", "nano", "--queue", "0"], "give at least 1"),
        (["serve", "nano", "--token", ""], "--token (or SPEAR_TOKEN): empty"),
        (["serve", "nano", "--token", "geheim "], "spaces at its ends"),
        (["serve", "nano", "--token", "schlüssel"], "beyond ASCII"),
        (["serve", "nano", "--wait-ms", "-1"], "give 0 to 10000"),
        (["serve", "nano", "--device", "tpu9"], "unknown device 'tpu9'"),
        (["serve", "nano", "--port", "99999"], "choose another --port"),
        (["evaluate", "--policy", "ws://127.0.0.1:9"], "start one with `spear serve`"),
        (["evaluate", "--policy", "expert", "--execution", "later"], "sync"),
        (["evaluate", "--policy", "expert", "--latency-ms", "-5"], "give 0 or more"),
    ],
)
def test_mistakes_are_one_clear_line(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert hint in said


def test_a_token_that_is_set_but_empty_leaves_no_server_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPEAR_TOKEN", "")
    assert main(["serve", "nano"]) == 2
    assert "SPEAR_TOKEN): empty" in capsys.readouterr().err


def test_a_served_policy_does_as_it_does_here() -> None:
    small = {"scenes": 2, "image_size": (48, 32), "wrist_size": (24, 24), "quiet": True}
    here, _ = evaluate(PolicyActor(Homing(), "here"), ("put_on",), **small)
    with serving(robot="sim") as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        there, _ = evaluate(PolicyActor(remote, "there"), ("put_on",), **small)
        remote.close()
    assert here.outcomes == there.outcomes
