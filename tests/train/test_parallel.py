"""Several processes and one are the same run, sharded or not; one may continue what the others began.

The processes are two, on CPUs, over gloo. They are started twice for all tests here: once to be killed, once
for the rest.
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

from models_tiny import START
from processes import until
from refusals import refuses
from spear.errors import SpearError
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.train import loop, parallel
from spear.train.options import Optimization
from train_tiny import EMBEDDINGS, Acting, Broken, Regression, go, rows, said, start

pytestmark = pytest.mark.xdist_group("parallel")  # what the tests share is made once
OPT = Optimization(steps=12, lr=1e-2, warmup=3, ema=0.9, precision="fp32")
SHORT = replace(OPT, steps=2, warmup=1, schedule="constant", weight_decay=0.0, grad_clip=0.5)
WHOLE = replace(SHORT, lr_scale={"vlm": 0.5}, frozen=("vlm.moge",))
HALF = replace(WHOLE, steps=1)
PATIENCE = 900  # seconds: some machines are busy


class Line(Regression):
    """Whose loss does not depend on who draws its noise."""

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        return super().loss(batch, torch.Generator())


def slow_run(root: Path) -> None:
    parallel.join_process_group()
    go(Line(pause=0.05), OPT, root / "killed", save_every=2)


def told_run(root: Path) -> None:
    """Until one of the processes is told to end."""
    parallel.join_process_group()
    go(Line(pause=0.05), OPT, root / "told")


def runs(root: Path) -> None:
    parallel.join_process_group()
    assert parallel.get_world_size() == 2
    for name in ("line", "killed", "told"):
        go(Line(), OPT, root / name)
    go(Acting(), WHOLE, root / "ddp")
    task = Acting()
    go(task, WHOLE, root / "fsdp", sharded=True)
    parallel.unshard(task.model)
    if parallel.get_rank() == 0:
        task.model.save_pretrained(root / "plain")
    go(Acting(), HALF, root / "from-two", sharded=True)
    go(Acting(), WHOLE, root / "from-one", sharded=True)
    other = replace(OPT, lr=1e-2 * (1 + parallel.get_rank()))
    refuses("process 1 .*lr.*seed", go, Line(), other, root, seed=parallel.get_rank())
    go(Broken({7}), OPT, root / "skipped")
    with pytest.raises(SpearError if parallel.get_rank() == 0 else SystemExit) as stop:
        go(Broken({7, 8}), replace(OPT, max_skipped=1), root / "stopped")
    (root / f"stopped-{parallel.get_rank()}").write_text(str(stop.value))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("two")
    processes, saved = start(slow_run, root), root / "killed" / "checkpoints" / "step-00000004"
    until(saved.is_dir, "a checkpoint", *processes, patience=PATIENCE)
    processes[1].kill()
    processes[0].join(PATIENCE)
    ended, log = start(told_run, root), root / "told" / "log.jsonl"
    until(lambda: log.is_file() and rows(root / "told"), "a step", *ended, patience=PATIENCE)
    ended[1].terminate()
    for process in ended:
        process.join(PATIENCE)
    go(Acting(), replace(HALF, accumulate=2), root / "from-one")
    others = start(runs, root)
    for process in others:
        process.join(PATIENCE)
    assert [process.exitcode for process in others] == [0, 0], said(runs, root, 0) + said(
        runs, root, 1
    )
    return SimpleNamespace(
        root=root, survived=processes[0].exitcode, told=[p.exitcode for p in ended]
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    go(Acting(), replace(WHOLE, accumulate=2), out)
    return out


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    path = str(out / "checkpoints" / f"step-{step:08d}")
    known = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    found = {k: torch.zeros(v.size, dtype=v.properties.dtype) for k, v in known.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    return found


def same_run(first: Path, second: Path, steps: int) -> None:
    """Losses, their parts and gradient norms within 1e-5; weights, averages and moments accordingly."""
    one, two = rows(first), rows(second)
    assert len(one) == len(two) == steps
    for a, b in zip(one, two, strict=True):
        for key in set(a) - {"steps_per_s", "data_wait"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), key
    left, right = tensors(first, steps), tensors(second, steps)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if not key.endswith(("k_proj.bias", "key.bias")):  # their gradient is zero but for rounding
            torch.testing.assert_close(right[key], value, rtol=2e-3, atol=2e-4, msg=key)


def test_two_processes_are_one_that_takes_both_pieces(one: Path, two: Any) -> None:
    """With whole models and sharded ones; also where the one continued what two began, and the reverse."""
    go(Acting(), WHOLE, two.root / "from-two")
    for name in ("ddp", "fsdp", "from-two", "from-one"):
        same_run(one, two.root / name, 2)
    parts = (two.root / "fsdp" / "checkpoints" / "step-00000002").glob("*.safetensors")
    sizes = [file.stat().st_size for file in parts]
    assert len(sizes) == 2 and min(sizes) > 0.4 * max(sizes)


def test_only_the_rows_that_shall_learn_do(one: Path, two: Any) -> None:
    before = dict(Acting().model.named_parameters())[EMBEDDINGS].detach()
    for out in (one, two.root / "ddp", two.root / "fsdp"):
        after = tensors(out, 2)[f"model.{EMBEDDINGS}"]
        assert torch.equal(before[:START], after[:START]) and not torch.equal(
            before[START:], after[START:]
        )


def test_the_result_of_a_sharded_run_is_a_plain_model(two: Any) -> None:
    model = weights.load(Spear1ForActionPrediction, two.root / "plain")
    trained = tensors(two.root / "fsdp", 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name
    config = json.loads((two.root / "plain" / "config.json").read_text())
    assert config["architectures"] == ["Spear1ForActionPrediction"]


def test_when_one_process_is_killed_or_told_the_other_ends_and_both_continue_exactly(
    two: Any,
) -> None:
    survivor = said(slow_run, two.root, 0)
    assert two.survived == 2 and survivor.count("error: process 0") == 1
    assert "Traceback" not in survivor
    assert two.told == [143, 143]  # only one was told to end
    whole = two.root / "line"
    for parts in (two.root / "killed", two.root / "told"):
        assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(parts)]
        torch.testing.assert_close(tensors(parts, 12), tensors(whole, 12), rtol=0, atol=0)


def test_a_piece_that_is_not_finite_is_skipped_by_all(two: Any) -> None:
    losses = [row["loss"] for row in rows(two.root / "skipped")]
    assert losses[3] is None and None not in losses[:3] + losses[4:]
    kept = [path.name for path in (two.root / "skipped" / "not-finite").iterdir()]
    assert kept == ["step-00000004-piece-00000007.safetensors"]
    assert "1 skipped step" in (two.root / "stopped-0").read_text()
    assert (two.root / "stopped-1").read_text() == "2"


def test_pieces_that_cannot_be_shared_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(Line(), replace(OPT, steps=2, accumulate=6), tmp_path)
    monkeypatch.setattr(parallel, "get_world_size", lambda: 4)
    refuses(
        r"6 pieces.* 4 processes.* 1, 2, 3, 6",
        loop.resolve_optimization,
        OPT,
        tmp_path,
        parallel.CPU,
    )
    monkeypatch.setattr(parallel, "get_world_size", lambda: 3)
    assert loop.resolve_optimization(OPT, tmp_path, parallel.CPU).accumulate == 2
