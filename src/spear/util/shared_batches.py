"""Sends batches from worker processes through shared memory that is mapped once.

PyTorch itself makes new shared memory for every tensor, clears it, sends its descriptor through a
socket and maps it, which takes longer (benchmarks/measurements.md). Here each worker has some
*slots*, pieces of shared memory of `SLOT_BYTES` each. It copies a batch into a free slot, and sends
only the places of the tensors in the slot.
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

SLOT_BYTES = 256 * 2**20  # of one batch; only pages that are written take memory (our choice)
ALIGNMENT_BYTES = 64  # every tensor begins at a multiple of this, a cache line


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies in its slot, and what is needed to read it.

    Attributes:
        offset: where the tensor's first byte lies in the slot, in bytes.
        dtype: type of the elements.
        shape: the tensor's shape.
        stride: the tensor's strides, in elements.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, slot: Array) -> torch.Tensor:
        """Return the tensor, as a view of its slot [SLOT_BYTES] uint8.

        The tensor keeps the array `slot` alive.
        """
        num_bytes = self.dtype.itemsize * math.prod(self.shape)
        tensor_bytes = slot[self.offset : self.offset + num_bytes]
        return torch.from_numpy(tensor_bytes).view(self.dtype).as_strided(self.shape, self.stride)


class SlottedBatch(NamedTuple):
    """A batch whose tensors are in a slot. A worker sends it to the parent process.

    Attributes:
        slot: the worker's number, and the slot's number among the slots of that worker.
        batch: the batch, with a `TensorLocation` in place of each tensor.
    """

    slot: tuple[int, int]
    batch: dict[str, Any]


class SharedBatchSlots:
    """The slots of all worker processes, which must be forked after this object is made.

    Args:
        num_workers: number of worker processes.
        slots_per_worker: number of slots of each worker; with 0, batches are sent without slots.
    """

    def __init__(self, num_workers: int, slots_per_worker: int) -> None:
        try:
            self._memory = [_map_slots(slots_per_worker) for _ in range(num_workers)]
        except OSError:  # this machine does not give so much memory: work without slots
            self._memory = []
            slots_per_worker = 0

        # A shared flag per slot. A worker sets the flag when it fills the slot, and the parent
        # process clears it. (Memory of 0 bytes cannot be mapped.)
        num_slots = num_workers * slots_per_worker
        flag_memory = mmap.mmap(-1, max(num_slots, 1))
        shared_flags = np.frombuffer(flag_memory, bool)[:num_slots]
        self._is_taken = shared_flags.reshape(num_workers, slots_per_worker)

    def put(self, batch: dict[str, Any], worker: int) -> SlottedBatch | dict[str, Any]:
        """In the process of a worker: copy a batch into a free slot of this worker.

        Returns the batch itself if the worker has no free slot, or the batch is too large for one.

        Args:
            batch: the batch.
            worker: the worker's number.
        """
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        # The bytes of the batch in a slot are at most this many, as each tensor is aligned.
        max_bytes = sum(tensor.nbytes + ALIGNMENT_BYTES for tensor in tensors)
        if max_bytes > SLOT_BYTES or self._is_taken[worker].all():
            return batch
        number = int(self._is_taken[worker].argmin())  # the first slot whose flag is False
        self._is_taken[worker, number] = True
        slot = np.frombuffer(self._memory[worker][number], np.uint8)
        offset = 0

        def copy_into_slot(tensor: torch.Tensor) -> TensorLocation:
            """Copy a tensor behind the tensors that are in the slot already."""
            nonlocal offset
            # `empty_like` keeps the order of the dimensions in memory, without gaps between them.
            stride = torch.empty_like(tensor, device="meta").stride()
            location = TensorLocation(offset, tensor.dtype, tuple(tensor.shape), stride)
            location.view(slot).copy_(tensor)
            num_lines = math.ceil(tensor.nbytes / ALIGNMENT_BYTES)
            offset += num_lines * ALIGNMENT_BYTES
            return location

        locations = tree_map_only(torch.Tensor, copy_into_slot, batch)
        return SlottedBatch((worker, number), locations)

    def take(self, slotted: SlottedBatch) -> dict[str, Any]:
        """In the parent process: return a batch whose tensors are views of its slot.

        The slot becomes free when all of these tensors are gone, because then nothing keeps the
        array `slot` alive.
        """
        worker, number = slotted.slot
        slot = np.frombuffer(self._memory[worker][number], np.uint8)
        # When the array is gone, this sets `self._is_taken[slotted.slot] = False`.
        weakref.finalize(slot, self._is_taken.__setitem__, slotted.slot, False)
        return tree_map_only(TensorLocation, lambda location: location.view(slot), slotted.batch)


def _map_slots(num_slots: int) -> list[mmap.mmap]:
    """Map shared memory for the slots of one worker."""
    return [mmap.mmap(-1, SLOT_BYTES) for _ in range(num_slots)]
