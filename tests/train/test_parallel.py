"""Training with two processes gives the same result as with one, sharded or not.

A run of two processes may also be continued by one, and the reverse. The two processes run on CPUs
and communicate over gloo. They are started three times for all tests here (fixture
`two_processes`): once so that one of them can be killed, once so that one can be stopped, and once
for the other runs. "ddp" is a run with the whole model in each process, "fsdp" a sharded one.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from models_tiny import FIRST_COORDINATE_ID
from processes import wait_until
from refusals import refuses
from spear.errors import SpearError
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.train import loop, parallel
from spear.train.options import Optimization
from train_tiny import (
    EMBEDDINGS,
    NonFiniteRegression,
    PolicyTask,
    Regression,
    read_log,
    read_losses,
    read_stderr,
    run_loop,
    start_processes,
)

REGRESSION = Optimization(steps=12, lr=1e-2, warmup=3, ema=0.9, precision="fp32")
POLICY = replace(
    REGRESSION,
    steps=2,
    warmup=1,
    schedule="constant",
    weight_decay=0.0,
    grad_clip=0.5,
    lr_scale={"vlm": 0.5},
    frozen=("vlm.moge",),
)
POLICY_ONE_STEP = replace(POLICY, steps=1)
PATIENCE_S = 900  # longest time that a process may take, on a busy machine


class FixedNoiseRegression(Regression):
    """A task with the same noise in every piece, whichever process computes the piece."""

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        return super().loss(batch, torch.Generator())


def run_until_killed(root: Path) -> None:
    """Train slowly, with checkpoints, until the fixture kills one of the two processes."""
    parallel.join_process_group()
    run_loop(FixedNoiseRegression(delay_s=0.05), REGRESSION, root / "killed", save_every=2)


def run_until_stopped(root: Path) -> None:
    """Train slowly until the fixture sends SIGTERM to one of the two processes."""
    parallel.join_process_group()
    run_loop(FixedNoiseRegression(delay_s=0.05), REGRESSION, root / "stopped")


def run_everything(root: Path) -> None:
    """Do all other runs that the tests look at. This function runs in each of two processes."""
    parallel.join_process_group()
    assert parallel.get_world_size() == 2

    # An uninterrupted run, and the continuation of the two runs that a signal ended.
    for name in ("uninterrupted", "killed", "stopped"):
        run_loop(FixedNoiseRegression(), REGRESSION, root / name)

    # A policy, twice: first whole on each process, then sharded.
    run_loop(PolicyTask(), POLICY, root / "ddp")
    task = PolicyTask()
    run_loop(task, POLICY, root / "fsdp", sharded=True)
    parallel.gather_on_first_process(task.model)
    if parallel.get_rank() == 0:
        task.model.save_pretrained(root / "plain")

    # The first half of a run that one process will continue ("from-two"), and the second half of a
    # run that one process began ("from-one").
    run_loop(PolicyTask(), POLICY_ONE_STEP, root / "from-two", sharded=True)
    run_loop(PolicyTask(), POLICY, root / "from-one", sharded=True)

    # Two processes with different settings, and steps that are not finite. Step k (from 0) consists
    # of the pieces 2k, of the first process, and 2k + 1. So piece 7 belongs to step 3.
    rank = parallel.get_rank()
    other_settings = replace(REGRESSION, lr=1e-2 * (1 + rank))
    refuses(
        "process 1 .*lr.*seed", run_loop, FixedNoiseRegression(), other_settings, root, seed=rank
    )
    run_loop(NonFiniteRegression(bad_steps={7}), REGRESSION, root / "skipped")
    # The first process says what is wrong; the other ones end without a message.
    with pytest.raises(SpearError if rank == 0 else SystemExit) as end:
        one_skipped = replace(REGRESSION, max_skipped=1)
        run_loop(NonFiniteRegression(bad_steps={7, 8}), one_skipped, root / "too-many")
    (root / f"too-many-{rank}").write_text(str(end.value))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All runs of two processes.

    Returns `root` (the folder with a folder per run), `exit_code_of_survivor` (of the process whose
    partner was killed), and `exit_codes_of_stopped` (of both, after one was told to stop).
    """
    root = tmp_path_factory.mktemp("two")

    # One of two processes is killed.
    killed = start_processes(run_until_killed, root)
    checkpoint = root / "killed" / "checkpoints" / "step-00000004"
    wait_until(checkpoint.is_dir, "a checkpoint", *killed, timeout_s=PATIENCE_S)
    killed[1].kill()
    killed[0].join(PATIENCE_S)

    # One of two processes is told to stop.
    stopped = start_processes(run_until_stopped, root)
    log_file = root / "stopped" / "log.jsonl"
    wait_until(
        lambda: log_file.is_file() and read_log(root / "stopped"),
        "a step",
        *stopped,
        timeout_s=PATIENCE_S,
    )
    stopped[1].terminate()
    for process in stopped:
        process.join(PATIENCE_S)

    # All other runs.
    run_loop(PolicyTask(), replace(POLICY_ONE_STEP, accumulate=2), root / "from-one")
    processes = start_processes(run_everything, root)
    for process in processes:
        process.join(PATIENCE_S)
    messages = read_stderr(run_everything, root, rank=0)
    messages += read_stderr(run_everything, root, rank=1)
    assert [process.exitcode for process in processes] == [0, 0], messages
    return SimpleNamespace(
        root=root,
        exit_code_of_survivor=killed[0].exitcode,
        exit_codes_of_stopped=[process.exitcode for process in stopped],
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the policy's run by one process, which has two pieces per step."""
    out = tmp_path_factory.mktemp("one")
    run_loop(PolicyTask(), replace(POLICY, accumulate=2), out)
    return out


def read_tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    path = str(out / "checkpoints" / f"step-{step:08d}")
    metadata = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
    }
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    return tensors


