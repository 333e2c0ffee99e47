"""What becomes a CUDA graph does the same work whatever is in its tensors.

It does not look at values, allocates nothing whose size depends on them, copies nothing from or to
another device, and draws no random numbers. On the `meta` device tensors have no values, so that
nothing can depend on them. Where PyTorch is built with CUDA, all of it also runs on fake tensors of
a GPU, which need none.
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

from spear.errors import Notice
from spear.models import decode, sampling
from spear.models.fast import cuda_graphs, linear
from spear.models.meter import allocate_storage
from spear.models.presets import PRESETS, Preset, build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM

Tensor = torch.Tensor

FEW_ROWS_BENCHMARK = Path(__file__).parents[2] / "benchmarks/models/few_rows.py"
NUM_PROMPT_TOKENS = 6
TAGS_OF_VALUE_DEPENDENCE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


def make_shallow(preset: Preset) -> Preset:
    """A preset with two layers of each network, which is faster; all layers do the same."""
    networks = {}
    for network in ("vision", "text", "expert"):
        networks[network] = {**getattr(preset, network), "num_hidden_layers": 2}
    return dataclasses.replace(preset, **networks)


WITHOUT_PACKING = False  # the "packed" argument of `sampling.get_sampler`
SIZES = {name: make_shallow(PRESETS[name]) for name in ("nano", "spear1")}
SIZES["linear"] = dataclasses.replace(SIZES["nano"], flow={"rotation": "linear"})

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA"
)
CAPTURE_POINTS = [
    pytest.param((name, "meta", torch.float32), id=f"{name}-meta-torch.float32") for name in SIZES
]
for _name in ("nano", "spear1"):
    for _dtype in (torch.float32, torch.bfloat16):
        CAPTURE_POINTS.append(
            pytest.param(
                (_name, "cuda", _dtype), id=f"{_name}-cuda-{_dtype}", marks=needs_cuda_build
            )
        )


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)


class CaptureMonitor(TorchDispatchMode):
    """Counts the operations, and collects the names of those that a graph cannot hold."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.num_operations = 0
        self.forbidden: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or self.device)
        if _depends_on_values(func, name, args) or device.type != self.device:
            self.forbidden.append(name)

        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, result)):
            if not isinstance(tensor, Tensor) or tensor.device.type == self.device:
                continue
            # A number on the CPU becomes a constant, unless it is copied.
            if tensor.dim() > 0 or "copy" in name:
                self.forbidden.append(name)
        self.num_operations += 1
        return result


def _depends_on_values(func: Any, name: str, args: Any) -> bool:
    # Attention draws for dropout, of which we have none.
    if "scaled_dot_product" in name:
        return False
    if "aten.index.Tensor" in name:
        # An index by numbers gives as many elements as there are numbers; one by a mask does not.
        has_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
        if not has_mask:
            return False
    return bool(TAGS_OF_VALUE_DEPENDENCE & set(func.tags))


FORBIDDEN_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "reads a value": lambda x: x * float(x.sum()),
    "branches on a value": lambda x: x + 1 if x.sum() > 0 else -x,
    "selects by a mask": lambda x: x[x > 0],
    "finds nonzero": lambda x: x.nonzero(),
    "finds unique": lambda x: x.unique(),
    "copies to the CPU": lambda x: x.cpu(),
    "copies from the CPU": lambda x: x + torch.ones(4, device="cpu").to(x.device),
    "copies a number from the CPU": lambda x: x + torch.tensor(2.0, device="cpu").to(x.device),
    "draws random numbers": lambda x: x + torch.randn_like(x),
}


@pytest.mark.parametrize("name", FORBIDDEN_FUNCTIONS)
def test_monitor_reports_what_a_graph_cannot_hold(name: str) -> None:
    with CaptureMonitor("meta") as monitor, contextlib.suppress(RuntimeError):
        FORBIDDEN_FUNCTIONS[name](torch.ones(4, device="meta"))

    assert monitor.forbidden


