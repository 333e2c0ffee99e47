"""examples/cluster: each file starts the plain command; Ray's trains with two workers on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_tiny import make
from spear.cli import main
from spear.data.store.episode_store import write_episodes
from spear.policy import Spear1Policy
from train_tiny import rows

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
TRAIN = ["spear", "train", "nano-post", "--set", "lr=1e-4"]


def programs(folder: Path, **bodies: str) -> dict[str, str]:
    """The environment of a Slurm job whose PATH begins with these shell scripts."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40123", "SLURM_NNODES": "2"}
    return {**os.environ, **job, "SLURM_GPUS_ON_NODE": "8", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm_starts_the_command_on_all_nodes(tmp_path: Path) -> None:
    environment = programs(
        tmp_path / "bin",
        scontrol='[ "$1" = show ] && seq -f node%.0f 7 40000',  # more than a pipe holds: all must be read
        srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        torchrun='printf "%s\\n" "$@"',
    )
    command = ["bash", str(CLUSTER / "slurm.sh"), *TRAIN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [
        *("--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:20123"),
        *("--rdzv-id=40123", "--max-restarts=3", "--no-python", *TRAIN),
    ]
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert failed.returncode == 3


def test_slurm_queues_a_job_again_that_is_out_of_time(tmp_path: Path) -> None:
    environment = programs(
        tmp_path / "bin", scontrol='echo "$@"', srun="kill -USR1 $PPID; exec sleep 0.2", torchrun="true"
    )
    command = ["bash", str(CLUSTER / "slurm.sh"), *TRAIN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1] == "requeue 40123"


def test_kubernetes_pods_find_each_other_and_run_our_command(capsys: pytest.CaptureFixture[str]) -> None:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == name
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == name and spec["completions"] == spec["parallelism"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    words = container["command"]
    launcher, command = words[: words.index("spear")], words[words.index("spear") :]
    assert f"--nnodes={spec['completions']}" in launcher
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in launcher
    assert f"--rdzv-endpoint={name}-0.{name}:{service['spec']['ports'][0]['port']}" in launcher
    # The command is one of ours: with one bad value at its end, that is what is complained about.
    assert main([*command[1:], "--set", "lr=-1"]) == 2
    assert "lr" in capsys.readouterr().err


@pytest.mark.xdist_group("ray")  # two Rays at a time starve each other
def test_ray_trains_with_two_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray.train.torch", reason="needs ray[train]")
    write_episodes([make(0), make(1)], tmp_path / "made")
    given = ["--init", "nano", "--episodes", "made", "--out", "run", "--steps", "2", "--device", "cpu"]
    few = ["--set", "batch_size=4", "flow_samples=1", "warmup=1"]
    script = [sys.executable, str(CLUSTER / "ray_train.py"), "--storage", str(tmp_path / "ray")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    environment |= {"RAY_worker_niceness": "0"}  # workers at 15 starve beside other tests
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*script, "--workers", "2", "spear", "train", "nano-post", *given, *few]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [2]
    assert Spear1Policy.load(tmp_path / "run").model is not None
    written = (tmp_path / "run" / "final" / "recipe.json").read_text()
    assert '"processes": 2' in written
