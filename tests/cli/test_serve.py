"""`spear serve` refuses bad options early, and a served policy acts as in the same process."""

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refusals import Command, no_warning, refuses
from serve_here import SPEAR_CLI_CODE, HomingPolicy, run_python, run_server
from spear import embodiments
from spear.cli import main
from spear.data.store.episode_store import EpisodeStore
from spear.embodiments.generic import EMBODIMENT as GENERIC
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES
from spear.errors import Notice, SpearError
from spear.evaluate.agents import PolicyAgent, load_agent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import load_results
from spear.policy import Spear1Policy
from spear.serve.client import RemotePolicy
from spear.serve.server import PolicyServer
from spear.serve.service import Service, check_has_cameras

ONE_SCENE = TabletopOptions(num_scenes=1, tasks=("put_on",))


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port at which another server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test fail if it loads a model."""
    monkeypatch.setattr(Spear1Policy, "load", None)  # calling None raises an error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--host 192.0.2.1", "192.0.2.1"),
        ("--host no..name", "no..name"),
        ("--token=", "--token"),
        ("--device tpu9", "tpu9"),
    ],
)
def test_bad_options_are_found_before_a_model_is_loaded(
    option: str, named: str, run_refused_command: Command
) -> None:
    assert named in run_refused_command("serve", "--policy", "nano", option.split())


@pytest.mark.usefixtures("no_model")
def test_a_port_that_is_taken_is_found_before_a_model_is_loaded(
    taken_port: int, run_refused_command: Command
) -> None:
    assert str(taken_port) in run_refused_command(
        "serve", "--policy", "nano", "--port", str(taken_port)
    )


@pytest.mark.usefixtures("no_model")
def test_a_folder_with_other_files_is_not_recorded_into(
    tmp_path: Path, run_refused_command: Command
) -> None:
    (tmp_path / "thesis.tex").write_text("")

    words = ["serve", "--policy", "nano", "--port", "0", "--record", str(tmp_path)]
    message = run_refused_command(words)

    assert f"{tmp_path} contains other files" in message


@pytest.mark.slow
def test_a_session_with_the_command_is_recorded(tmp_path: Path) -> None:
    """The server is stopped as a service is, by SIGTERM."""
    folder = tmp_path / "recordings"
    words = ["serve", "--policy", "nano", "--port", "0", "--record", str(folder)]
    with run_python(SPEAR_CLI_CODE, *words) as process:
        assert process.stdout
        address = process.stdout.readline().split()[-1]  # "serving nano … at ws://…"
        with closing(RemotePolicy(address)) as policy:
            answer = policy.infer(GENERIC.example())["actions"]
        process.terminate()
        assert process.wait(timeout=60) == 0

    (episode,) = EpisodeStore(folder)
    assert episode.action is not None
    np.testing.assert_allclose(episode.action[0], answer[0], atol=1e-6)


@pytest.mark.usefixtures("no_model")
def test_an_empty_token_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, run_refused_command: Command
) -> None:
    """Otherwise a mistake in the environment would start a server that is open to all."""
    monkeypatch.setenv("SPEAR_TOKEN", "")

    assert "SPEAR_TOKEN" in run_refused_command("serve", "--policy", "nano")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("robot", ["widowx", "simpler_widowx", "maniskill2_widowx"])
def test_a_robot_without_a_camera_of_the_training_is_refused(
    robot: str, run_refused_command: Command
) -> None:
    message = run_refused_command("serve", "--policy", "nano", "--embodiment", robot)

    assert f"camera 'wrist', which {robot} does not have" in message
    assert "--allow-missing-cameras" in message


@pytest.mark.usefixtures("no_model")
def test_a_harness_whose_robot_lacks_a_camera_of_the_policy_is_refused(
    free_tcp_port: int, run_refused_command: Command
) -> None:
    """The protocol of vla-eval is served for its robot, maniskill2_widowx, without a choice."""
    pytest.importorskip("vla_eval")

    words = ["serve", "--policy", "nano", "--protocol", "vla-eval", "--port"]
    message = run_refused_command(words, str(free_tcp_port))

    assert "camera 'wrist', which maniskill2_widowx does not have" in message


@pytest.mark.parametrize("robot", ["generic", "droid", "roboarena"])
def test_a_robot_with_the_cameras_of_the_training_is_served(robot: str) -> None:
    check_has_cameras(embodiments.load(robot), ["external", "wrist"], robot)


def test_a_missing_camera_may_be_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The camera is checked before the policy is loaded."""

    def stop_here(*args: object, **options: object) -> None:
        """Stand in for loading the policy."""
        raise SpearError("the policy is being loaded")

    monkeypatch.setattr(Spear1Policy, "load", stop_here)

    command = "serve --policy nano --port 0 --embodiment widowx --allow-missing-cameras"
    main(command.split())

    assert "being loaded" in capsys.readouterr().err


def test_a_server_for_another_robot_is_refused() -> None:
    with run_server(robot="droid") as server:
        refuses("--embodiment generic", load_agent, f"ws://127.0.0.1:{server.port}")


