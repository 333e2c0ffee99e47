"""What becomes a CUDA graph does the same work whatever is in its tensors.

No look at values, no allocation whose size depends on them, no copy from or to another device, no random
numbers. On the `meta` device tensors have no values, so that nothing can depend on them. Where PyTorch is
built with CUDA, all of it runs on fake tensors of a GPU, too, which need none.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spear.models import decode, sampling
from spear.models.fast import linear, stack
from spear.models.meter import allocate_storage
from spear.models.presets import PRESETS, Preset, build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM

Tensor = torch.Tensor
VALUES = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


def shallow(size: Preset) -> Preset:
    """A preset with two layers of each network, which is faster; all layers do the same."""
    parts = ("vision", "text", "expert")
    networks = {part: {**getattr(size, part), "num_hidden_layers": 2} for part in parts}
    return dataclasses.replace(size, **networks)


SIZES = {name: shallow(PRESETS[name]) for name in ("nano", "spear1")}
SIZES["linear"] = dataclasses.replace(SIZES["nano"], flow={"rotation": "linear"})
built = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA"
)
PLACES = [(name, "meta", torch.float32) for name in SIZES]
PLACES += [
    (name, "cuda", dtype)
    for name in ("nano", "spear1")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)


class Watch(TorchDispatchMode):
    """Counts the operations, and notes those that a graph cannot hold."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count, self.wrong = device, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        # Attention draws for dropout, of which we have none.
        tags = set() if "scaled_dot_product" in name else VALUES & set(func.tags)
        if "aten.index.Tensor" in name:  # by numbers, it is as large as these
            tags = {
                tag
                for tag in tags
                for part in args[1]
                if part is not None and part.dtype == torch.bool
            }
        if tags or torch.device(kwargs.get("device") or self.device).type != self.device:
            self.wrong.append(name)
        made = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, made)) if isinstance(t, Tensor)]
        # A number on the CPU becomes a constant, unless it is copied.
        if any(t.device.type != self.device and (t.dim() or "copy" in name) for t in tensors):
            self.wrong.append(name)
        self.count += 1
        return made


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "looks": lambda x: x * float(x.sum()),
    "branches": lambda x: x + 1 if x.sum() > 0 else -x,
    "grows": lambda x: x[x > 0],
    "finds": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "leaves": lambda x: x.cpu(),
    "arrives": lambda x: x + torch.ones(4, device="cpu").to(x.device),
    "a number arrives": lambda x: x + torch.tensor(2.0, device="cpu").to(x.device),
    "draws": lambda x: x + torch.randn_like(x),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_a_graph_cannot_hold_is_seen(bad: str) -> None:
    with Watch("meta") as watch, contextlib.suppress(RuntimeError):
        BAD[bad](torch.ones(4, device="meta"))
    assert watch.wrong


def observation(size: Preset, batch: int, full: bool, device: str) -> dict[str, Tensor]:
    """Arguments of `sampling.sample_actions`; full: with padding, missing views and committed actions."""
    actions = torch.float32, (size.horizon, ACTION_DIM)
    sizes = size.image_sizes.items()
    given = {f"pixels/{view}": (torch.uint8, (3, high, wide)) for view, (wide, high) in sizes}
    given |= {
        "input_ids": (torch.long, (6,)),
        "state": (torch.float32, (NUM_STATE_FEATURES,)),
        "noise": actions,
    }
    if full:
        given |= {"attention_mask": (torch.long, (6,)), "present/wrist": (torch.bool, ())}
        given |= {"committed": actions, "is_committed": (torch.bool, (size.horizon,))}
    return {
        n: torch.empty(batch, *shape, dtype=kind, device=device)
        for n, (kind, shape) in given.items()
    }


def act(way: str, model: Any, inputs: dict[str, Tensor]) -> Watch:
    sampler = sampling.get_sampler(model, True)
    sampler.time_embeddings(3)  # made before a graph is recorded
    with torch.no_grad(), Watch(model.device.type) as watch:
        if way == "plain":
            sampling.sample_plain(model, inputs, 3)
        else:
            sampling._sample(model, sampler, inputs, 3)
    return watch


