"""A small π0 or π0.5 of openpi's PyTorch port, with random weights: saves it as openpi does, and
what it computes of given inputs. `openpi_conversion.py` starts it.

It runs in the Python that `openpi_pi0.py` describes; nothing of ours is imported. It gets one
argument, a JSON file with what to build.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model

from openpi_child import build_networks, replace_jax_modules


def build_model(request: dict[str, Any]) -> Any:
    """Build openpi's model with random weights."""
    replace_jax_modules()
    from openpi.models_pytorch import pi0_pytorch

    # The flow time is embedded in float32, as in JAX, where π0 was trained. openpi's port takes
    # float64, which changes velocities by 2·10⁻⁵.
    pi0_pytorch.get_safe_dtype = lambda *_: torch.float32
    config = types.SimpleNamespace(
        pi05=request["pi05"],
        paligemma_variant="",
        action_expert_variant="",
        dtype="float32",
        action_dim=request["action"],
        action_horizon=request["horizon"],
        pytorch_compile_mode=None,
    )
    with torch.device("meta"):
        model = pi0_pytorch.PI0Pytorch(config)
    networks = model.paligemma_with_expert
    networks.paligemma, networks.gemma_expert = build_networks(request)
    width = request["expert"]["hidden_size"]
    if request["pi05"]:
        networks.gemma_expert = build_adarms_expert(request["expert"])
        model.time_mlp_in = torch.nn.Linear(width, width)
        model.time_mlp_out = torch.nn.Linear(width, width)
    else:
        model.state_proj = torch.nn.Linear(request["state"], width)
        model.action_time_mlp_in = torch.nn.Linear(2 * width, width)
        model.action_time_mlp_out = torch.nn.Linear(width, width)
    model.action_in_proj = torch.nn.Linear(request["action"], width)
    model.action_out_proj = torch.nn.Linear(width, request["action"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def build_adarms_expert(expert: dict[str, Any]) -> Any:
    """Build π0.5's expert, whose norms depend on the flow time."""
    from transformers import GemmaConfig, GemmaForCausalLM

    fields: dict[str, Any] = {
        **expert,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_adarms": True,
        "adarms_cond_dim": expert["hidden_size"],
        "vocab_size": 1,
    }
    config = GemmaConfig(**fields)
    model = GemmaForCausalLM(config)
    model.model.embed_tokens = None
    return model


@torch.no_grad()
def compute_results(model: Any, request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return keys, values, hidden states, a velocity and actions, by name."""
    from openpi.models_pytorch.pi0_pytorch import make_att_2d_masks

    inputs = load_file(request["inputs"])
    images = list(inputs["images"].unbind(1))
    is_present = torch.ones(len(inputs["ids"]), dtype=torch.bool)
    text_mask = inputs["mask"].bool()
    parts = (images, [is_present] * len(images), inputs["ids"], text_mask, inputs["state"])

    # The prefix, as in openpi's `sample_actions`.
    embeddings, valid, blocks = model.embed_prefix(*parts[:4])
    mask = model._prepare_attention_masks_4d(make_att_2d_masks(valid, blocks))
    language_model = model.paligemma_with_expert.paligemma.language_model
    language_model.config._attn_implementation = "eager"
    _, cache = model.paligemma_with_expert.forward(
        attention_mask=mask,
        position_ids=torch.cumsum(valid, dim=1) - 1,
        past_key_values=None,
        inputs_embeds=[embeddings, None],
        use_cache=True,
    )
    results = {}
    for layer in range(request["text"]["num_hidden_layers"]):
        keys, values = cache[layer]
        results[f"keys {layer}"] = keys
        results[f"values {layer}"] = values

    # One step of the expert, whose layers' outputs are recorded.
    hidden_states: list[torch.Tensor] = []
    expert = model.paligemma_with_expert.gemma_expert.model
    hooks = []
    for module in expert.layers:
        hooks.append(
            module.register_forward_hook(lambda _, __, output: hidden_states.append(output[0]))
        )
    time = inputs["time"]
    results["velocity"] = model.denoise_step(inputs["state"], valid, cache, inputs["noise"], time)
    for hook in hooks:
        hook.remove()
    for layer, hidden in enumerate(hidden_states):
        results[f"hidden {layer}"] = hidden

    model._preprocess_observation = lambda *_, **__: parts
    observation = types.SimpleNamespace(state=inputs["state"])
    results["actions"] = model.sample_actions(
        "cpu", observation, noise=inputs["noise"], num_steps=request["steps"]
    )
    return {name: tensor.contiguous().clone() for name, tensor in results.items()}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    model = build_model(request)
    save_model(model, request["checkpoint"])
    save_file(compute_results(model, request), request["results"])


if __name__ == "__main__":
    main()
