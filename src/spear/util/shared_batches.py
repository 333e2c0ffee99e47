"""Batches from worker processes, through shared memory that is mapped once.

PyTorch's own way makes new shared memory for every tensor, clears it, sends its descriptor through
a socket and maps it (benchmarks/measurements.md). Here a worker copies a batch into a
slot of shared memory, and sends only where each tensor is.
"""

import math
import mmap
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from spear.types import Array

SLOT_BYTES = 256 * 2**20  # they take memory only where they are written to (our choice)
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is in its slot, and what it is.

    Attributes:
        offset: of its first byte.
        dtype: of its elements.
        shape: its sizes.
        stride: in elements.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, slot: Array) -> torch.Tensor:
        """The tensor in a slot [SLOT_BYTES] uint8, which stays taken as long as it lives."""
        num_bytes = self.dtype.itemsize * math.prod(self.shape)
        tensor_bytes = slot[self.offset : self.offset + num_bytes]
        return torch.from_numpy(tensor_bytes).view(self.dtype).as_strided(self.shape, self.stride)


class SlottedBatch(NamedTuple):
    """A batch whose tensors are in a slot.

    Attributes:
        slot: the worker's number, and the slot's number of that worker.
        batch: the batch, with a `TensorLocation` in place of each tensor.
    """

    slot: tuple[int, int]
    batch: dict[str, Any]


class SharedBatchSlots:
    """Slots of shared memory for the batches of worker processes, which are forked later.

    Args:
        num_workers: number of worker processes.
        slots_per_worker: number of slots of each; 0 means that batches are sent as they are.
    """

    def __init__(self, num_workers: int, slots_per_worker: int) -> None:
        try:
            self._memory = [_map_slots(slots_per_worker) for _ in range(num_workers)]
        except OSError:  # this machine does not give so much memory
            self._memory = []
            slots_per_worker = 0
        num_slots = num_workers * slots_per_worker
        shared_flags = np.frombuffer(mmap.mmap(-1, max(num_slots, 1)), bool)[:num_slots]
        self._is_taken = shared_flags.reshape(num_workers, slots_per_worker)

    def put(self, batch: dict[str, Any], worker: int) -> SlottedBatch | dict[str, Any]:
        """In a worker: copy a batch into a free slot.

        The batch is returned as it is if no slot is free, or if it is too large for one.
        """
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        max_bytes = sum(tensor.nbytes + ALIGNMENT_BYTES for tensor in tensors)
        if max_bytes > SLOT_BYTES or self._is_taken[worker].all():
            return batch
        number = int(self._is_taken[worker].argmin())
        self._is_taken[worker, number] = True
        slot = np.frombuffer(self._memory[worker][number], np.uint8)
        offset = 0

        def copy_into_slot(tensor: torch.Tensor) -> TensorLocation:
            nonlocal offset
            stride = torch.empty_like(tensor, device="meta").stride()
            location = TensorLocation(offset, tensor.dtype, tuple(tensor.shape), stride)
            location.view(slot).copy_(tensor)
            offset += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            return location

        locations = tree_map_only(torch.Tensor, copy_into_slot, batch)
        return SlottedBatch((worker, number), locations)

    def take(self, slotted: SlottedBatch) -> dict[str, Any]:
        """In the parent: reconstruct a batch. Its slot is free when all its tensors are gone."""
        worker, number = slotted.slot
        slot = np.frombuffer(self._memory[worker][number], np.uint8)
        weakref.finalize(slot, self._is_taken.__setitem__, slotted.slot, False)
        return tree_map_only(TensorLocation, lambda location: location.view(slot), slotted.batch)


def _map_slots(count: int) -> list[mmap.mmap]:
    """Map shared memory for the slots of one worker."""
    return [mmap.mmap(-1, SLOT_BYTES) for _ in range(count)]
