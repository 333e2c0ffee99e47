"""The code that a CUDA graph records does the same work for all values of its tensors.

A CUDA graph repeats the work of its recording. So the code must not read values, allocate tensors
whose size depends on values, copy from or to another device, or draw random numbers. Here a
`CaptureMonitor` notices such operations. The tests run the code on the `meta` device, where tensors
have no values. If PyTorch is built with CUDA, they also run it on fake tensors of a GPU, which need
no GPU.
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
from spear.models.meter import replace_meta_by_fake_tensors
from spear.models.presets import PRESETS, Preset, build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM

Tensor = torch.Tensor

FEW_ROWS_BENCHMARK = Path(__file__).parents[2] / "benchmarks/models/few_rows.py"
NUM_PROMPT_TOKENS = 6
# PyTorch's tags of operations whose work or result depends on values or on random numbers.
TAGS_OF_VALUE_DEPENDENCE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


def make_shallow(preset: Preset) -> Preset:
    """The preset with two layers per network, which is enough because all layers do the same."""
    networks = {}
    for network in ("vision", "text", "expert"):
        networks[network] = {**getattr(preset, network), "num_hidden_layers": 2}
    return dataclasses.replace(preset, **networks)


WITHOUT_PACKING = False  # a value of the argument `packed` of `sampling.get_sampler`
SIZES = {name: make_shallow(PRESETS[name]) for name in ("nano", "spear1")}
SIZES["linear"] = dataclasses.replace(SIZES["nano"], flow={"rotation": "linear"})

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA"
)
# Parameters of the fixture `empty_policy`: (name in SIZES, device, precision).
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
    """Asking for the autocast state of the meta device is an error, so the answer is always no."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)


class CaptureMonitor(TorchDispatchMode):
    """Counts the operations, and collects the names of those that a graph cannot record.

    forbidden  The names of these operations.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.num_operations = 0
        self.forbidden: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or self.device)
        # A graph can record neither work that depends on values, nor a new tensor on another
        # device.
        if _depends_on_values(func, name, args) or device.type != self.device:
            self.forbidden.append(name)

        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, result)):
            if not isinstance(tensor, Tensor) or tensor.device.type == self.device:
                continue
            # A number on the CPU (a tensor without dimensions) becomes a constant of a kernel,
            # unless it is copied.
            if tensor.dim() > 0 or "copy" in name:
                self.forbidden.append(name)
        self.num_operations += 1
        return result


def _depends_on_values(func: Any, name: str, args: Any) -> bool:
    """Whether an operation's work depends on the values of its tensors or on random numbers."""
    # Attention has a tag because of its dropout, which we do not use.
    if "scaled_dot_product" in name:
        return False
    if "aten.index.Tensor" in name:
        # Indexing by a mask has a result whose size depends on the mask's values. Indexing by
        # integers has one element per integer.
        indices = args[1]
        has_mask = any(index is not None and index.dtype == torch.bool for index in indices)
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
def test_monitor_reports_operations_that_a_graph_cannot_record(name: str) -> None:
    """The meta device itself raises errors for some of them, after the monitor has noticed."""
    with CaptureMonitor("meta") as monitor, contextlib.suppress(RuntimeError):
        FORBIDDEN_FUNCTIONS[name](torch.ones(4, device="meta"))

    assert monitor.forbidden


