"""A policy for AllenAI's vla-eval harness: evaluated by the real package, over a real socket.

The benchmark is `tests/support/tabletop_benchmark.py`, which runs our simulator inside the harness
for episodes of five steps. It appends the arm's position after each step, as text, to its list
`SENT`.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import spear
from serve_here import SPEAR_CLI_CODE, HomingPolicy, make_homing_chunk, run_python
from spear import embodiments
from spear.cli import main
from spear.serve.options import ServeOptions
from spear.serve.service import Service

pytest.importorskip(
    "vla_eval", reason="vla-eval is not installed: pip install 'spear-vla[vla-eval]'"
)

MANISKILL2_ROBOT = embodiments.load("maniskill2_widowx")
EXAMPLES = Path(__file__).parents[2] / "examples"
SUPPORT = Path(__file__).parents[1] / "support"
NUM_EPISODES = 2
NUM_STEPS = 5  # steps of an episode
REPLAN_INTERVAL = 2  # so the policy is asked at steps 0, 2 and 4


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own current folder, in which the harness writes its progress."""
    monkeypatch.chdir(tmp_path)


def run_harness(policy: HomingPolicy, **parameters: Any) -> list[dict[str, Any]]:
    """Run two episodes with the harness's server, client and runner.

    Args:
        policy: the policy to evaluate.
        parameters: options of the benchmark.

    Returns:
        The harness's results of the episodes.
    """
    pytest.importorskip("mujoco")
    from vla_eval import api

    import tabletop_benchmark
    from spear.serve.harness import HarnessServer

    tabletop_benchmark.SENT.clear()
    service = Service(policy, tabletop_benchmark.EMBODIMENT, name="test", robot="tabletop")
    options = ServeOptions(policy="test", protocol="vla-eval", replan_steps=REPLAN_INTERVAL)
    server = HarnessServer(service, options)
    benchmark = {
        "benchmark": "tabletop_benchmark:Tabletop",
        "params": {"family": "put_on", **parameters},
        "episodes_per_task": NUM_EPISODES,
    }
    [result] = api.evaluate(server, {"benchmarks": [benchmark]}, no_save=True)
    [task] = result["tasks"]
    return task["episodes"]


def test_the_harness_runs_whole_episodes() -> None:
    episodes = run_harness(HomingPolicy())

    assert [episode["metrics"] for episode in episodes] == [{"success": False}] * NUM_EPISODES
    assert [episode["steps"] for episode in episodes] == [NUM_STEPS] * NUM_EPISODES


def test_the_harness_moves_the_arm_as_our_own_evaluation_does() -> None:
    from spear.sim.env import TabletopEnv

    run_harness(HomingPolicy())

    from tabletop_benchmark import SENT

    # Our own environment, with the actions that `HomingPolicy` predicts every second step.
    expected_positions = []
    env = TabletopEnv("put_on", images=False)
    for seed in range(NUM_EPISODES):
        observation, _ = env.reset(seed=seed)
        for step in range(NUM_STEPS):
            if step % REPLAN_INTERVAL == 0:
                chunk = make_homing_chunk(observation["observation/state"])
            observation, *_ = env.step(chunk[step % REPLAN_INTERVAL])
            position = observation["observation/state"][:3]
            expected_positions.append(np.array2string(position, precision=5))
    assert expected_positions == SENT


def test_seeds_depend_on_the_episode_and_the_step_alone() -> None:
    policy = HomingPolicy()
    run_harness(policy)

    # Each episode asks the policy three times, with the episode's first seed plus the step.
    first_episode, second_episode = policy.seeds[:3], policy.seeds[3:]
    assert [seed - first_episode[0] for seed in first_episode] == [0, 2, 4]
    assert [seed - second_episode[0] for seed in second_episode] == [0, 2, 4]
    assert first_episode[0] != second_episode[0]
    repeated = HomingPolicy()
    run_harness(repeated)
    assert repeated.seeds == policy.seeds


