"""A served policy does as it does here."""

import socket
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from serve_here import Homing, serving
from spear.errors import SpearError
from spear.evaluate.agents import IMAGE_SIZES, PolicyAgent, load_agent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.options import TabletopOptions
from spear.policy import Spear1Policy
from spear.serve.client import RemotePolicy


def test_what_is_cheap_is_checked_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(Spear1Policy, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {"--host 192.0.2.1": "192.0.2.1", "--host no..name": "no..name", f"--port {port}": port}
        for option, named in {**wrong, "--token=": "--token", "--device tpu9": "tpu9"}.items():
            assert named in refused("serve", "nano", *option.split())
    monkeypatch.setenv("SPEAR_TOKEN", "")  # set but empty: no server that is open to all
    assert "SPEAR_TOKEN" in refused("serve", "nano")


def test_a_server_for_another_robot_is_refused() -> None:
    with serving(robot="droid") as server, pytest.raises(SpearError, match="--embodiment generic"):
        load_agent(f"ws://127.0.0.1:{server.port}")


@pytest.mark.parametrize("sizes", [{"external": (48, 32), "wrist": (24, 24)}, {}])
def test_a_served_policy_is_shown_pictures_of_its_size(sizes: dict[str, tuple[int, int]]) -> None:
    policy = Homing()
    if sizes:
        policy.processor = SimpleNamespace(image_sizes=sizes)
    with serving(policy) as server:
        agent = load_agent(f"ws://127.0.0.1:{server.port}")
        assert agent.image_sizes == (sizes or IMAGE_SIZES)


def test_a_served_policy_does_as_it_does_here() -> None:
    options = TabletopOptions(scenes=2, families=("put_on",))
    sizes = {"external": (48, 32), "wrist": (24, 24)}
    here, _ = evaluate(PolicyAgent(Homing(), "here", image_sizes=sizes), options, quiet=True)
    with serving(robot="sim") as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        there, _ = evaluate(PolicyAgent(remote, "there", image_sizes=sizes), options, quiet=True)
        remote.close()
    assert here.outcomes == there.outcomes
