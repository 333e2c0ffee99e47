"""SPEAR-VLM → SPEAR-1: an action expert that is new, or π0's published one.

π0 is read under the names of openpi's PyTorch port and LeRobot (`paligemma_with_expert.gemma_expert.model.…`)
and of Transformers (`model.dit.…`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spear.errors import SpearError
from spear.models.presets import TOKEN_IDS, preset
from spear.models.spear1 import STATE_FEATURES, Spear1Config, Spear1ForActionPrediction
from spear.models.vlm import SpearVLMConfig, SpearVLMForConditionalGeneration
from spear.models.weights.backbones import own_config
from spear.models.weights.conversion import Conversion, match
from spear.models.weights.keys import Key, KeyReport
from spear.models.weights.shards import Part, Shards, reading
from spear.types import ACTION_DIM

_RENAMED = (
    ("model.", ""),
    ("dit.", "expert."),
    ("paligemma_with_expert.gemma_expert.model.", "expert."),
    ("embed_action_time.", ""),
)
"""Beginnings of π0's names -> of ours, one after the other."""
_UNUSED = {
    "vlm.": "π0's own VLM, in whose place SPEAR-VLM is",
    "paligemma_with_expert.paligemma.": "π0's own VLM, in whose place SPEAR-VLM is",
    "expert.embed_tokens.": "the expert reads no text",
    "paligemma_with_expert.gemma_expert.lm_head.": "the expert says no text",
    "normalize_": "statistics of π0's data",
    "unnormalize_": "statistics of π0's data",
}
_ENDS = {
    "state_proj": (1, STATE_FEATURES),
    "action_in_proj": (1, ACTION_DIM),
    "action_out_proj": (0, ACTION_DIM),
}
"""The layers that take a robot's state or actions: the axis of the weight that is theirs, and its size
here."""


def plan_policy(
    vlm: SpearVLMForConditionalGeneration | Path | str,
    expert: Path | str | None = None,
    size: str = "spear1",
    flow: Mapping[str, Any] | None = None,
) -> Conversion[Spear1ForActionPrediction]:
    """SPEAR-VLM and an action expert → SPEAR-1, with all names and shapes checked and nothing read yet.

    vlm     a model, a folder, or a name on the Hub.
    expert  None: a new one of the preset's width, as deep as the VLM. Else a π0 in safetensors: a folder, or
            a name on the Hub. Of its layers that take states and give actions those are loaded that have our
            sizes (state 10, action 8); the others are new, since their numbers mean other things. π0's
            velocity points from the data to the noise, so its last layer is negated; it is new where the flow
            predicts clean actions.
    size    the preset of the horizon, the flow and a new expert. flow: fields of `spear.flow.FlowConfig`
            instead of the preset's.

    Raises `SpearError` as `plan_backbones` does, and for an expert that does not fit the VLM.
    """
    numbers = preset(size)
    inner, stored, vlm_dtype = _inner(vlm)
    text = inner.text_config
    shards = None if expert is None else Shards.open(expert, "π0")
    if shards is None:
        fields = {**numbers.expert, **{n: getattr(text, n) for n in _SHARED}}
        names: dict[str, str] = {}
    else:
        names = _expert_names(shards)
        fields = _expert_fields(shards, names, text.head_dim)
    periods = (
        {}
        if shards is None
        else {k: v for k, v in shards.config.items() if k in ("min_period", "max_period")}
    )
    config = Spear1Config(
        vlm_config=inner,
        expert_config={**fields, "vocab_size": 1, **dict.fromkeys(TOKEN_IDS)},
        horizon=numbers.horizon,
        flow=dict(numbers.flow if flow is None else flow),
        **periods,
    )
    with torch.device("meta"):
        wanted = Spear1ForActionPrediction(copy.deepcopy(config)).state_dict()

    inside = {k: v for k, v in wanted.items() if k.startswith("vlm.")}
    outside = {k: v for k, v in wanted.items() if k not in inside}
    parts: list[Part] = []
    sources = {"SPEAR-VLM": str(vlm) if isinstance(vlm, str | Path) else "a model in memory"}
    if isinstance(stored, Shards):
        ours = {f"vlm.{name}": name for name in stored.weights}
        keys, found = match(inside, stored, ours, "SPEAR-VLM")
        for name, theirs in ours.items():
            if name not in inside:
                keys.append(
                    Key(theirs, stored.weights[theirs].shape, "refused", "SPEAR-VLM has no such weight")
                )
        parts.append(reading(stored, found))
    else:
        keys = [Key(k, tuple(v.shape), "loaded", "SPEAR-VLM: the model") for k, v in inside.items()]
        parts.append(_of_model(stored))
    if shards is None:
        keys += [_new(name, weight, config) for name, weight in outside.items()]
    else:
        keys += _pi0(outside, shards, names, config, parts)
        sources["action expert"] = str(expert)
    return Conversion(Spear1ForActionPrediction, config, KeyReport(keys), parts, vlm_dtype, sources)


_SHARED = ("num_hidden_layers", "num_key_value_heads", "head_dim")
"""What the expert has in common with the VLM, whose keys and values it reads."""


