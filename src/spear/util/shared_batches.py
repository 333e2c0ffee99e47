"""Batches from worker processes in memory that was mapped before they began, filled again and again.

PyTorch's own way makes new shared memory for every tensor, clears it, sends its descriptor through a socket
and maps it (docs/speed.md). Here a batch is copied into a slot, and where it lies is sent.
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

SLOT_BYTES = 256 * 2**20
"""Bytes of a slot, which take memory where they are written to (our choice)."""
ALIGNMENT = 64


@dataclass(frozen=True)
class TensorLocation:
    """Where in its slot a tensor lies, in bytes, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, slot: Array) -> torch.Tensor:
        """The tensor, in the memory of `slot` [SIZE] uint8, which it keeps from being filled again."""
        own = slot[self.offset : self.offset + self.dtype.itemsize * math.prod(self.shape)]
        return torch.from_numpy(own).view(self.dtype).as_strided(self.shape, self.stride)


class SlottedBatch(NamedTuple):
    """A batch in a slot: as it was made, with a `TensorLocation` for each tensor."""

    slot: tuple[int, int]
    batch: dict[str, Any]


class SharedBatchSlots:
    """Slots for batches of worker processes, which are forked later: `each` for each of them, or none (0)."""

    def __init__(self, workers: int, each: int) -> None:
        try:
            self._memory = [
                [mmap.mmap(-1, SLOT_BYTES) for _ in range(each)] for _ in range(workers)
            ]
        except OSError:  # so much may not be asked for here: batches come as they are
            self._memory, each = [], 0
        self._taken = np.frombuffer(mmap.mmap(-1, workers * each or 1), bool)[: workers * each]
        self._taken = self._taken.reshape(workers, each)

    def put(self, batch: dict[str, Any], worker: int) -> SlottedBatch | dict[str, Any]:
        """In a worker: `batch` in a free slot, or as it is where none is free or it is too large for one."""
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        if (
            sum(tensor.nbytes + ALIGNMENT for tensor in tensors) > SLOT_BYTES
            or self._taken[worker].all()
        ):
            return batch
        number, end = int(self._taken[worker].argmin()), 0
        self._taken[worker, number] = True
        slot = np.frombuffer(self._memory[worker][number], np.uint8)

        def placed(tensor: torch.Tensor) -> TensorLocation:
            nonlocal end
            stride = torch.empty_like(tensor, device="meta").stride()
            place = TensorLocation(end, tensor.dtype, tuple(tensor.shape), stride)
            place.of(slot).copy_(tensor)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return place

        return SlottedBatch((worker, number), tree_map_only(torch.Tensor, placed, batch))

    def take(self, handed: SlottedBatch) -> dict[str, Any]:
        """Here: the batch. Its slot is filled again when nobody holds a tensor of it any more."""
        worker, number = handed.slot
        slot = np.frombuffer(self._memory[worker][number], np.uint8)
        weakref.finalize(slot, self._taken.__setitem__, handed.slot, False)
        return tree_map_only(TensorLocation, lambda place: place.of(slot), handed.batch)
