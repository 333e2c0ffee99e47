"""Export of acting as two ONNX graphs, and acting by them.

The graph `prefix.onnx` reads images and prompt, once per observation, and returns the keys and
values of the VLM. The graph `flow_step.onnx` is the action expert, and runs once per flow step. The
Euler steps between (`spear.flow.integrate`) stay outside, so that the number of steps can change.

Shapes are fixed: one observation with all views of the policy, and a prompt that is padded on the
right to `prompt_tokens`.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from spear import flow
from spear.errors import SpearError, import_optional
from spear.models.layers import FastRMSNorm, KVCache
from spear.models.sampling import relative_difference
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.models.vision import DinoEmbeddings, SiglipEmbeddings
from spear.models.vlm import Prefix
from spear.types import Action, Array, FlowConfig, WidthAndHeight
from spear.util.files import read_json_as, write_text

FEATURE = "the export of a policy"  # named in the error if a package is not installed
OPSET = 18  # the ONNX version of the graphs; TensorRT 10, onnxruntime and OpenVINO read it
GRAPHS = ("prefix", "flow_step")
MAX_DIFFERENCE = 1e-4
"""How far the exported graphs may be from the network in float32, by `relative_difference` (our
choice)."""

RunGraph = Callable[[Mapping[str, Array]], list[Array]]
"""Runs a graph: input name -> array, to the outputs in order."""


@dataclass(frozen=True)
class ExportedPolicy:
    """The content of export.json: what is needed to act by the two graphs.

    image_sizes    View -> (width, height) in pixels.
    prompt_tokens  Length of the padded prompt, L.
    num_visual_tokens  T, the tokens of all views.
    horizon        H, actions per chunk.
    steps          The policy's own number of Euler steps.
    flow           Fields of `spear.types.FlowConfig`.
    """

    image_sizes: dict[str, WidthAndHeight]
    prompt_tokens: int
    num_visual_tokens: int
    horizon: int
    steps: int
    flow: dict[str, Any]

    @staticmethod
    def load(folder: Path) -> "ExportedPolicy":
        """Read export.json of a folder that `export_policy` has written."""
        return read_json_as(ExportedPolicy, folder / "export.json", "export the policy again")


class PrefixGraph(nn.Module):
    """Images and prompt to the keys and values of the VLM.

    Inputs:
        pixels: per view [1, 3, h, w] uint8, in the order of `views`.
        input_ids: [1, L].
        attention_mask: [1, L], 0 on padding.

    Outputs:
        keys: [layers, 1, kv heads, T + L, head_dim].
        values: likewise.
    """

    def __init__(self, model: Spear1ForActionPrediction, views: list[str]) -> None:
        super().__init__()
        self.model = model
        self.views = views

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run the VLM; see the class for the inputs and outputs."""
        *pixels, input_ids, attention_mask = inputs
        pixel_values = dict(zip(self.views, pixels, strict=True))
        prefix = self.model.encode_prefix(pixel_values, input_ids, attention_mask)
        return torch.stack(prefix.cache.keys), torch.stack(prefix.cache.values)