def _inner(
    vlm: SpearVLMForConditionalGeneration | Path | str,
) -> tuple[SpearVLMConfig, SpearVLMForConditionalGeneration | Shards, torch.dtype]:
    """A SPEAR-VLM's config, weights and dtype."""
    if isinstance(vlm, SpearVLMForConditionalGeneration):
        return copy.deepcopy(vlm.config), vlm, vlm.dtype
    shards = Shards.open(vlm, "SPEAR-VLM")
    config = own_config(shards, SpearVLMConfig)
    return config, shards, shards.dtype(next(iter(shards.weights)))


def _of_model(vlm: SpearVLMForConditionalGeneration) -> Part:
    def part(dtype: torch.dtype, _: torch.Generator) -> dict[str, torch.Tensor]:
        return {f"vlm.{name}": weight.to(dtype) for name, weight in vlm.state_dict().items()}

    return part


def _expert_names(shards: Shards) -> dict[str, str]:
    """Our names -> π0's, of all its weights. Raises `SpearError` when it is not a π0."""
    names = {}
    for name in shards.weights:
        ours = name
        for there, here in _RENAMED:
            ours = here + ours.removeprefix(there) if ours.startswith(there) else ours
        names[ours] = name
    if any(".dense." in name or name.startswith("time_mlp_") for name in names):
        raise SpearError(
            f"another architecture: {shards.folder} is a π0.5, whose norms depend on time: give a π0 (lerobot/pi0_base)"
        )
    if "expert.layers.0.self_attn.q_proj.weight" not in names:
        raise SpearError(
            f"another architecture: {shards.folder} holds no action expert: give a π0 (lerobot/pi0_base)"
        )
    return names


def _expert_fields(shards: Shards, names: Mapping[str, str], head_dim: int) -> dict[str, int]:
    """The sizes of π0's expert, from the shapes of its weights."""
    layers = {name.split(".")[2] for name in names if name.startswith("expert.layers.")}

    def rows(layer: str) -> int:
        name = f"expert.layers.0.{layer}.weight"
        if name not in names:
            raise SpearError(f"checkpoint incomplete: {shards.folder} has no {name}: copy it again")
        return shards.weights[names[name]].shape[0]

    return {
        "hidden_size": rows("input_layernorm"),
        "intermediate_size": rows("mlp.gate_proj"),
        "num_attention_heads": rows("self_attn.q_proj") // head_dim,
        "num_key_value_heads": rows("self_attn.k_proj") // head_dim,
        "num_hidden_layers": len(layers),
        "head_dim": head_dim,
    }


def _pi0(
    wanted: Mapping[str, torch.Tensor],
    shards: Shards,
    names: Mapping[str, str],
    config: Spear1Config,
    parts: list[Part],
) -> list[Key]:
    """The keys of π0's expert; what reads them is added to `parts`."""
    clean = (config.flow or {})["prediction"] == "clean"
    fresh = [k for k in wanted if _is_fresh(k, shards, names, clean)]
    keys, found = match({k: v for k, v in wanted.items() if k not in fresh}, shards, names, "π0")
    last = {ours: name for ours, name in found.items() if ours.startswith("action_out_proj.")}
    keys = [
        Key(k.name, k.shape, k.status, f"{k.note}, negated: π0's velocity points to the noise")
        if k.name in last
        else k
        for k in keys
    ]
    parts.append(reading(shards, {ours: name for ours, name in found.items() if ours not in last}))
    parts.append(reading(shards, last, sign=-1.0))
    keys += [_new(name, wanted[name], config) for name in fresh]
    for ours, name in names.items():
        if ours in wanted and ours not in fresh:
            continue
        shape = shards.weights[name].shape
        why = next((reason for start, reason in _UNUSED.items() if ours.startswith(start)), None)
        if ours in fresh:
            why = "its states and actions mean other numbers"
        if why is None:
            keys.append(Key(name, shape, "refused", "the action expert has no such weight"))
        else:
            keys.append(Key(name, shape, "left out", why))
    return keys


def _is_fresh(name: str, shards: Shards, names: Mapping[str, str], clean: bool) -> bool:
    """Whether this layer starts new although a π0 is given: its states or actions are not ours."""
    if name.split(".")[0] not in _ENDS:
        return False
    if name.startswith("action_out_proj.") and clean:
        return True
    stored = names.get(name.rpartition(".")[0] + ".weight")
    axis, ours = _ENDS[name.split(".")[0]]
    return stored is not None and shards.weights[stored].shape[axis] != ours


def _new(name: str, weight: torch.Tensor, config: Spear1Config) -> Key:
    """A new weight, with the initialisation that `Spear1ForActionPrediction` gives it."""
    shape = tuple(weight.shape)
    if name.startswith("expert."):
        how = (
            "0 (a scale of 1)"
            if name.endswith("norm.weight")
            else f"N(0, {config.expert_config.initializer_range}²)"
        )
    elif name == "action_out_proj.weight":
        how = f"N(0, 0.01 / {shape[1]})"
    elif name == "action_out_proj.bias" and (config.flow or {})["prediction"] == "clean":
        how = "the action that stays"
    else:
        how = "0" if name.endswith("bias") else f"N(0, 1 / {shape[1]})"
    return Key(name, shape, "new", how)
