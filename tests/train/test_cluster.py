"""examples/cluster: slurm.sh and kubernetes.yaml start the plain training command on all nodes.

tests/test_ray.py tests the file for Ray.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusals import Command

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
TRAIN = ["spear", "train", "nano-post", "--set", "lr=1e-4"]
SLURM = ["bash", str(CLUSTER / "slurm.sh"), *TRAIN]


def make_slurm_job(folder: Path, **programs: str) -> dict[str, str]:
    """Return the environment of a Slurm job, in which `programs` replace commands of Slurm.

    Args:
        folder: where the programs are written; PATH begins with it.
        programs: name -> text of a shell script.
    """
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "40123",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }


def run_slurm(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        SLURM, capture_output=True, text=True, env=environment, cwd=folder, check=False
    )


@pytest.fixture
def slurm_job(tmp_path: Path) -> dict[str, str]:
    """A job in which torchrun prints its arguments.

    scontrol lists the job's nodes, and srun runs the command that follows its own options.
    """
    return make_slurm_job(
        tmp_path / "bin",
        # "node7", "node8", … are so many names that a pipe cannot hold them. So the script must
        # read all of them.
        scontrol='[ "$1" = show ] && seq -f node%.0f 7 40000',
        # Skips the words that begin with "--", which are the options of srun.
        srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        torchrun='printf "%s\\n" "$@"',
    )


def test_slurm_starts_the_command_on_all_nodes(slurm_job: dict[str, str], tmp_path: Path) -> None:
    process = run_slurm(slurm_job, tmp_path)

    assert process.returncode == 0, process.stderr
    # The port depends on the job's id, 40123, so that jobs on one node have different ports.
    assert process.stdout.splitlines() == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:20123",
        "--rdzv-id=40123",
        "--max-restarts=3",
        "--no-python",
        *TRAIN,
    ]


def test_slurm_ends_with_the_exit_code_of_the_training(
    slurm_job: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")

    assert run_slurm(slurm_job, tmp_path).returncode == 3


def test_slurm_queues_a_job_again_that_is_out_of_time(tmp_path: Path) -> None:
    """Slurm sends SIGUSR1 to the script shortly before the job's time is over."""
    out_of_time = "kill -USR1 $PPID; exec sleep 0.2"
    environment = make_slurm_job(
        tmp_path / "bin", scontrol='echo "$@"', srun=out_of_time, torchrun="true"
    )

    process = run_slurm(environment, tmp_path)

    assert process.stdout.splitlines()[-1] == "requeue 40123"


@pytest.fixture
def service() -> Any:
    """The service of kubernetes.yaml, the first document of the file."""
    service, _ = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return service


@pytest.fixture
def job() -> Any:
    """The job of kubernetes.yaml, the second document of the file."""
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return job


def test_kubernetes_pods_find_each_other(service: Any, job: Any) -> None:
    name = job["metadata"]["name"]
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    port = service["spec"]["ports"][0]["port"]

    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == name
    assert pod["subdomain"] == name
    assert f"--rdzv-endpoint={name}-0.{name}:{port}" in container["command"]


def test_kubernetes_starts_a_process_per_gpu_on_all_nodes(job: Any) -> None:
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    num_gpus = container["resources"]["limits"]["nvidia.com/gpu"]

    assert spec["completions"] == spec["parallelism"]
    assert f"--nnodes={spec['completions']}" in container["command"]
    assert f"--nproc-per-node={num_gpus}" in container["command"]


def test_kubernetes_mounts_the_volumes_that_it_names(job: Any) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_runs_one_of_our_commands(job: Any, run_refused_command: Command) -> None:
    """With a bad value added, the command is refused for this value and nothing else."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = container["command"]
    command = words[words.index("spear") + 1 :]

    assert "lr" in run_refused_command(command, "--set", "lr=-1")
