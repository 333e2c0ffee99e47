"""How much memory a computation takes, measured on PyTorch's fake tensors, which have no values."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class MemoryMeter(TorchDispatchMode):
    """A context that counts the bytes of all tensors that operations make inside it.

    live  Bytes in use now.
    peak  The largest value of `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._counted_storages: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._record_storage, result)
        return result

    def _record_storage(self, tensor: Tensor) -> Tensor:
        """Count the tensor's storage once, and subtract it when the storage is freed."""
        # PyTorch keeps one Python object per storage, which lives as long as the storage.
        storage = tensor.untyped_storage()
        key = storage._cdata  # an address, by which PyTorch identifies the storage
        if key not in self._counted_storages:
            self._counted_storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())
        return tensor

    def _forget(self, key: int, num_bytes: int) -> None:
        """Subtract a storage that was freed."""
        self._counted_storages.discard(key)
        self.live -= num_bytes


def replace_meta_by_fake_tensors(model: torch.nn.Module, device: str = "cpu") -> None:
    """Replace a model's meta tensors, in place, by fake tensors on `device` with sized storage.

    Call it inside a `FakeTensorMode`, in which `torch.empty` makes fake tensors.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            fake = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
