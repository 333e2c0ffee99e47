"""Batches in memory that two processes have: what comes out is what went in, for as long as it is held."""

import gc
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from processes import run_in_process
from spear.train import loop
from spear.util.shared_batches import SLOT_BYTES, SharedBatchSlots, SlottedBatch

BATCH: dict[str, Any] = {
    "pixels": {
        "external": torch.arange(48, dtype=torch.uint8).reshape(2, 4, 2, 3).permute(0, 3, 1, 2)
    },
    "mask": torch.tensor([True, False, True]),
    "state": torch.randn(3, 5, dtype=torch.float64),
    "half": torch.randn(7).bfloat16(),
    "same": torch.ones(1).expand(4, 3),
    "step": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "words": ["a", "b"],
}


def test_a_batch_put_by_a_fork_is_taken_as_it_was() -> None:
    slots, there = SharedBatchSlots(2, 1), SharedBatchSlots(2, 1)
    handed = there.put(BATCH, 1)  # where things lie is the same in every process
    assert isinstance(handed, SlottedBatch)
    run_in_process(0, slots.put, BATCH, 1)
    found = slots.take(handed)
    (ours, like), (given, likewise) = tree_flatten(found), tree_flatten(BATCH)
    assert like == likewise  # the same kinds, with keys in the same order
    for a, b in zip(ours, given, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b
    assert found["pixels"]["external"].stride() == BATCH["pixels"]["external"].stride()


def test_a_slot_is_free_when_the_last_tensor_of_its_batch_is_gone() -> None:
    slots = SharedBatchSlots(1, 1)
    handed = slots.put(BATCH, 0)
    assert isinstance(handed, SlottedBatch)
    found = slots.take(handed)
    view = found["pixels"]["external"][1:].flatten()[3:].view(3, -1)
    kept = found["state"][:, 0]
    before = kept.clone()
    del found
    assert slots.put(BATCH, 0) is BATCH  # none is free: it comes as it is
    del view
    assert slots.put(BATCH, 0) is BATCH and torch.equal(kept, before)
    del kept
    gc.collect()
    assert isinstance(slots.put(BATCH, 0), SlottedBatch)


def test_what_no_slot_has_memory_for_comes_as_it_is() -> None:
    large = {"pixels": {"external": torch.empty(SLOT_BYTES, dtype=torch.uint8)}}
    assert SharedBatchSlots(1, 1).put(large, 0) is large

    def limited() -> None:
        most = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            + SLOT_BYTES
        )
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        assert SharedBatchSlots(1, 3).put(BATCH, 0) is BATCH

    run_in_process(0, limited)


@pytest.mark.parametrize("held", [0, 1, 100])
def test_batches_stay_as_they_are_while_they_are_held(held: int) -> None:
    """However many the one who trains keeps, more than there are slots included."""
    task = SimpleNamespace(batch=lambda step: {"deep": {"step": torch.full((100, 100), step)}})
    kept: list[torch.Tensor] = []
    for step, batch in enumerate(loop.load_batches(task, 0, 60, workers=2)):
        kept = [*kept, batch["deep"]["step"]][-1 - held :]
        for age, one in enumerate(reversed(kept)):
            assert (one == step - age).all()