def check_same_logs(first: Path, second: Path, num_steps: int) -> None:
    """Check that losses, their parts and gradient norms of two runs are the same within 1e-5."""
    first_rows = read_log(first)
    second_rows = read_log(second)
    assert len(first_rows) == num_steps
    assert len(second_rows) == num_steps
    for first_row, second_row in zip(first_rows, second_rows, strict=True):
        for key in set(first_row) - {"steps_per_s", "data_wait"}:
            assert second_row[key] == pytest.approx(first_row[key], rel=1e-5, abs=1e-6), key


def check_same_tensors(first: Path, second: Path, step: int) -> None:
    """Check that weights, EMA weights and moments of two checkpoints are the same.

    The tolerance allows for the different rounding of averaged gradients.
    """
    first_tensors = read_tensors(first, step)
    second_tensors = read_tensors(second, step)
    assert first_tensors.keys() == second_tensors.keys()
    for key, value in first_tensors.items():
        # The gradient of these biases is zero except for rounding, and AdamW scales it up.
        if not key.endswith(("k_proj.bias", "key.bias")):
            torch.testing.assert_close(second_tensors[key], value, rtol=2e-3, atol=2e-4, msg=key)


@pytest.mark.slow  # starts processes that train
@pytest.mark.parametrize("name", ["ddp", "fsdp", "from-one"])
def test_two_processes_are_one_that_takes_both_pieces(
    name: str, one_process: Path, two_processes: Any
) -> None:
    """The run of two processes has the losses and tensors of one process with two pieces."""
    check_same_logs(one_process, two_processes.root / name, num_steps=2)
    check_same_tensors(one_process, two_processes.root / name, step=2)


def test_one_process_continues_what_two_began(one_process: Path, two_processes: Any) -> None:
    run_loop(PolicyTask(), POLICY, two_processes.root / "from-two")

    check_same_logs(one_process, two_processes.root / "from-two", num_steps=2)
    check_same_tensors(one_process, two_processes.root / "from-two", step=2)


