"""What is computed once from a network's weights, and again only when these have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")
Places = list[tuple[dict[str, Any], str]]


class Prepared(Generic[Value]):
    """`make(module, *options)`, kept as long as the module lives and its weights stay what and where they
    are.

    watch  the parts whose weights count; by default all of the module.
    The result must not refer to the module itself. It is kept beside the module, not in it: copies and
    checkpoints of the module know nothing of it.
    """

    def __init__(
        self,
        make: Callable[..., Value],
        watch: Callable[[Any], Sequence[nn.Module]] = lambda module: [module],
    ) -> None:
        self._make, self._watch = make, watch
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Places, list[int], Value]]]
        self._kept = WeakKeyDictionary()

    def __call__(self, module: nn.Module, *options: Hashable) -> Value:
        """The result for a module, as its weights are now."""
        kept = self._kept.get(module, {}).get(options)
        if kept is not None and _stamp(kept[0]) == kept[1]:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(module, *options)
        parts = {part for watched in self._watch(module) for part in watched.modules()}
        if not any(isinstance(p, FakeTensor) for part in parts for p in part._parameters.values()):
            places = [
                (parent._modules, name)
                for parent in module.modules()
                for name, child in parent._modules.items()
                if child in parts and child is not None and child._parameters
            ]
            self._kept.setdefault(module, {})[options] = (places, _stamp(places), value)
        return value


def _stamp(places: Places) -> list[int]:
    """What changes when a layer is replaced, or a weight is replaced, moved or written to."""
    stamp = []
    for modules, name in places:
        module = modules[name]
        stamp.append(id(module))
        for weight in module._parameters.values():
            if weight is not None:
                stamp += (weight.data_ptr(), weight._version)
    return stamp
