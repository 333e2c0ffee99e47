"""openpi's PyTorch π0, of any geometry and with given weights, run on demand by another process;
see `openpi_pi0.py`.

It runs in a Python that has openpi's sources on its path and the Transformers that openpi patches;
nothing of ours is imported. openpi's two modules that need JAX are replaced here: one names sizes
of networks, the other prepares images. The two processes exchange JSON, a line each way: first what
to build; then one run for every empty line.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HEADS = (
    "state_proj",
    "action_in_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "action_out_proj",
)


def replace_jax_modules() -> None:
    """Let openpi's π0 be imported without JAX."""
    # Networks of these sizes are replaced after building.
    tiny = types.SimpleNamespace(
        width=8, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8
    )
    sizes: Any = types.ModuleType("openpi.models.gemma")
    sizes.get_config = lambda _: tiny
    images = types.ModuleType("openpi.models_pytorch.preprocessing_pytorch")
    for module in (sizes, images):
        parent, _, name = module.__name__.rpartition(".")
        setattr(importlib.import_module(parent), name, module)
        sys.modules[module.__name__] = module


def build_networks(request: dict[str, Any]) -> tuple[Any, Any]:
    """Build a PaliGemma and an expert of openpi's patched Transformers."""
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
    )

    activation = "gelu_pytorch_tanh"
    gemma_fields: dict[str, Any] = {
        "hidden_activation": activation,
        "use_adarms": False,
        "adarms_cond_dim": None,
    }
    config = PaliGemmaConfig(
        vision_config={
            **request["vision"],
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "hidden_act": activation,
        },
        text_config={
            **request["text"],
            **gemma_fields,
            "model_type": "gemma",
            "vocab_size": request["rows"],
        },
        projection_dim=request["text"]["hidden_size"],
        hidden_size=request["text"]["hidden_size"],
        image_token_index=request["rows"] - 1,
    )
    expert_config = GemmaConfig(**request["expert"], **gemma_fields, vocab_size=1)
    expert = GemmaForCausalLM(expert_config)
    expert.model.embed_tokens = None
    return PaliGemmaForConditionalGeneration(config), expert


def build_model(request: dict[str, Any]) -> Any:
    """Build openpi's π0 with the weights of a file."""
    replace_jax_modules()
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    config = types.SimpleNamespace(
        pi05=False,
        paligemma_variant="",
        action_expert_variant="",
        dtype=request["dtype"],
        action_dim=request["action"],
        action_horizon=request["horizon"],
        pytorch_compile_mode=request["compile"],
    )
    with torch.device("meta"):
        model = PI0Pytorch(config)
    networks = model.paligemma_with_expert
    networks.paligemma, networks.gemma_expert = build_networks(request)
    networks.to_bfloat16_for_selected_params(request["dtype"])

    width = request["expert"]["hidden_size"]
    model.state_proj = torch.nn.Linear(request["state"], width)
    model.action_in_proj = torch.nn.Linear(request["action"], width)
    model.action_time_mlp_in = torch.nn.Linear(2 * width, width)
    model.action_time_mlp_out = torch.nn.Linear(width, width)
    model.action_out_proj = torch.nn.Linear(width, request["action"])

    modules = {"vlm.": networks.paligemma.model, "expert.": networks.gemma_expert.model}
    for name in HEADS:
        modules[f"{name}."] = getattr(model, name)
    weights = load_file(request["weights"])
    for prefix, module in modules.items():
        load_weights(module, prefix, weights)
    return model.to(request["device"]).eval()


def load_weights(module: Any, prefix: str, weights: dict[str, torch.Tensor]) -> None:
    """Load the weights whose names begin with the prefix."""
    module_weights = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            module_weights[name.removeprefix(prefix)] = weight
    missing, surplus = module.load_state_dict(module_weights, strict=False)
    if missing or surplus:
        raise RuntimeError(f"weights do not fit: {prefix}: missing {missing}, too many {surplus}")


def load_observation(model: Any, request: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Return what `sample_actions` takes: an observation and noise.

    The model gets the observation's parts as they are, without openpi's preprocessing.
    """
    tensors = load_file(request["observation"], device=request["device"])
    images = list(tensors["images"].unbind(1))
    is_present = torch.ones(len(tensors["state"]), dtype=torch.bool, device=request["device"])
    text_mask = torch.ones_like(tensors["ids"], dtype=torch.bool)
    parts = (
        images,
        [is_present] * len(images),
        tensors["ids"],
        text_mask,
        tensors["state"],
    )
    model._preprocess_observation = lambda *_, **__: parts
    return types.SimpleNamespace(state=tensors["state"]), tensors["noise"]


def serve(request: dict[str, Any], answers: Any) -> None:
    """Build, save the actions, then run as often as asked."""
    torch.manual_seed(0)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    model = build_model(request)
    observation, noise = load_observation(model, request)

    def run() -> torch.Tensor:
        actions = model.sample_actions(
            request["device"], observation, noise=noise, num_steps=request["steps"]
        )
        if request["device"] == "cuda":
            torch.cuda.synchronize()
        return actions

    Path(request["actions"]).write_text(json.dumps(run().float().cpu().tolist()))
    answer(answers, ready=True)
    for _ in sys.stdin:
        clock_start = time.perf_counter()
        processor_start = time.process_time()
        run()
        clock_s = time.perf_counter() - clock_start
        processor_s = time.process_time() - processor_start
        answer(answers, clock=clock_s, processor=processor_s)


def answer(answers: Any, **content: Any) -> None:
    print(json.dumps(content), file=answers, flush=True)


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what others print is no answer
    try:
        serve(json.loads(sys.stdin.readline()), answers)
    except Exception as error:  # the other process reports whatever openpi may raise
        lines = (str(error) or type(error).__name__).splitlines()
        answer(answers, error=lines[0])


if __name__ == "__main__":
    main()