def make_observation(size: Preset, batch: int, full: bool, device: str) -> dict[str, Tensor]:
    """Arguments of `sampling.sample_actions`.

    full: with padding, missing views and committed actions.
    """
    actions = torch.float32, (size.horizon, ACTION_DIM)
    tensor_specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for view, (width, height) in size.image_sizes.items():
        tensor_specs[f"pixels/{view}"] = torch.uint8, (3, height, width)
    tensor_specs["input_ids"] = torch.long, (NUM_PROMPT_TOKENS,)
    tensor_specs["state"] = torch.float32, (NUM_STATE_FEATURES,)
    tensor_specs["noise"] = actions
    if full:
        tensor_specs["attention_mask"] = torch.long, (NUM_PROMPT_TOKENS,)
        tensor_specs["present/wrist"] = torch.bool, ()
        tensor_specs["committed"] = actions
        tensor_specs["is_committed"] = torch.bool, (size.horizon,)

    observation = {}
    for name, (dtype, shape) in tensor_specs.items():
        observation[name] = torch.empty(batch, *shape, dtype=dtype, device=device)
    return observation


def monitor_sampling(way: str, model: Any, inputs: dict[str, Tensor]) -> CaptureMonitor:
    sampler = sampling.get_sampler(model, True)
    sampler.time_embeddings(3)  # made before a graph is recorded
    with torch.no_grad(), CaptureMonitor(model.device.type) as monitor:
        if way == "plain":
            sampling.sample_plain(model, inputs, 3)
        else:
            sampling._sample(model, sampler, inputs, 3)
    return monitor


@pytest.fixture(params=CAPTURE_POINTS)
def empty_policy(request: pytest.FixtureRequest) -> Iterator[tuple[Preset, Any]]:
    """A policy without contents: with most and with fewest tensor_specs of its own, and with linear
    rotations."""
    name, device, dtype = request.param
    with torch.device("meta"):  # with fake tensors, drawing weights would look at some
        config = build_spear1_config(SIZES[name])
        model = Spear1ForActionPrediction._from_config(config, dtype=dtype).eval()
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        if device == "cuda":
            allocate_storage(model, device)
        yield SIZES[name], model


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_a_graph_can_hold_acting(empty_policy: tuple[Preset, Any], way: str) -> None:
    size, model = empty_policy
    for batch, full in ((1, False), (3, True)):
        inputs = make_observation(size, batch, full, model.device.type)

        monitor = monitor_sampling(way, model, inputs)

        assert monitor.num_operations > 100
        assert not monitor.forbidden


def test_a_graph_can_hold_answering(empty_policy: tuple[Preset, Any]) -> None:
    size, model = empty_policy
    layers = decode.get_layer_stack(model.vlm.language_model, True, False)
    spans = [(5, 6), (size.vocabulary_size, size.vocabulary_size + size.bins), (1, 2)]
    observation = make_observation(size, 2, full=False, device=model.device.type)
    inputs = {name: observation[name] for name in ("pixels/external", "input_ids")}

    with torch.no_grad(), CaptureMonitor(model.device.type) as monitor:
        decode._decode(model.vlm, layers, inputs, spans)

    assert monitor.num_operations > 100
    assert not monitor.forbidden


class FakeGpu:
    """Stands in for `torch.cuda`: notes the devices of streams and counts replays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
        self.device = device
        self.stream_devices: list[Any] = []
        self.num_replays = 0
        monkeypatch.setattr(torch.cuda, "Stream", self._make_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", self._make_stream)
        monkeypatch.setattr(torch.cuda, "stream", self._enter_stream)
        monkeypatch.setattr(torch.cuda, "graph", self._record_graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self._make_graph)

    def _make_stream(self, device: Any = "the thread's current GPU") -> Any:
        self.stream_devices.append(device)

        def wait_stream(stream: Any) -> None:
            assert stream.device == device

        return SimpleNamespace(device=device, wait_stream=wait_stream)

    def _enter_stream(self, stream: Any) -> Any:
        self.stream_devices.append(stream.device)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _record_graph(self, _: Any, stream: Any, **options: Any) -> Iterator[None]:
        assert stream.device == self.device
        assert options["capture_error_mode"] == "thread_local"
        assert cuda_graphs._RECORDING_LOCK.locked()
        yield

    def _make_graph(self) -> Any:
        def replay() -> None:
            self.num_replays += 1

        return SimpleNamespace(replay=replay)


def add_one(inputs: cuda_graphs.Inputs) -> Tensor:
    return inputs["x"] + 1


def test_a_graph_is_recorded_on_the_gpu_of_its_inputs_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread's current GPU may be another one: each thread begins with the first."""
    x = torch.ones(2)
    gpu = FakeGpu(monkeypatch, x.device)

    recorded = cuda_graphs._record(add_one, {"x": x})

    assert set(gpu.stream_devices) == {x.device}
    assert torch.equal(recorded.result_buffer, recorded.input_buffers["x"] + 1)


