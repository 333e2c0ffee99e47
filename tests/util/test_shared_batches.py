"""Batches in memory that two processes share arrive unchanged, and stay so while they are in use.

Each worker has some slots of shared memory. `put` copies a batch into a slot of a worker, and
`take` returns the batch in the parent process.
"""

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


def put_in_slot(slots: SharedBatchSlots, worker: int = 0) -> SlottedBatch:
    """Put the batch into a slot of a worker that has a free one."""
    slotted = slots.put(BATCH, worker)
    assert isinstance(slotted, SlottedBatch)
    return slotted


def put_by_a_fork_and_take() -> dict[str, Any]:
    """Put the batch into a slot in a forked process, and take it in this process."""
    worker = 1
    slots = SharedBatchSlots(num_workers=2, slots_per_worker=1)
    run_in_process(0, slots.put, BATCH, worker)
    # The forked process does not send us the locations of the tensors. They are the same in the
    # slots of another object.
    same_locations = put_in_slot(SharedBatchSlots(num_workers=2, slots_per_worker=1), worker)
    return slots.take(same_locations)


def test_a_batch_put_by_a_fork_is_taken_unchanged() -> None:
    taken_batch, structure = tree_flatten(put_by_a_fork_and_take())

    expected, expected_structure = tree_flatten(BATCH)
    assert structure == expected_structure  # keys are in the same order, too
    for leaf, expected_leaf in zip(taken_batch, expected, strict=True):
        assert type(leaf) is type(expected_leaf)
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == expected_leaf.dtype
            assert torch.equal(leaf, expected_leaf)
        else:
            assert leaf == expected_leaf


def test_strides_of_tensors_are_kept() -> None:
    taken_batch = put_by_a_fork_and_take()

    assert taken_batch["pixels"]["external"].stride() == BATCH["pixels"]["external"].stride()


def test_a_slot_is_free_when_the_last_tensor_of_its_batch_is_gone() -> None:
    slots = SharedBatchSlots(num_workers=1, slots_per_worker=1)
    batch = slots.take(put_in_slot(slots))
    view_of_pixels = batch["pixels"]["external"][1:].flatten()[3:].view(3, -1)
    view_of_state = batch["state"][:, 0]
    state_before = view_of_state.clone()

    del batch
    assert slots.put(BATCH, worker=0) is BATCH  # no slot is free, so `put` returns the batch itself
    del view_of_pixels
    assert slots.put(BATCH, worker=0) is BATCH
    assert torch.equal(view_of_state, state_before)
    del view_of_state
    gc.collect()
    assert isinstance(slots.put(BATCH, worker=0), SlottedBatch)


def test_a_batch_larger_than_a_slot_is_returned_as_it_is() -> None:
    large = {"pixels": {"external": torch.empty(SLOT_BYTES, dtype=torch.uint8)}}

    slots = SharedBatchSlots(num_workers=1, slots_per_worker=1)

    assert slots.put(large, worker=0) is large


def put_with_memory_for_one_slot() -> None:
    """Put a batch in a process that cannot map memory for its three slots."""
    num_used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = num_used_pages * resource.getpagesize() + SLOT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    assert SharedBatchSlots(num_workers=1, slots_per_worker=3).put(BATCH, worker=0) is BATCH


def test_batches_are_returned_as_they_are_without_memory_for_slots() -> None:
    run_in_process(0, put_with_memory_for_one_slot)


@pytest.mark.parametrize("num_held", [0, 1, 100])
def test_batches_do_not_change_while_they_are_held(num_held: int) -> None:
    """Earlier batches stay unchanged, even if the training holds more of them than there are slots.

    num_held: how many batches before the newest one are held.
    """
    task = SimpleNamespace(batch=lambda step: {"deep": {"step": torch.full((100, 100), step)}})
    held_tensors: list[torch.Tensor] = []

    for step, batch in enumerate(loop.load_pieces(task, 0, 60, workers=2)):
        held_tensors.append(batch["deep"]["step"])
        if len(held_tensors) > num_held + 1:
            held_tensors.pop(0)
        for age, tensor in enumerate(reversed(held_tensors)):  # the newest has age 0
            assert (tensor == step - age).all()