def test_results_of_a_served_policy_are_continued_with_the_same_weights_alone(
    tmp_path: Path,
) -> None:
    """A server may come back at the same address with other weights."""
    options = replace(ONE_SCENE, out=tmp_path)
    policy = HomingPolicy()

    # One scene, and a second one with the same weights at the same address.
    policy.identity = "one"
    with run_server(policy) as server:
        port = server.port
        agent = load_agent(f"ws://127.0.0.1:{port}")
        assert agent.weights == "one"
        evaluate_tabletop(agent, options)
    with run_server(policy, port=port):
        evaluate_tabletop(load_agent(f"ws://127.0.0.1:{port}"), replace(options, num_scenes=2))

    # A third scene with other weights.
    policy.identity = "two"
    with run_server(policy, port=port):
        agent = load_agent(f"ws://127.0.0.1:{port}")
        assert agent.weights == "two"
        refuses("weights", evaluate_tabletop, agent, replace(options, num_scenes=3))

    assert len(load_results(tmp_path).outcomes) == 2


def test_a_service_names_its_weights_as_an_agent_does() -> None:
    policy = Spear1Policy.load("nano")

    assert Service(policy, GENERIC).metadata["weights"] == policy.identity
    assert load_agent("nano").weights == policy.identity
    assert load_agent("nano", flow_steps=3).weights != policy.identity


@pytest.mark.parametrize("sizes", [{"external": (48, 32), "wrist": (24, 24)}, None])
def test_a_served_policy_is_shown_images_of_its_size(
    sizes: dict[str, tuple[int, int]] | None,
) -> None:
    """A policy that does not say its sizes gets images of the default size."""
    policy = HomingPolicy()
    expected_sizes = DEFAULT_IMAGE_SIZES
    if sizes is not None:
        policy.image_sizes = sizes
        expected_sizes = sizes

    # The policy does not name its weights, so there is a notice.
    with run_server(policy) as server, pytest.warns(Notice, match="which weights"):
        agent = load_agent(f"ws://127.0.0.1:{server.port}")

    assert agent.image_sizes == expected_sizes


def test_a_policy_with_one_camera_is_served_to_a_robot_that_has_two() -> None:
    policy = Spear1Policy.load("nano", steps=1, seed=3)
    policy.processor = replace(
        policy.processor, image_sizes={"external": policy.image_sizes["external"]}
    )
    robot = embodiments.load("droid")
    request = {**robot.example(), "seed": 1}
    service = Service(policy, robot, robot="droid")

    assert service.warm_up_and_count_rows() > 0
    (answer,) = service.answer([request])

    assert list(service.metadata["image_sizes"]) == ["external"]
    # The answer is that to an observation without the wrist image.
    observation = robot.read(request)
    del observation["observation/wrist_image"]
    actions = policy.infer(observation)["actions"]
    _, control = robot.select_control(None)  # the robot's first control, as the service uses
    expected = control.convert(actions, observation["observation/state"], request)
    np.testing.assert_array_equal(answer["actions"], expected)


def test_a_policy_of_earlier_frames_is_served_in_those_frames_with_a_notice() -> None:
    policy = Spear1Policy.load("nano", steps=1)
    policy.frames = {"droid": 1}

    with pytest.warns(Notice, match="mine acts in version 1 of the frames of droid"):
        service = Service(policy, embodiments.load("droid"), name="mine", robot="droid")

    assert service.embodiment.frame_version == 1


def test_a_policy_without_recorded_frames_is_served_with_a_cure() -> None:
    policy = Spear1Policy.load("nano", steps=1)
    policy.frames = None

    with pytest.warns(Notice, match='write "frames": {} into its normalizer.json'):
        Service(policy, embodiments.load("roboarena"), name="mine", robot="roboarena")


def test_a_policy_that_learned_in_the_simulator_acts_in_the_newest_frames() -> None:
    policy = Spear1Policy.load("nano", steps=1)

    with no_warning():
        service = Service(policy, embodiments.load("droid"), name="nano", robot="droid")

    assert service.embodiment.frame_version == 2


@pytest.mark.parametrize(("words", "max_mib"), [((), 16), (("--max-message-mib", "64"), 64)])
def test_the_largest_message_is_an_option(
    words: tuple[str, ...],
    max_mib: int,
    run_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = []

    async def record_limits(server: PolicyServer, _: Any) -> None:
        limits.append(server.limits.max_message_bytes)

    monkeypatch.setattr(PolicyServer, "run", record_limits)

    run_command("serve", "--policy", "nano", "--port", "0", *words)

    assert limits == [max_mib * 2**20]


def test_a_served_policy_has_the_same_outcomes_as_in_the_same_process() -> None:
    two_scenes = replace(ONE_SCENE, num_scenes=2)
    local_results, _ = evaluate_tabletop(PolicyAgent(HomingPolicy(), "local"), two_scenes)

    with run_server() as server, closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as remote:
        remote_results, _ = evaluate_tabletop(PolicyAgent(remote, "remote"), two_scenes)

    assert remote_results.outcomes == local_results.outcomes
