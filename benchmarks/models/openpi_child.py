"""openpi's PyTorch π0, of any geometry and with given weights, run on demand by another process; see
`openpi_pi0.py`.

It runs in a Python that has openpi's sources on its path and the Transformers that openpi patches; nothing of
ours is imported. openpi's two modules that need JAX are not: the one names sizes of networks, the other
prepares images, and both are given here. Speaks JSON, a line each way: what to build; then, for every empty
line, one run.
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


def without_jax() -> None:
    """Let openpi's π0 be imported without JAX."""
    sizes: Any = types.ModuleType("openpi.models.gemma")
    # Replaced after building by networks of the size that is wanted.
    sizes.get_config = lambda _: types.SimpleNamespace(
        width=8, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8
    )
    images = types.ModuleType("openpi.models_pytorch.preprocessing_pytorch")
    for module in (sizes, images):
        parent, _, name = module.__name__.rpartition(".")
        setattr(importlib.import_module(parent), name, module)
        sys.modules[module.__name__] = module


def networks(wanted: dict[str, Any]) -> tuple[Any, Any]:
    """A PaliGemma and an expert of openpi's patched Transformers, of the size that is wanted."""
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
    )

    plain: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "use_adarms": False,
        "adarms_cond_dim": None,
    }
    config = PaliGemmaConfig(
        vision_config={
            **wanted["vision"],
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "hidden_act": "gelu_pytorch_tanh",
        },
        text_config={
            **wanted["text"],
            **plain,
            "model_type": "gemma",
            "vocab_size": wanted["rows"],
        },
        projection_dim=wanted["text"]["hidden_size"],
        hidden_size=wanted["text"]["hidden_size"],
        image_token_index=wanted["rows"] - 1,
    )
    expert = GemmaForCausalLM(GemmaConfig(**wanted["expert"], **plain, vocab_size=1))
    expert.model.embed_tokens = None
    return PaliGemmaForConditionalGeneration(config), expert


def build(wanted: dict[str, Any]) -> Any:
    """openpi's π0 with the weights of a file."""
    without_jax()
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    precision, states, width = wanted["dtype"], wanted["state"], wanted["expert"]["hidden_size"]
    config = types.SimpleNamespace(
        pi05=False,
        paligemma_variant="",
        action_expert_variant="",
        dtype=precision,
        action_dim=wanted["action"],
        action_horizon=wanted["horizon"],
        pytorch_compile_mode=wanted["compile"],
    )
    with torch.device("meta"):
        model = PI0Pytorch(config)
    inner = model.paligemma_with_expert
    inner.paligemma, inner.gemma_expert = networks(wanted)
    inner.to_bfloat16_for_selected_params(precision)
    model.state_proj = torch.nn.Linear(states, width)
    model.action_in_proj = torch.nn.Linear(wanted["action"], width)
    model.action_time_mlp_in = torch.nn.Linear(2 * width, width)
    model.action_time_mlp_out = torch.nn.Linear(width, width)
    model.action_out_proj = torch.nn.Linear(width, wanted["action"])
    places = {
        "vlm.": inner.paligemma.model,
        "expert.": inner.gemma_expert.model,
        **{
            f"{name}.": getattr(model, name)
            for name in (
                "state_proj",
                "action_in_proj",
                "action_time_mlp_in",
                "action_time_mlp_out",
                "action_out_proj",
            )
        },
    }
    weights = load_file(wanted["weights"])
    for prefix, module in places.items():
        inside = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        missing, surplus = module.load_state_dict(inside, strict=False)
        if missing or surplus:
            raise RuntimeError(
                f"weights do not fit: {prefix}: missing {missing}, too many {surplus}"
            )
    return model.to(wanted["device"]).eval()


def observation(model: Any, wanted: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """What `sample_actions` takes: an observation, whose parts the model is handed as they are, and noise."""
    given = load_file(wanted["observation"], device=wanted["device"])
    images = list(given["images"].unbind(1))
    there = torch.ones(len(given["state"]), dtype=torch.bool, device=wanted["device"])
    words = torch.ones_like(given["ids"], dtype=torch.bool)
    seen = images, [there] * len(images), given["ids"], words, given["state"]
    model._preprocess_observation = lambda *_, **__: seen
    return types.SimpleNamespace(state=given["state"]), given["noise"]


def main() -> None:
    """Build, answer with the actions, then run as often as asked."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what others print is no answer

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        wanted = json.loads(sys.stdin.readline())
        torch.manual_seed(0)
        if wanted["threads"]:
            torch.set_num_threads(wanted["threads"])
        model = build(wanted)
        given, noise = observation(model, wanted)

        def run() -> torch.Tensor:
            found = model.sample_actions(
                wanted["device"], given, noise=noise, num_steps=wanted["steps"]
            )
            if wanted["device"] == "cuda":
                torch.cuda.synchronize()
            return found

        Path(wanted["actions"]).write_text(json.dumps(run().float().cpu().tolist()))
        say(ready=True)
        for _ in sys.stdin:
            clock, processor = time.perf_counter(), time.process_time()
            run()
            say(clock=time.perf_counter() - clock, processor=time.process_time() - processor)
    except Exception as error:  # whatever openpi may raise is for the other side to tell
        say(error=(str(error) or type(error).__name__).splitlines()[0])


if __name__ == "__main__":
    main()
