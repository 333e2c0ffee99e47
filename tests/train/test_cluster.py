"""examples/cluster: each file starts the plain command (Ray's: tests/test_ray.py)."""

import os
import subprocess
from pathlib import Path

import yaml

from refusals import Command

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
TRAIN = ["spear", "train", "nano-post", "--set", "lr=1e-4"]
SLURM = ["bash", str(CLUSTER / "slurm.sh"), *TRAIN]


def programs(folder: Path, **bodies: str) -> dict[str, str]:
    """The environment of a Slurm job whose PATH begins with these shell scripts."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40123", "SLURM_NNODES": "2"}
    return {
        **os.environ,
        **job,
        "SLURM_GPUS_ON_NODE": "8",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }


def test_slurm_starts_the_command_on_all_nodes(tmp_path: Path) -> None:
    environment = programs(
        tmp_path / "bin",
        scontrol='[ "$1" = show ] && seq -f node%.0f 7 40000',  # more than a pipe holds: all must be read
        srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        torchrun='printf "%s\\n" "$@"',
    )
    done = subprocess.run(
        SLURM, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines() == [
        *("--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:20123"),
        *("--rdzv-id=40123", "--max-restarts=3", "--no-python", *TRAIN),
    ]
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run(SLURM, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert failed.returncode == 3


def test_slurm_queues_a_job_again_that_is_out_of_time(tmp_path: Path) -> None:
    out_of_time = "kill -USR1 $PPID; exec sleep 0.2"
    environment = programs(
        tmp_path / "bin", scontrol='echo "$@"', srun=out_of_time, torchrun="true"
    )
    done = subprocess.run(
        SLURM, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.stdout.splitlines()[-1] == "requeue 40123"


def test_kubernetes_pods_find_each_other_and_run_our_command(refused: Command) -> None:
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
    assert "lr" in refused(*command[1:], "--set", "lr=-1")