def test_both_processes_write_half_of_a_sharded_checkpoint(two_processes: Any) -> None:
    files = (two_processes.root / "fsdp" / "checkpoints" / "step-00000002").glob("*.safetensors")

    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 2
    assert min(sizes) > 0.4 * max(sizes)


@pytest.mark.parametrize("name", ["one", "ddp", "fsdp"])
def test_only_the_trainable_rows_learn(name: str, one_process: Path, two_processes: Any) -> None:
    out = one_process if name == "one" else two_processes.root / name
    original = dict(PolicyTask().model.named_parameters())[EMBEDDINGS].detach()

    trained = read_tensors(out, step=2)[f"model.{EMBEDDINGS}"]

    assert torch.equal(original[:FIRST_COORDINATE_ID], trained[:FIRST_COORDINATE_ID])
    assert not torch.equal(original[FIRST_COORDINATE_ID:], trained[FIRST_COORDINATE_ID:])


def test_the_result_of_a_sharded_run_is_a_plain_model(two_processes: Any) -> None:
    model = weights.load(Spear1ForActionPrediction, two_processes.root / "plain")

    trained = read_tensors(two_processes.root / "fsdp", step=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name
    config = json.loads((two_processes.root / "plain" / "config.json").read_text())
    assert config["architectures"] == ["Spear1ForActionPrediction"]


def test_when_a_process_is_killed_the_other_ends_with_one_line(two_processes: Any) -> None:
    message = read_stderr(run_until_killed, two_processes.root, rank=0)

    assert two_processes.exit_code_of_survivor == 2  # that of a `SpearError`
    assert message.count("error: process 0") == 1
    assert "Traceback" not in message


def test_when_a_process_is_told_to_stop_all_stop(two_processes: Any) -> None:
    assert two_processes.exit_codes_of_stopped == [143, 143]  # 128 + 15, the number of SIGTERM


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_a_run_of_two_processes_continues_bit_for_bit(name: str, two_processes: Any) -> None:
    uninterrupted = two_processes.root / "uninterrupted"
    continued = two_processes.root / name

    assert read_losses(uninterrupted) == read_losses(continued)
    continued_tensors = read_tensors(continued, step=REGRESSION.steps)
    expected_tensors = read_tensors(uninterrupted, step=REGRESSION.steps)
    torch.testing.assert_close(continued_tensors, expected_tensors, rtol=0, atol=0)


def test_a_piece_that_is_not_finite_makes_all_processes_skip_the_step(two_processes: Any) -> None:
    out = two_processes.root / "skipped"

    losses = read_losses(out)
    assert losses[3] is None  # the only bad piece is number 7, in step 3 (from 0)
    assert None not in losses[:3] + losses[4:]
    names = [path.name for path in (out / "not-finite").iterdir()]
    assert names == ["step-00000004-piece-00000007.safetensors"]


def test_too_many_skipped_steps_end_all_processes_and_the_first_explains(
    two_processes: Any,
) -> None:
    assert "1 skipped step" in (two_processes.root / "too-many-0").read_text()
    assert (two_processes.root / "too-many-1").read_text() == "2"  # its exit code


def test_pieces_that_the_processes_cannot_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_loop(FixedNoiseRegression(), replace(REGRESSION, steps=2, accumulate=6), tmp_path)

    monkeypatch.setattr(parallel, "get_world_size", lambda: 4)
    refuses(
        r"6 pieces.* 4 processes.* 1, 2, 3, 6",
        loop.resolve_optimization,
        REGRESSION,
        tmp_path,
        parallel.CPU,
    )


def test_a_continued_run_divides_its_pieces_among_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_loop(FixedNoiseRegression(), replace(REGRESSION, steps=2, accumulate=6), tmp_path)

    monkeypatch.setattr(parallel, "get_world_size", lambda: 3)
    opt = loop.resolve_optimization(REGRESSION, tmp_path, parallel.CPU)

    assert opt.accumulate == 2  # 6 pieces for 3 processes