def make_observation(
    size: Preset, batch: int, has_optional: bool, device: str
) -> dict[str, Tensor]:
    """The named tensors that `sampling.sample_actions` takes, without values.

    With `has_optional`, they include masks for padding and missing views, and committed actions.
    """
    # Name of a tensor -> (type, shape of one batch row).
    tensor_specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for view, (width, height) in size.image_sizes.items():
        tensor_specs[f"pixels/{view}"] = (torch.uint8, (3, height, width))
    tensor_specs["input_ids"] = (torch.long, (NUM_PROMPT_TOKENS,))
    tensor_specs["state"] = (torch.float32, (NUM_STATE_FEATURES,))
    tensor_specs["noise"] = (torch.float32, (size.horizon, ACTION_DIM))
    if has_optional:
        tensor_specs["attention_mask"] = (torch.long, (NUM_PROMPT_TOKENS,))
        tensor_specs["present/wrist"] = (torch.bool, ())
        tensor_specs["committed"] = (torch.float32, (size.horizon, ACTION_DIM))
        tensor_specs["is_committed"] = (torch.bool, (size.horizon,))

    observation = {}
    for name, (dtype, shape) in tensor_specs.items():
        observation[name] = torch.empty(batch, *shape, dtype=dtype, device=device)
    return observation


def monitor_sampling(method: str, model: Any, inputs: dict[str, Tensor]) -> CaptureMonitor:
    """Sample actions under a monitor, by the method "plain" or "fast"."""
    num_steps = 3
    packed = True
    sampler = sampling.get_sampler(model, packed)
    sampler.compute_time_embeddings(num_steps)  # they are computed before a graph is recorded
    with torch.no_grad(), CaptureMonitor(model.device.type) as monitor:
        if method == "plain":
            sampling.sample_plain(model, inputs, num_steps)
        else:
            sampling._sample(model, sampler, inputs, num_steps)
    return monitor


@pytest.fixture(params=CAPTURE_POINTS)
def empty_policy(request: pytest.FixtureRequest) -> Iterator[tuple[Preset, Any]]:
    """A preset and a policy of this size, whose weights have no values."""
    name, device, dtype = request.param
    # On the meta device, because drawing weights as fake tensors would read values.
    with torch.device("meta"):
        config = build_spear1_config(SIZES[name])
        model = Spear1ForActionPrediction._from_config(config, dtype=dtype).eval()
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        if device == "cuda":
            replace_meta_by_fake_tensors(model, device)
        yield SIZES[name], model


@pytest.mark.parametrize("method", ["plain", "fast"])
def test_a_graph_can_record_acting(empty_policy: tuple[Preset, Any], method: str) -> None:
    size, model = empty_policy
    device = model.device.type
    one_observation = make_observation(size, batch=1, has_optional=False, device=device)
    three_observations = make_observation(size, batch=3, has_optional=True, device=device)

    for inputs in (one_observation, three_observations):
        monitor = monitor_sampling(method, model, inputs)

        assert monitor.num_operations > 100  # the monitor saw the whole network
        assert not monitor.forbidden


def test_a_graph_can_record_answering(empty_policy: tuple[Preset, Any]) -> None:
    """The answer is a given word, a 3D token and the end token."""
    size, model = empty_policy
    packed = True
    compiled = False
    layers = decode.get_layer_stack(model.vlm.language_model, packed, compiled)
    # The ranges (first, end) of the ids that each of the three tokens may have.
    given_word = (5, 6)
    any_3d_token = (size.vocabulary_size, size.vocabulary_size + size.bins)
    end_token = (1, 2)
    ranges = [given_word, any_3d_token, end_token]
    observation = make_observation(size, batch=2, has_optional=False, device=model.device.type)
    inputs = {name: observation[name] for name in ("pixels/external", "input_ids")}

    with torch.no_grad(), CaptureMonitor(model.device.type) as monitor:
        decode._decode(model.vlm, layers, inputs, ranges)

    assert monitor.num_operations > 100  # the monitor saw the whole network
    assert not monitor.forbidden


class FakeGpu:
    """A stand-in for `torch.cuda`, on a machine without a GPU.

    It collects the devices for which streams are made or entered, and counts the replays of graphs.
    """

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
    """The thread's current GPU may be another one, because each thread begins with GPU 0."""
    x = torch.ones(2)
    gpu = FakeGpu(monkeypatch, x.device)

    recorded = cuda_graphs._record(add_one, {"x": x})

    assert set(gpu.stream_devices) == {x.device}
    assert torch.equal(recorded.result_buffer, recorded.input_buffers["x"] + 1)