def test_a_function_that_cannot_be_recorded_leaves_the_others_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, long = torch.ones(2), torch.ones(3)
    gpu = FakeGpu(monkeypatch, short.device)
    record = cuda_graphs._record

    def record_short_only(function: Any, inputs: Any) -> Any:
        if len(inputs["x"]) == 3:
            raise RuntimeError("out of memory")
        return record(function, inputs)

    monkeypatch.setattr(cuda_graphs, "_record", record_short_only)
    cache = cuda_graphs.CudaGraphCache()

    with pytest.warns(Notice, match="no CUDA graph"):
        for x in (long, short, long):
            assert torch.equal(cache(add_one, {"x": x}), x + 1)

    assert gpu.num_replays == 1


class FakeStream:
    """A stream that writes down what it waits for and records."""

    device = ""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.num_events = 0

    def record_event(self) -> int:
        self.log.append("layer")
        self.num_events += 1
        return self.num_events - 1

    def wait_event(self, event: int) -> None:
        self.log.append(event)

    def wait_stream(self, _: Any) -> None:
        self.log.append("joined")


@pytest.fixture
def parallel_stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """A stand-in for all streams, while a graph is said to be recorded."""
    stream = FakeStream()
    monkeypatch.setattr(sampling, "is_capturing_graph", lambda: True)
    monkeypatch.setattr(linear, "_get_side_streams", lambda device, count: [stream])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return stream


def make_policy_and_inputs() -> tuple[Any, dict[str, Tensor]]:
    config = build_spear1_config(SIZES["nano"])
    model = Spear1ForActionPrediction._from_config(config).eval()
    observation = make_observation(SIZES["nano"], 1, full=False, device="cpu")
    inputs = {name: torch.ones_like(tensor) for name, tensor in observation.items()}
    return model, inputs


def test_the_first_flow_step_waits_for_the_prefix_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, inputs = make_policy_and_inputs()
    sampler = sampling.get_sampler(model, WITHOUT_PACKING)
    with torch.no_grad():
        in_turn = sampling._sample(model, sampler, inputs, 2)
        stream: FakeStream = request.getfixturevalue("parallel_stream")

        in_parallel = sampling._sample(model, sampler, inputs, 2)

    assert torch.equal(in_parallel, in_turn)
    assert stream.log == [
        "layer",  # the prefix has written its first layer
        "layer",  # and its second
        0,  # the expert's branch begins after event 0, of the first layer
        0,  # its first layer waits for the first of the prefix
        1,  # its second layer waits for the second
        "joined",  # the main stream waits for the branch
    ]


def test_an_expert_in_another_precision_runs_after_the_prefix(parallel_stream: FakeStream) -> None:
    model, inputs = make_policy_and_inputs()
    model.expert.bfloat16()

    with torch.no_grad():
        sampling._sample(model, sampling.get_sampler(model, WITHOUT_PACKING), inputs, 2)

    assert parallel_stream.log == []


@pytest.mark.parametrize("batch", ["1", "2"])
def test_few_rows_compute_what_the_fused_stack_computes(batch: str) -> None:
    """Triton's kernels, on a GPU, or in Triton's interpreter, which needs NumPy before 2.4."""
    pytest.importorskip("triton")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter needs NumPy before 2.4")
    device = "cuda" if has_gpu else "cpu"
    environment = dict(os.environ)
    if not has_gpu:
        environment["TRITON_INTERPRET"] = "1"

    command = [sys.executable, str(FEW_ROWS_BENCHMARK)]
    command += ["--device", device, "--batch", batch, "--repeats", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)

    match = re.search(r"difference: (\S+) .* (\S+)$", result.stdout, re.MULTILINE)
    assert match, result.stderr
    max_difference = max(map(float, match.groups()))
    assert max_difference < (0.05 if has_gpu else 1e-5)
