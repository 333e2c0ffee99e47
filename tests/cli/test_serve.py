"""`spear serve`, `spear vla-eval` and `spear evaluate` against a server: one line for bad input; a served
policy does as it does here."""

from __future__ import annotations

import socket

import pytest

from serve_here import Homing, serving
from spear.cli import main
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.options import TabletopOptions
from spear.serve.client import RemotePolicy


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("serve", "POLICY"),
        ("serve nanno", "nanno"),
        ("serve nano --prot 1", "--port"),
        ("serve nano --embodiment droit", "droid"),
        ("serve nano --embodiment /nowhere.py", "/nowhere.py"),
        ("serve nano --embodiment droid --control joints", "joint_"),
        ("serve nano --queue 0", "--queue 0"),
        ("serve nano --token=", "--token"),
        ("serve nano --token schlüssel", "--token"),
        ("serve nano --wait-ms -1", "--wait-ms -1"),
        ("serve nano --device tpu9", "tpu9"),
        ("serve nano --port 99999", "--port 99999"),
        ("serve nano --port TAKEN", "--port"),
        ("vla-eval nano --replan 0", "--replan 0"),
        ("vla-eval nano --embodiment maniskill2", "maniskill2_widowx"),
        ("vla-eval nano --port TAKEN", "--port"),
        ("evaluate --policy ws://127.0.0.1:9", "ws://127.0.0.1:9"),
        ("evaluate --policy expert --execution later", "sync"),
        ("evaluate --policy expert --latency-ms -5", "-5"),
    ],
)
def test_mistakes_are_one_clear_line(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "vla-eval" in argv:
        pytest.importorskip("vla_eval")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(argv.replace("TAKEN", str(taken.getsockname()[1])).split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert hint in said


def test_a_token_that_is_set_but_empty_leaves_no_server_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPEAR_TOKEN", "")
    assert main(["serve", "nano"]) == 2
    assert "SPEAR_TOKEN" in capsys.readouterr().err


def test_a_served_policy_does_as_it_does_here() -> None:
    options = TabletopOptions(scenes=2, families=("put_on",))
    sizes = {"external": (48, 32), "wrist": (24, 24)}
    here, _ = evaluate(PolicyAgent(Homing(), "here", image_sizes=sizes), options, quiet=True)
    with serving(robot="sim") as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        there, _ = evaluate(PolicyAgent(remote, "there", image_sizes=sizes), options, quiet=True)
        remote.close()
    assert here.outcomes == there.outcomes
