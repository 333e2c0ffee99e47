"""A served policy does as it does here."""

import socket
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refusals import Command
from serve_here import HomingPolicy, run_server
from spear.embodiments import load as robot_of
from spear.embodiments.generic import EMBODIMENT as GENERIC
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES
from spear.errors import Notice, SpearError
from spear.evaluate.agents import PolicyAgent, load_agent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import load_results
from spear.policy import Spear1Policy
from spear.serve.client import RemotePolicy
from spear.serve.service import Service


def test_cheap_checks_come_before_loading_a_model(
    monkeypatch: pytest.MonkeyPatch, refused: Command
) -> None:
    monkeypatch.setattr(Spear1Policy, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            "--host 192.0.2.1": "192.0.2.1",
            "--host no..name": "no..name",
            f"--port {port}": port,
        }
        for option, named in {**wrong, "--token=": "--token", "--device tpu9": "tpu9"}.items():
            assert named in refused("serve", "nano", *option.split())
    monkeypatch.setenv("SPEAR_TOKEN", "")  # set but empty: no server that is open to all
    assert "SPEAR_TOKEN" in refused("serve", "nano")


def test_a_server_for_another_robot_is_refused() -> None:
    with (
        run_server(robot="droid") as server,
        pytest.raises(SpearError, match="--embodiment generic"),
    ):
        load_agent(f"ws://127.0.0.1:{server.port}")


def test_results_of_a_served_policy_are_those_of_its_weights(tmp_path: Path) -> None:
    """A server that comes back with others, at the same address, goes on with nobody's results."""
    policy, port, options = (
        HomingPolicy(),
        0,
        TabletopOptions(families=("put_on",), scenes=1, out=tmp_path),
    )
    for weights, scenes in (("one", 1), ("one", 2), ("two", 3)):
        policy.identity = weights
        with run_server(policy, port=port) as server:
            port, agent = server.port, load_agent(f"ws://127.0.0.1:{server.port}")
            assert agent.weights == weights
            with nullcontext() if weights == "one" else pytest.raises(SpearError, match="weights"):
                evaluate_tabletop(agent, replace(options, scenes=scenes))
    assert len(load_results(tmp_path).outcomes) == 2
    assert (
        Service(loaded := Spear1Policy.load("nano"), GENERIC).metadata["weights"] == loaded.identity
    )
    assert loaded.identity == load_agent("nano").weights != load_agent("nano", flow_steps=3).weights


@pytest.mark.parametrize("sizes", [{"external": (48, 32), "wrist": (24, 24)}, {}])
def test_a_served_policy_is_shown_pictures_of_its_size(sizes: dict[str, tuple[int, int]]) -> None:
    policy = HomingPolicy()
    if sizes:
        policy.image_sizes = sizes
    with (
        run_server(policy) as server,
        pytest.warns(Notice, match="which weights"),
    ):  # it does not say
        assert load_agent(f"ws://127.0.0.1:{server.port}").image_sizes == (
            sizes or DEFAULT_IMAGE_SIZES
        )


def test_a_policy_of_one_camera_is_served_to_a_robot_that_has_two() -> None:
    policy, robot = Spear1Policy.load("nano", steps=1, seed=3), robot_of("droid")
    policy.processor = replace(
        policy.processor, image_sizes={"external": policy.image_sizes["external"]}
    )
    service, seen = Service(policy, robot, robot="droid"), {**robot.example(), "seed": 1}
    assert service.warm_up() > 0 and list(service.metadata["image_sizes"]) == ["external"]
    (answer,) = service.answer([seen])
    ours = {k: v for k, v in robot.read(seen).items() if k != "observation/wrist_image"}
    rows = robot.select_control(None)[1].convert(
        policy.infer(ours)["actions"], ours["observation/state"], seen
    )
    np.testing.assert_array_equal(answer["actions"], rows)


def test_a_served_policy_does_as_it_does_here() -> None:
    options = TabletopOptions(scenes=2, families=("put_on",))
    here, _ = evaluate_tabletop(PolicyAgent(HomingPolicy(), "here"), options)
    with run_server() as server, closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as remote:
        there, _ = evaluate_tabletop(PolicyAgent(remote, "there"), options)
    assert here.outcomes == there.outcomes