def test_a_function_that_cannot_be_recorded_leaves_the_others_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recording fails for the long input. The short one is recorded, and replayed once."""
    short = torch.ones(2)
    long = torch.ones(3)
    gpu = FakeGpu(monkeypatch, short.device)
    record = cuda_graphs._record

    def record_short_only(function: Any, inputs: Any) -> Any:
        if len(inputs["x"]) == 3:
            raise RuntimeError("out of memory")
        return record(function, inputs)

    monkeypatch.setattr(cuda_graphs, "_record", record_short_only)
    cache = cuda_graphs.CudaGraphCache()

    with pytest.warns(Notice, match="without CUDA graphs"):
        for x in (long, short, long):
            assert torch.equal(cache(add_one, {"x": x}), x + 1)

    assert gpu.num_replays == 1


class FakeStream:
    """A stand-in for a CUDA stream, with a log of its calls.

    Events are numbered from 0 in the order in which the stream records them.
    """

    device = ""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_events = 0

    def record_event(self) -> int:
        event = self.num_events
        self.num_events += 1
        self.log.append(f"records event {event}")
        return event

    def wait_event(self, event: int) -> None:
        self.log.append(f"waits for event {event}")

    def wait_stream(self, _: Any) -> None:
        self.log.append("waits for another stream")


@pytest.fixture
def parallel_stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """One `FakeStream` in place of all streams. The code is told that a graph is being recorded."""
    stream = FakeStream()
    monkeypatch.setattr(sampling, "is_capturing_graph", lambda: True)
    monkeypatch.setattr(linear, "_get_side_streams", lambda device, count: [stream])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return stream


def make_policy_and_inputs() -> tuple[Any, dict[str, Tensor]]:
    """A policy on the CPU with two layers per network, and inputs of ones."""
    config = build_spear1_config(SIZES["nano"])
    model = Spear1ForActionPrediction._from_config(config).eval()
    observation = make_observation(SIZES["nano"], batch=1, has_optional=False, device="cpu")
    inputs = {name: torch.ones_like(tensor) for name, tensor in observation.items()}
    return model, inputs


def test_the_first_flow_step_waits_for_the_prefix_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The actions are those of running the prefix first, without parallel streams."""
    model, inputs = make_policy_and_inputs()
    sampler = sampling.get_sampler(model, WITHOUT_PACKING)
    with torch.no_grad():
        in_turn = sampling._sample(model, sampler, inputs, steps=2)
        # From here on, the code finds that a graph is being recorded.
        stream: FakeStream = request.getfixturevalue("parallel_stream")

        in_parallel = sampling._sample(model, sampler, inputs, steps=2)

    assert torch.equal(in_parallel, in_turn)
    # One `FakeStream` stands for the prefix's stream and for the action expert's.
    assert stream.log == [
        "records event 0",  # the prefix has written the keys and values of its first layer
        "records event 1",  # the prefix has written those of its second layer
        "waits for event 0",  # the action expert begins after the prefix's first layer
        "waits for event 0",  # the expert's first layer needs the prefix's first layer
        "waits for event 1",  # the expert's second layer needs the prefix's second layer
        "waits for another stream",  # the prefix's stream waits for the action expert
    ]


def test_an_expert_in_another_precision_runs_after_the_prefix(parallel_stream: FakeStream) -> None:
    model, inputs = make_policy_and_inputs()
    model.expert.bfloat16()

    with torch.no_grad():
        sampler = sampling.get_sampler(model, WITHOUT_PACKING)
        sampling._sample(model, sampler, inputs, steps=2)

    assert parallel_stream.log == []


@pytest.mark.parametrize("batch", ["1", "2"])
def test_few_rows_compute_what_the_fused_stack_computes(batch: str) -> None:
    """The benchmark of few_rows.py prints the largest relative differences between its Triton
    kernels and a `LayerStack`. The kernels run on a GPU or in Triton's interpreter."""
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
