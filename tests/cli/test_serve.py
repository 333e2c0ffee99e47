"""A served policy does as it does here."""

from __future__ import annotations

import pytest

from serve_here import Homing, serving
from spear.cli import main
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.options import TabletopOptions
from spear.serve.client import RemotePolicy


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
