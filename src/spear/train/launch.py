"""Training on a cluster: what Slurm, Ray or Kubernetes is given so that every process runs one `spear train`
command.

Each starts `torchrun` on N nodes with a process per GPU, and starts it again after a preemption: the command
then continues from its last checkpoint. All nodes must see the same files (the data, the run's folder) at the
same paths.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spear.errors import SpearError, unknown_name
from spear.train.recipes import Recipe

Cluster = Literal["slurm", "ray", "kubernetes"]
FILES: Mapping[Cluster, str] = {"slurm": "slurm.sh", "ray": "ray.sh", "kubernetes": "kubernetes.yaml"}
"""What the script of each is called."""
SUBMIT: Mapping[Cluster, str] = {"slurm": "sbatch", "ray": "bash", "kubernetes": "kubectl apply -f"}
"""The command that submits it."""
SETTINGS: Mapping[Cluster, Mapping[str, str]] = {
    "slurm": {
        "time": "24:00:00",
        "partition": "",
        "account": "",
        "cpus": "8",
        "setup": "",
        "restarts": "3",
    },
    "ray": {"address": "http://127.0.0.1:8265", "restarts": "10"},
    "kubernetes": {
        "image": "",
        "volume": "",
        "mount": "/work",
        "cpus": "8",
        "restarts": "10",
    },
}
"""What can be set for each, and what it is otherwise (our choice; "": left out).

time       after which Slurm stops the job; it then queues it again. partition, account: Slurm's.
cpus       cores per process.
setup      a shell line to run first, such as ". .venv/bin/activate".
restarts   how often processes that fail are started again.
address    of the Ray cluster's job server.
image      the container's; volume: the persistent volume claim with data and results, mounted at `mount`.
"""
_NEEDED = {"kubernetes": ("image", "volume")}
_PORT = 29400


@dataclass(frozen=True)
class Job:
    """One command on many processes.

    name      what the cluster calls it.
    command   the words of what every process runs.
    nodes     machines; gpus of each (0: machines without, one process each).
    settings  see `SETTINGS`.
    """

    name: str
    command: Sequence[str]
    nodes: int
    gpus: int
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes per node."""
        return max(self.gpus, 1)


def script(cluster: Cluster, job: Job) -> str:
    """The batch script or manifest that runs a job. Raises SpearError for a setting that is wrong or
    missing."""
    known = SETTINGS[cluster]
    for key in job.settings:
        if key not in known:
            raise unknown_name(f"--job key for {cluster}", key, known)
    chosen = {**known, **job.settings}
    for key in _NEEDED.get(cluster, ()):
        if not chosen[key]:
            raise SpearError(f"{cluster} needs {' and '.join(_NEEDED[cluster])}: give --job {key}=…")
    for key in ("cpus", "restarts"):
        if key in known and not chosen[key].isdecimal():
            raise SpearError(f"--job {key}={chosen[key]}: give a whole number")
    return {"slurm": _slurm, "ray": _ray, "kubernetes": _kubernetes}[cluster](job, chosen)


def check(stage: Recipe, nodes: int, gpus: int) -> None:
    """Raises SpearError for a number of processes that the recipe's batch cannot be divided among."""
    if nodes < 1 or gpus < 0:
        raise SpearError(f"--nodes {nodes} --gpus {gpus}: give at least 1 node, and 0 or more GPUs per node")
    processes, pieces = nodes * max(gpus, 1), stage.optimization.accumulate
    if stage.batch_size % (processes * pieces):
        raise SpearError(
            f"batch_size {stage.batch_size} cannot be divided among {processes} processes in {pieces} pieces each "
            "(accumulate): choose other --nodes and --gpus, or --set batch_size=… or accumulate=…"
        )


def _slurm(job: Job, chosen: Mapping[str, str]) -> str:
    """A script for sbatch. Slurm sends USR1 five minutes before the time is over."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus or "",
        "cpus-per-task": job.processes * int(chosen["cpus"]),
        "time": chosen["time"],
        "partition": chosen["partition"],
        "account": chosen["account"],
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": "B:USR1@300",
    }
    header = "\n".join(f"#SBATCH --{key}={value}" for key, value in options.items() if value != "")
    return f"""#!/bin/bash
# {job.name} on {job.nodes} x {job.processes} processes. Preempted, or out of time, it is queued again and continues
# from its last checkpoint.
{header}
#SBATCH --requeue
set -euo pipefail
{chosen["setup"] or "# nothing to set up"}
export OMP_NUM_THREADS={chosen["cpus"]}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
trap 'echo "out of time: queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 --cpus-per-task={options["cpus-per-task"]} \\
    torchrun --nnodes={job.nodes} --nproc-per-node={job.processes} --rdzv-backend=c10d \\
    --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id="$SLURM_JOB_ID" \\
    --max-restarts={chosen["restarts"]} --no-python \\
    {shlex.join(job.command)} &
wait $!
"""


def _ray(job: Job, chosen: Mapping[str, str]) -> str:
    """A script that submits a Ray job, whose driver is `spear.train.on_ray`."""
    return f"""#!/bin/bash
# {job.name} on {job.nodes} x {job.processes} processes. Run it in the project's folder, which all nodes must see.
# When a node is lost, the processes are started again on the nodes that Ray finds, from the last checkpoint.
set -euo pipefail
ray job submit --address {shlex.quote(chosen["address"])} --no-wait -- \\
    python -m spear.train.on_ray --nodes {job.nodes} --gpus {job.gpus} --restarts {chosen["restarts"]} \\
    --folder "$PWD" -- {shlex.join(job.command)}
"""


def _kubernetes(job: Job, chosen: Mapping[str, str]) -> str:
    """An indexed Job with a pod per node, and the headless Service by which they find the first."""
    import yaml

    name = re.sub(r"[^a-z0-9-]+", "-", job.name.lower()).strip("-")[:50]
    torchrun = [
        "torchrun",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={name}-0.{name}:{_PORT}",
        f"--rdzv-id={name}",
        f"--max-restarts={chosen['restarts']}",
        "--no-python",
    ]
    limits: dict[str, Any] = {"cpu": str(job.processes * int(chosen["cpus"]))}
    if job.gpus:
        limits["nvidia.com/gpu"] = job.gpus
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "train",
                "image": chosen["image"],
                "workingDir": chosen["mount"],
                "command": [*torchrun, *job.command],
                "env": [{"name": "OMP_NUM_THREADS", "value": chosen["cpus"]}],
                "resources": {"limits": limits},
                "volumeMounts": [
                    {"name": "work", "mountPath": chosen["mount"]},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": chosen["volume"]}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": name},
            "ports": [{"port": _PORT}],
        },
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": int(chosen["restarts"]) * job.nodes,
            # A pod that was preempted or drained is replaced, and does not count as a failure.
            "podFailurePolicy": {
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
            },
            "template": {"spec": pod},
        },
    }
    return str(yaml.safe_dump_all([service, batch], sort_keys=False, width=100))