@pytest.fixture(
    params=[pytest.param(place, marks=built if place[1] == "cuda" else ()) for place in PLACES],
    ids=lambda place: "-".join(map(str, place)),
)
def empty(request: pytest.FixtureRequest) -> Iterator[tuple[Preset, Any]]:
    """A policy without contents: with most and with fewest parts of its own, and with linear rotations."""
    name, device, dtype = request.param
    with torch.device("meta"):  # with fake tensors, drawing weights would look at some
        model = Spear1ForActionPrediction._from_config(
            build_spear1_config(SIZES[name]), dtype=dtype
        ).eval()
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        if device == "cuda":
            allocate_storage(model, device)
        yield SIZES[name], model


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_acting_is_what_a_graph_can_hold(empty: tuple[Preset, Any], way: str) -> None:
    size, model = empty
    for batch, full in ((1, False), (3, True)):
        watch = act(way, model, observation(size, batch, full, model.device.type))
        assert watch.count > 100 and not watch.wrong


def test_answering_is_what_a_graph_can_hold(empty: tuple[Preset, Any]) -> None:
    size, model = empty
    layers = decode.get_layer_stack(model.vlm.language_model, True, False)
    spans = [(5, 6), (size.vocabulary, size.vocabulary + size.bins), (1, 2)]
    given = observation(size, 2, full=False, device=model.device.type)
    inputs = {name: given[name] for name in ("pixels/external", "input_ids")}
    with torch.no_grad(), Watch(model.device.type) as watch:
        decode._decode(model.vlm, layers, inputs, spans)
    assert watch.count > 100 and not watch.wrong


def test_a_graph_is_recorded_on_the_gpu_of_its_inputs_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread's current GPU may be another one: each thread begins with the first."""
    made: list[Any] = []

    class Stream:
        def __init__(self, device: Any = "the current one") -> None:
            self.device = device
            made.append(device)

        def wait_stream(self, other: Any) -> None:
            assert other.device == self.device

    @contextlib.contextmanager
    def graph(_: Any, stream: Any, **how: Any) -> Any:
        assert stream.device == x.device and how["capture_error_mode"] == "thread_local"
        assert stack._RECORDING.locked()
        yield

    x = torch.ones(2)
    for name, fake in (("Stream", Stream), ("current_stream", Stream), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda s: contextlib.nullcontext(made.append(s.device))
    )
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: made.append(0))
    )
    _, places, result = stack._record(lambda given: given["x"] + 1, {"x": x})
    assert set(made) == {x.device} and torch.equal(result, places["x"] + 1)
    cache, record = stack.CudaGraphCache(), stack._record
    monkeypatch.setattr(
        stack, "_record", lambda f, given: record(f, given) if len(given["x"]) < 3 else 1 / 0
    )
    for each in (
        torch.ones(3),
        x,
        torch.ones(3),
    ):  # one that cannot be recorded leaves the others theirs
        assert torch.equal(cache(lambda given: given["x"] + 1, {"x": each}), each + 1)
    assert made.count(0) == 1  # replays


def test_the_first_flow_step_runs_beside_the_prefix_and_waits_for_its_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = []
    stream = SimpleNamespace(
        device="", wait_event=said.append, wait_stream=lambda _: said.append("joined"),
        record_event=lambda: said.append("layer") or said.count("layer") - 1,
    )  # fmt: skip
    model = Spear1ForActionPrediction._from_config(build_spear1_config(SIZES["nano"])).eval()
    given = {n: torch.ones_like(t) for n, t in observation(SIZES["nano"], 1, False, "cpu").items()}
    sampler = sampling.get_sampler(model, False)
    with torch.no_grad():
        alone = sampling._sample(model, sampler, given, 2)
        monkeypatch.setattr(sampling, "is_capturing_graph", lambda: True)
        monkeypatch.setattr(linear, "_branches", lambda device, count: [stream])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        assert torch.equal(sampling._sample(model, sampler, given, 2), alone)
        model.expert.bfloat16()
        sampling._sample(model, sampling.get_sampler(model, False), given, 2)  # all in turn
    assert said == ["layer", "layer", 0, 0, 1, "joined"]


@pytest.mark.parametrize("batch", ["1", "2"])
def test_few_rows_are_what_the_stack_gives(batch: str) -> None:
    """Triton's kernels: on a GPU as they act, else in Triton's interpreter, which needs NumPy before 2.4."""
    pytest.importorskip("triton")
    gpu, script = (
        torch.cuda.is_available(),
        Path(__file__).parents[2] / "benchmarks/models/few_rows.py",
    )
    if not gpu and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter needs NumPy before 2.4")
    way = ["--device", "cuda" if gpu else "cpu", "--batch", batch, "--repeats", "1"]
    env = os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"})
    said = subprocess.run(
        [sys.executable, str(script), *way], env=env, capture_output=True, text=True
    )
    found = re.search(r"difference: (\S+) .* (\S+)$", said.stdout, re.MULTILINE)
    assert found, said.stderr
    assert max(map(float, found.groups())) < (0.05 if gpu else 1e-5)