class ActionExpertGraph(nn.Module):
    """One prediction of the action expert.

    Inputs:
        keys: [layers, 1, kv heads, T + L, head_dim], from the prefix graph.
        values: likewise.
        attention_mask: [1, L], 0 on padding of the prompt.
        state: [1, 10].
        noisy_actions: [1, H, 8], the state of the flow.
        flow_time: [1], τ.

    Output:
        prediction: [1, H, 8], a velocity or a clean action.
    """

    def __init__(self, model: Spear1ForActionPrediction, num_visual_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_visual_tokens = num_visual_tokens

    def forward(
        self,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor,
        state: Tensor,
        noisy_actions: Tensor,
        flow_time: Tensor,
    ) -> Tensor:
        """Run the action expert; see the class for the inputs and the output."""
        cache = KVCache()
        cache.keys = list(keys.unbind(0))
        cache.values = list(values.unbind(0))
        cache.frozen = True
        is_text = attention_mask.bool()
        is_image = torch.ones(1, self.num_visual_tokens, dtype=torch.bool, device=keys.device)
        valid = torch.cat([is_image, is_text], dim=1)
        prefix = Prefix(cache, valid, hidden=keys[:0])  # the expert does not read `hidden`
        noisy = Action.from_vector(noisy_actions)
        return self.model.predict(prefix, state, noisy, flow_time).to_vector()


def export_policy(
    model: Spear1ForActionPrediction,
    image_sizes: Mapping[str, WidthAndHeight],
    prompt_tokens: int,
    folder: Path,
) -> ExportedPolicy:
    """Write the two graphs in float32, and export.json.

    Args:
        model: The policy's network, which stays as it is.
        image_sizes: View -> (width, height) in pixels.
        prompt_tokens: The longest prompt, to which prompts are padded.
        folder: Where to write.

    Raises:
        SpearError: The package onnx is not installed.
    """
    import_optional("onnx", "onnx", FEATURE)
    import_optional("onnxscript", "onnx", FEATURE)
    patch_px = model.config.vlm_config.vision_config.patch_size
    num_visual_tokens = 0
    for width, height in image_sizes.values():
        num_visual_tokens += (width // patch_px) * (height // patch_px)
    exported = ExportedPolicy(
        image_sizes=dict(image_sizes),
        prompt_tokens=prompt_tokens,
        num_visual_tokens=num_visual_tokens,
        horizon=model.config.horizon,
        steps=model.flow_config.steps,
        flow=asdict(model.flow_config),
    )

    exportable = _make_exportable(model, image_sizes)
    example = make_example(exported)
    prefix_inputs = _list_prefix_inputs(exported)
    views = list(image_sizes)
    prefix_graph = PrefixGraph(exportable, views)
    _export(prefix_graph, example, prefix_inputs, ["keys", "values"], folder / "prefix.onnx")

    with torch.no_grad():
        keys, values = prefix_graph(*(torch.from_numpy(example[name]) for name in prefix_inputs))
    example |= {
        "keys": keys.numpy(),
        "values": values.numpy(),
        "flow_time": np.zeros(1, np.float32),
    }
    step_graph = ActionExpertGraph(exportable, num_visual_tokens)
    step_inputs = ["keys", "values", "attention_mask", "state", "noisy_actions", "flow_time"]
    _export(step_graph, example, step_inputs, ["prediction"], folder / "flow_step.onnx")
    write_text(folder / "export.json", json.dumps(asdict(exported), indent=1))
    return exported


def _make_exportable(
    model: Spear1ForActionPrediction, image_sizes: Mapping[str, WidthAndHeight]
) -> Any:
    """Copy a model in float32, with norms that consist of PyTorch's own operations, and with
    position embeddings that were resampled to the image sizes in advance."""
    exportable = copy.deepcopy(model).float().eval().requires_grad_(False)
    for module in exportable.modules():
        if isinstance(module, FastRMSNorm):
            module.__class__ = GemmaRMSNorm  # type: ignore[assignment]
        if isinstance(module, SiglipEmbeddings | DinoEmbeddings):
            _precompute_position_embeddings(module, image_sizes)
    return exportable


@torch.no_grad()
def _precompute_position_embeddings(module: Any, image_sizes: Mapping[str, WidthAndHeight]) -> None:
    """Let a module look up the position embeddings of the image sizes instead of resampling."""
    tables = {}
    for width, height in image_sizes.values():
        tables[height, width] = module.interpolate_pos_encoding(None, height, width).detach()
    module.interpolate_pos_encoding = lambda _, height, width: tables[height, width]


def _list_prefix_inputs(exported: ExportedPolicy) -> list[str]:
    """Return the names of the inputs of the prefix graph, in order."""
    pixels = [f"pixels_{view}" for view in exported.image_sizes]
    return [*pixels, "input_ids", "attention_mask"]


def _export(
    graph: nn.Module,
    example: Mapping[str, Array],
    input_names: list[str],
    output_names: list[str],
    file: Path,
) -> None:
    """Write a graph, whose shapes are those of the example."""
    inputs = tuple(torch.from_numpy(example[name]) for name in input_names)
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            graph,
            inputs,
            input_names=input_names,
            output_names=output_names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(file)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """A context that suppresses warnings of exporters, which are about their own code."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


def make_example(exported: ExportedPolicy, seed: int = 0) -> dict[str, Array]:
    """Make the inputs of acting by the graphs for one random observation.

    Half of the prompt is padding. The flow begins at the noise "noisy_actions".
    """
    generator = torch.Generator().manual_seed(seed)
    example: dict[str, Array] = {}
    for view, (width, height) in exported.image_sizes.items():
        pixels = torch.randint(0, 256, (1, 3, height, width), generator=generator)
        example[f"pixels_{view}"] = pixels.to(torch.uint8).numpy()
    num_words = math.ceil(exported.prompt_tokens / 2)
    mask = torch.arange(exported.prompt_tokens)[None] < num_words
    # Any words will do. Ids from 3 on are words; smaller ids are special tokens, such as padding.
    ids = torch.randint(3, 16, (1, exported.prompt_tokens), generator=generator) * mask
    noise = flow.sample_noise((1, exported.horizon), FlowConfig(**exported.flow), generator)
    return {
        **example,
        "input_ids": ids.numpy(),
        "attention_mask": mask.long().numpy(),
        "state": torch.randn(1, NUM_STATE_FEATURES, generator=generator).numpy(),
        "noisy_actions": noise.to_vector().numpy(),
    }


# --- Acting by the graphs ---


def load_onnxruntime_graphs(
    folder: Path, suffix: str = "", num_threads: int = 1
) -> dict[str, RunGraph]:
    """Load the two graphs by onnxruntime, on a CPU.

    Args:
        folder: What `export_policy` has written.
        suffix: "" for float32, "_int8" for the files of `write_int8_graphs`.
        num_threads: Number of threads of each graph.
    """
    onnxruntime = import_optional("onnxruntime", "onnx", FEATURE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    graphs: dict[str, RunGraph] = {}
    for name in GRAPHS:
        session = onnxruntime.InferenceSession(
            str(folder / f"{name}{suffix}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        graphs[name] = partial(_run_onnxruntime, session)
    return graphs


def _run_onnxruntime(session: Any, inputs: Mapping[str, Array]) -> list[Array]:
    return session.run(None, dict(inputs))


def load_openvino_graphs(
    folder: Path, suffix: str = "", num_threads: int = 1
) -> dict[str, RunGraph]:
    """Load the two graphs by OpenVINO, on a CPU, in float32. The arguments are those of
    `load_onnxruntime_graphs`."""
    openvino = import_optional("openvino", "openvino", FEATURE)
    settings = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    graphs: dict[str, RunGraph] = {}
    for name in GRAPHS:
        compiled = openvino.Core().compile_model(folder / f"{name}{suffix}.onnx", "CPU", settings)
        graphs[name] = partial(_run_openvino, compiled)
    return graphs


def _run_openvino(compiled: Any, inputs: Mapping[str, Array]) -> list[Array]:
    return list(compiled(dict(inputs)).values())


def sample_by_graphs(
    graphs: Mapping[str, RunGraph],
    exported: ExportedPolicy,
    inputs: Mapping[str, Array],
    steps: int | None = None,
) -> Tensor:
    """Sample actions [1, H, 8] in normalized units by the two graphs.

    Args:
        graphs: From `load_onnxruntime_graphs` or `load_openvino_graphs`.
        exported: The content of export.json.
        inputs: The names that `make_example` makes.
        steps: Number of Euler steps; None is the policy's own.
    """
    names = _list_prefix_inputs(exported)
    keys, values = graphs["prefix"]({name: inputs[name] for name in names})
    constant_inputs = {
        "keys": keys,
        "values": values,
        "attention_mask": inputs["attention_mask"],
        "state": inputs["state"],
    }

    def predict(noisy: Action, tau: Tensor) -> Action:
        (prediction,) = graphs["flow_step"](
            {
                **constant_inputs,
                "noisy_actions": noisy.to_vector().numpy(),
                "flow_time": tau.float().numpy(),
            }
        )
        return Action.from_vector(torch.from_numpy(np.asarray(prediction)))

    noise = Action.from_vector(torch.from_numpy(inputs["noisy_actions"]))
    num_steps = exported.steps if steps is None else steps
    return flow.integrate(predict, noise, num_steps, FlowConfig(**exported.flow)).to_vector()


def sample_by_network(
    model: Spear1ForActionPrediction, exported: ExportedPolicy, inputs: Mapping[str, Array]
) -> Tensor:
    """Sample by the network what `sample_by_graphs` samples by the graphs."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    actions = model.sample_actions(
        pixel_values={view: tensors[f"pixels_{view}"] for view in exported.image_sizes},
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        state=tensors["state"],
        noise=Action.from_vector(tensors["noisy_actions"]),
    )
    return actions.to_vector()


def measure_and_check_graph_difference(model: Spear1ForActionPrediction, folder: Path) -> float:
    """Compare the exported graphs, run by onnxruntime, with the network on a random observation.

    Returns:
        The difference, by `relative_difference`.

    Raises:
        SpearError: The difference is larger than `MAX_DIFFERENCE`.
    """
    exported = ExportedPolicy.load(folder)
    inputs = make_example(exported, seed=1)
    actions = sample_by_graphs(load_onnxruntime_graphs(folder), exported, inputs)
    difference = relative_difference(actions, sample_by_network(model, exported, inputs))
    if not difference <= MAX_DIFFERENCE:  # also if it is NaN
        raise SpearError(
            f"the graphs in {folder} differ from the network by {difference:.1e}. Report this line."
        )
    return difference


def write_int8_graphs(folder: Path) -> None:
    """Write copies of a folder's graphs whose matrix products are in 8 bits (`…_int8.onnx`).

    The float32 graphs stay. Weights have a scale per output, and inputs are rounded while the
    graph runs.
    """
    quantization = import_optional("onnxruntime.quantization", "onnx", FEATURE)
    for name in GRAPHS:
        with _quiet_exporter():
            quantization.quantize_dynamic(
                folder / f"{name}.onnx",
                folder / f"{name}_int8.onnx",
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                # Only products with weights. The products of attention have no constant factor.
                extra_options={"MatMulConstBOnly": True},
            )
