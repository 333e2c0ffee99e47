"""Scripts for clusters: valid, and the command inside is ours, word for word; Ray's driver really starts
processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import pytest
import yaml

from spear.cli import COMMANDS, _parse, main
from spear.cli.launching import LAUNCHING

TRAIN = [
    *("vla-pretrain", "--episodes", "data/bridge", "data/my droid", "--split", "train[:90%]"),
    *("--weights", "1", "2.5", "--init", "runs/vlm-stage2", "--out", "runs/vla pretrain", "--seed", "3"),
    *("--set", 'frozen=["vlm.moge"]', "lr=1e-4"),
]
PLACE = ["--nodes", "4", "--gpus", "8", "--dry-run", "--launch"]


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *TRAIN, *PLACE, *words]) == 0
    return capsys.readouterr().out


def check_command(words: Sequence[str]) -> None:
    """It is the command that was given, without what was said of the cluster."""
    assert list(words[:2]) == ["spear", "train"]
    found = _parse("train", COMMANDS["train"], words[2:])
    given = _parse("train", COMMANDS["train"], TRAIN)
    assert (found.args, found.kwargs) == (given.args, given.kwargs)
    assert not {f"--{name.replace('_', '-')}" for name in LAUNCHING} & set(words)


def programs(folder: Path, **bodies: str) -> dict[str, str]:
    """An environment whose PATH begins with these shell scripts."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script(capsys, "slurm", "--job", "time=08:00:00", "partition=h200", "setup=echo set up")
    options = dict(
        line[8:].split("=") for line in text.splitlines() if line.startswith("#SBATCH --") if "=" in line
    )
    assert (
        options["--nodes"] == "4"
        and options["--gpus-per-node"] == "8"
        and options["--ntasks-per-node"] == "1"
    )
    assert options["--time"] == "08:00:00" and options["--partition"] == "h200" and "--account" not in options
    assert "#SBATCH --requeue" in text
    # Run by bash, with what a node of Slurm's would have.
    environment = programs(
        tmp_path / "bin",
        scontrol='[ "$1" = show ] && seq -f node%.0f 7 40000',  # more than a pipe holds: all of it must be read
        srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        torchrun='printf "%s\\n" "$@"',
    )
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40123"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, check=True)
    first, *words = done.stdout.splitlines()
    assert first == "set up"
    launcher, command = words[: words.index("spear")], words[words.index("spear") :]
    assert launcher == [
        *("--nnodes=4", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:20123"),
        *("--rdzv-id=40123", "--max-restarts=3", "--no-python"),
    ]
    check_command(command)
    # What ends with an error ends the job with an error.
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    assert (
        subprocess.run(["bash", "-c", text], capture_output=True, env=environment, check=False).returncode
        == 3
    )


def test_out_of_time_it_is_queued_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script(capsys, "slurm")
    environment = programs(
        tmp_path / "bin", scontrol='echo "$@"', srun="kill -USR1 $PPID; exec sleep 0.2", torchrun="true"
    )
    environment |= {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "40123"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["out of time: queued again", "requeue 40123"]


def test_kubernetes(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "kubernetes", "--job", "image=me/spear:1", "volume=robots", "mount=/data", "cpus=4")
    service, job = yaml.safe_load_all(text)
    name = job["metadata"]["name"]
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == name
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == 4 and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        pod["subdomain"] == name and container["image"] == "me/spear:1" and container["workingDir"] == "/data"
    )
    assert container["resources"]["limits"] == {"cpu": "32", "nvidia.com/gpu": 8}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    words = container["command"]
    launcher, command = words[: words.index("spear")], words[words.index("spear") :]
    assert launcher[0] == "torchrun" and launcher[-1] == "--no-python"
    assert "--nnodes=4" in launcher and f"--rdzv-endpoint={name}-0.{name}:29400" in launcher
    check_command(command)


def test_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script(capsys, "ray", "--job", "address=http://head:8265")
    environment = programs(tmp_path / "bin", ray='printf "%s\\0" "$@"')
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    words = done.stdout.split("\0")[:-1]
    assert words[:5] == ["job", "submit", "--address", "http://head:8265", "--no-wait"]
    # Ray joins the words with list2cmdline and lets a shell run them.
    entrypoint = list2cmdline(words[words.index("--") + 1 :])
    environment = programs(tmp_path / "head", python='printf "%s\\0" "$@"')
    ran = subprocess.run(
        ["sh", "-c", entrypoint], capture_output=True, text=True, env=environment, check=True
    )
    driver = ran.stdout.split("\0")[:-1]
    end = driver.index("--")
    assert driver[:end] == [
        *("-m", "spear.train.on_ray", "--nodes", "4", "--gpus", "8", "--restarts", "10"),
        *("--folder", str(tmp_path)),
    ]
    check_command(driver[end + 1 :])


def test_without_a_dry_run_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    given = ["--episodes", "mine", "--init", "vla"]
    assert (
        main(["train", "finetune-lora", "--out", str(out), *given, "--launch", "slurm", "--gpus", "0"]) == 0
    )
    file = out / "slurm.sh"
    assert f"sbatch {file}" in capsys.readouterr().out
    assert "gpus" not in file.read_text() and "--nproc-per-node=1" in file.read_text()
    assert f"spear train finetune-lora --out {out} --episodes mine --init vla" in file.read_text()
    capsys.readouterr()
    assert main(["train", "finetune-lora", "--out", str(out), "--launch", "slurm"]) == 2
    assert "give --episodes FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["vla-pretrain", "--launch", "slurm", "--nodes", "3"], "batch_size 2048 cannot be divided among 3"),
        (["finetune-lora", "--launch", "slurm", "--gpus", "16"], "in 8 pieces each"),
        (["vla-pretrain", "--launch", "slurm", "--nodes", "0"], "at least 1 node"),
        (["vla-pretrain", "--launch", "slurm", "--job", "partitoin=x"], "did you mean 'partition'?"),
        (["vla-pretrain", "--launch", "slurm", "--job", "cpus=many"], "give a whole number"),
        (["vla-pretrain", "--launch", "slurm", "--job", "h200"], "write it as KEY=VALUE"),
        (["vla-pretrain", "--launch", "slurm", "--set", "learning_rat=1"], "unknown recipe key"),
        (["vla-pretrain", "--launch", "slurm", "--set", "preset=nanno"], "did you mean 'nano'?"),
        (["vla-pretrain", "--launch", "slurm", "--preset", "nanno"], "did you mean 'nano'?"),
        (["vla-pretrain", "--launch", "kubernetes", "--job", "image=x"], "needs image and volume"),
        (["vla-pretrain", "--launch", "slrum"], "slurm"),
        (["vla-pretrain", "--dry-run"], "--launch slurm, ray or kubernetes"),
    ],
)
def test_mistakes_are_found_before_anything_waits_in_a_queue(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--episodes", "bridge", "--init", "vla"]
    assert main(["train", *words, *given]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray of two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_rays_driver_starts_processes_again_until_they_succeed(cluster: Any, tmp_path: Path) -> None:
    from spear.train import on_ray

    (tmp_path / "count.sh").write_text(
        'echo "$RANK of $WORLD_SIZE: $1" >> tries; [ "$(wc -l < tries)" -ge 2 ] || exit 7\n'
    )
    place = ["--nodes", "1", "--gpus", "0", "--restarts", "1", "--folder", str(tmp_path)]
    assert on_ray.main([*place, "--", "sh", "count.sh", "a word"]) == 0
    assert (tmp_path / "tries").read_text().splitlines() == ["0 of 1: a word"] * 2


def test_ray_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spear.train import on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    assert on_ray.main(["--nodes", "1", "--gpus", "1", "--", "true"]) == 2
    assert 'pip install "spear-vla[ray]"' in capsys.readouterr().err