@pytest.mark.parametrize(("option", "value"), [("--replan-steps", "9"), ("--port", "0")])
def test_an_impossible_option_is_refused_before_anybody_connects(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", "--policy", "nano", "--protocol", "vla-eval", "--allow-missing-cameras"]

    assert main([*serve, option, value]) == 2

    error = capsys.readouterr().err
    assert f"error: {option} {value} " in error


def test_a_wrong_observation_ends_its_episode_with_a_reason() -> None:
    for episode in run_harness(HomingPolicy(), broken=True):
        assert episode["failure_reason"] == "model_act"
        assert "observation/state" in episode["failure_detail"]


def make_turning_chunk() -> tuple[np.ndarray, np.ndarray, Rotation]:
    """A chunk [5, 8], its translations [5, 3] and its rotations."""
    translations = np.random.default_rng(1).normal(size=(5, 3)) / 100
    rotations = Rotation.from_rotvec(np.random.default_rng(0).normal(size=(5, 3)) / 5)
    openings = [[1], [1], [0.4], [0], [0.9]]
    chunk = np.concatenate([translations, rotations.as_quat(scalar_first=True), openings], axis=1)
    return chunk.astype(np.float32), translations, rotations


def test_simplerenv_gets_what_its_controller_takes() -> None:
    """Our actions, converted and passed on by the harness, turn SimplerEnv's link as we want.

    ManiSkill 2's controller "ee_align2" moves its target along the base frame's axes, and turns it
    about these axes by a rotation vector. Our actions turn in the end-effector frame. The target is
    the pose of a link of the robot, which has a fixed rotation relative to our end-effector frame.
    The harness itself turns the gripper's opening into a command of 1 or -1.
    """
    from vla_eval.benchmarks.simpler.benchmark import SimplerEnvBenchmark
    from vla_eval.recording import NullEpisodeRecorder

    step = Mock(return_value=({}, 0.0, False, False, {}))
    benchmark = SimplerEnvBenchmark()
    benchmark._env = SimpleNamespace(step=step)
    benchmark._recorder = NullEpisodeRecorder()
    observation = MANISKILL2_ROBOT.example()
    state = MANISKILL2_ROBOT.read(observation)["observation/state"]
    chunk, translations, rotations = make_turning_chunk()

    control = MANISKILL2_ROBOT.controls["maniskill2_rotation_vector"]
    for row in control.convert(chunk, state, observation):
        benchmark.step({"actions": row})

    commands = [call.args[0] for call in step.call_args_list]
    link = Rotation.from_quat(observation["states"][3:7], scalar_first=True)
    ee = Rotation.from_quat(state[3:7], scalar_first=True)
    link_in_ee = ee.inv() * link  # the fixed rotation
    for translation, rotation, command in zip(translations, rotations, commands, strict=True):
        ee = ee * rotation  # our action, in the end-effector frame
        link = Rotation.from_rotvec(command[3:6]) * link  # the command, in the base frame
        np.testing.assert_allclose(command[:3], translation, atol=1e-6)
        assert (link.inv() * (ee * link_in_ee)).magnitude() < 1e-5
    assert [command[6] for command in commands] == [1, 1, -1, -1, 1]


def test_the_example_config_is_one_of_the_harness() -> None:
    from vla_eval.cli.config_loader import load_config
    from vla_eval.config import DockerConfig, EvalConfig, ServerConfig

    from spear.serve.harness import OBSERVATION_PARAMETERS

    config = load_config(str(EXAMPLES / "simpler_widowx.yaml"))

    assert set(config) == {"server", "docker", "benchmarks"}
    assert ServerConfig.from_dict(config["server"]).url == "ws://localhost:8000"
    assert DockerConfig.from_dict(config["docker"]).image
    [benchmark_config] = [EvalConfig.from_dict(entry) for entry in config["benchmarks"]]
    module, name = benchmark_config.benchmark.split(":")
    benchmark_class = getattr(importlib.import_module(module), name)
    benchmark = benchmark_class(**benchmark_config.params, **OBSERVATION_PARAMETERS)
    assert benchmark.get_tasks()[0]["name"] == "widowx_carrot_on_plate"
    assert benchmark.send_state


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.mark.slow  # starts the harness and a server as their own programs
def test_the_commands_of_the_docs_evaluate_nano(tmp_path: Path) -> None:
    """`spear serve --protocol vla-eval` and `vla-eval run`, each in a process of its own.

    The benchmark runs our simulator instead of SimplerEnv.
    """
    pytest.importorskip("mujoco")
    port = find_free_port()
    source = str(Path(spear.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(SUPPORT)])}
    config = tmp_path / "tabletop.yaml"
    config.write_text(
        f"server: {{url: 'ws://localhost:{port}'}}\n"
        "benchmarks: [{benchmark: 'tabletop_benchmark:Tabletop', params: {family: put_on}, "
        "episodes_per_task: 2}]\n"
    )
    serve = ["serve", "--policy", "nano", "--protocol", "vla-eval", "--port", str(port)]
    serve += ["--device", "cpu", "--allow-missing-cameras"]
    serve += ["--embodiment", str(SUPPORT / "tabletop_benchmark.py")]
    evaluate = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "-c", str(config)]
    evaluate += ["--output-dir", str(tmp_path / "out")]

    with run_python(SPEAR_CLI_CODE, *serve, env=environment, stderr=subprocess.STDOUT) as server:
        # Wait until the server is ready.
        for line in server.stdout:
            if "serving nano" in line:
                break
        else:
            pytest.fail("the server ended")
        process = subprocess.run(evaluate, text=True, capture_output=True, env=environment)

    assert process.returncode == 0, process.stdout + process.stderr
    [result_file] = (tmp_path / "out").rglob("*_aggregate.json")
    [task] = json.loads(result_file.read_text())["tasks"]
    for episode in task["episodes"]:
        assert episode["steps"] == NUM_STEPS
        assert not episode.get("failure_reason")
    assert len(task["episodes"]) == NUM_EPISODES
