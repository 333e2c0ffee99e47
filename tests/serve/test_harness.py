"""A policy for AllenAI's vla-eval harness: evaluated by the real package, over a real socket."""

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
from spear.serve.options import VlaEvalOptions
from spear.serve.service import Service

pytest.importorskip(
    "vla_eval", reason="vla-eval is not installed: pip install 'spear-vla[vla-eval]'"
)

ROBOT = embodiments.load("maniskill2_widowx")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness writes its progress into results/ of where it runs: two tests at once would share
    it.
    """
    monkeypatch.chdir(tmp_path)


def run(policy: HomingPolicy, **params: Any) -> dict[str, Any]:
    """Two episodes of the harness with its own server, client and runner."""
    pytest.importorskip("mujoco")
    from vla_eval import api

    import tabletop_benchmark
    from spear.serve.harness import HarnessServer

    tabletop_benchmark.SENT.clear()
    service = Service(policy, tabletop_benchmark.EMBODIMENT, "test", "tabletop")
    benchmark = {
        "benchmark": "tabletop_benchmark:Tabletop",
        "params": {"family": "put_on", **params},
    }
    config = {"benchmarks": [{**benchmark, "episodes_per_task": 2}]}
    (result,) = api.evaluate(
        HarnessServer(service, VlaEvalOptions("test", replan=2)), config, no_save=True
    )
    return result


def test_the_harness_evaluates_as_we_would() -> None:
    from spear.sim.env import TabletopEnv
    from tabletop_benchmark import SENT

    policy = HomingPolicy()
    (task,) = run(policy)["tasks"]
    assert [e["metrics"] for e in task["episodes"]] == [{"success": False}] * 2
    assert [e["steps"] for e in task["episodes"]] == [5, 5]
    expected, env = [], TabletopEnv("put_on", images=False)
    for seed in (0, 1):
        seen, _ = env.reset(seed=seed)
        for step in range(5):
            if step % 2 == 0:  # two of five actions, then a new look
                chunk = make_homing_chunk(seen["observation/state"])
            seen, *_ = env.step(chunk[step % 2])
            expected.append(np.array2string(seen["observation/state"][:3], precision=5))
    assert expected == SENT
    first, second = policy.seeds[:3], policy.seeds[3:]
    assert [s - first[0] for s in first] == [s - second[0] for s in second] == [0, 2, 4]
    assert first[0] != second[0]
    again = HomingPolicy()
    run(again)
    assert again.seeds == policy.seeds


def test_what_nobody_could_use_is_refused_before_anybody_connects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for option, value in (("--replan", "9"), ("--port", "0")):
        assert main(["vla-eval", "nano", option, value]) == 2
        assert f"error: {option} {value}: " in capsys.readouterr().err


def test_a_bad_observation_ends_its_episode_with_a_reason() -> None:
    (task,) = run(HomingPolicy(), broken=True)["tasks"]
    assert [e["failure_reason"] for e in task["episodes"]] == ["model_act"] * 2
    assert all("observation/state" in e["failure_detail"] for e in task["episodes"])


def test_simplerenv_gets_what_its_controller_takes() -> None:
    """ManiSkill 2's rule for "ee_align2": the target moves along base axes and turns about them by
    a rotation vector; the harness hands the action on, with its own rule for the gripper."""
    from vla_eval.benchmarks.simpler.benchmark import SimplerEnvBenchmark
    from vla_eval.recording import NullEpisodeRecorder

    benchmark, step = SimplerEnvBenchmark(), Mock(return_value=({}, 0.0, False, False, {}))
    benchmark._env, benchmark._recorder = SimpleNamespace(step=step), NullEpisodeRecorder()
    seen = ROBOT.example()
    ours = ROBOT.read(seen)
    turns = Rotation.from_rotvec(np.random.default_rng(0).normal(size=(5, 3)) / 5)
    moves = np.random.default_rng(1).normal(size=(5, 3)) / 100
    chunk = np.concatenate(
        [moves, turns.as_quat(scalar_first=True), [[1], [1], [0.4], [0], [0.9]]], 1
    )
    control = ROBOT.controls["maniskill2_rotation_vector"]
    for row in control.convert(chunk.astype(np.float32), ours["observation/state"], seen):
        benchmark.step({"actions": row})
    link = Rotation.from_quat(seen["states"][3:7], scalar_first=True)
    ee = Rotation.from_quat(ours["observation/state"][3:7], scalar_first=True)
    offset = ee.inv() * link  # fixed: the link's frame in ours
    taken = [call.args[0] for call in step.call_args_list]
    for move, turn, action in zip(moves, turns, taken, strict=True):
        ee = ee * turn
        link = Rotation.from_rotvec(action[3:6]) * link
        np.testing.assert_allclose(action[:3], move, atol=1e-6)
        assert (link.inv() * (ee * offset)).magnitude() < 1e-5
    assert [a[6] for a in taken] == [1, 1, -1, -1, 1]


def test_the_example_config_is_one_of_the_harness() -> None:
    from vla_eval.cli.config_loader import load_config
    from vla_eval.config import DockerConfig, EvalConfig, ServerConfig

    from spear.serve.harness import OBSERVATION_PARAMETERS

    config = load_config(str(Path(__file__).parents[2] / "examples" / "simpler_widowx.yaml"))
    assert set(config) == {"server", "docker", "benchmarks"}
    assert ServerConfig.from_dict(config["server"]).url == "ws://localhost:8000"
    assert DockerConfig.from_dict(config["docker"]).image
    (benchmark,) = (EvalConfig.from_dict(b) for b in config["benchmarks"])
    module, name = benchmark.benchmark.split(":")
    made = getattr(importlib.import_module(module), name)(
        **benchmark.params, **OBSERVATION_PARAMETERS
    )
    assert made.get_tasks()[0]["name"] == "widowx_carrot_on_plate" and made.send_state


def test_the_commands_of_the_docs_evaluate_nano(tmp_path: Path) -> None:
    """`spear vla-eval` and `vla-eval run`, each in a process of its own; the simulator is ours."""
    pytest.importorskip("mujoco")
    support = Path(__file__).parents[1] / "support"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = str(Path(spear.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(support)])}
    path = tmp_path / "tabletop.yaml"
    path.write_text(
        f"server: {{url: 'ws://localhost:{port}'}}\n"
        "benchmarks: [{benchmark: 'tabletop_benchmark:Tabletop', params: {family: put_on}, "
        "episodes_per_task: 2}]\n"
    )
    serve = ["vla-eval", "nano", "--port", str(port), "--device", "cpu"]
    serve += ["--embodiment", f"{support}/tabletop_benchmark.py"]
    with run_python(SPEAR_CLI_CODE, *serve, env=environment, stderr=subprocess.STDOUT) as server:
        while "serving nano" not in (line := server.stdout.readline()):
            assert line, "the server ended"
        evaluate = [
            sys.executable,
            "-m",
            "vla_eval.cli.main",
            "run",
            "--no-docker",
            "-c",
            str(path),
        ]
        evaluate += ["--output-dir", str(tmp_path / "out")]
        done = subprocess.run(evaluate, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = [json.loads(p.read_text()) for p in (tmp_path / "out").rglob("*_aggregate.json")]
    (task,) = found["tasks"]
    assert [e["steps"] for e in task["episodes"]] == [5, 5]
    assert not any(e.get("failure_reason") for e in task["episodes"])
