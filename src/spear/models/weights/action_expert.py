"""SPEAR-VLM → SPEAR-1: an action expert that is new, or π0's published one.

π0 is read under the names of openpi's PyTorch port and LeRobot (`paligemma_with_expert.gemma_expert.model.…`)
and of Transformers (`model.dit.…`).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError, check_known
from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1Config, Spear1ForActionPrediction
from spear.models.vlm import SpearVLMConfig
from spear.models.weights.conversion import (
    Conversion,
    ConversionReport,
    WeightStatus,
    match_weights,
    report_unused_weights,
)
from spear.models.weights.load import (
    StoredCheckpoint,
    WeightReader,
    describe_source,
    make_weight_reader,
)
from spear.types import ACTION_DIM

_RENAMED = (
    ("model.", ""),
    ("dit.", "expert."),
    ("paligemma_with_expert.gemma_expert.model.", "expert."),
    ("embed_action_time.", ""),
)
"""Beginnings of π0's names -> of ours, one after the other."""
_UNUSED = {
    r"vlm\.": "π0's own VLM, in whose place SPEAR-VLM is",
    r"paligemma_with_expert\.paligemma\.": "π0's own VLM, in whose place SPEAR-VLM is",
    r"expert\.embed_tokens\.": "the expert reads no text",
    r"paligemma_with_expert\.gemma_expert\.lm_head\.": "the expert says no text",
    r"(un)?normalize_": "statistics of π0's data",
}
_ENDS = {
    "state_proj": (1, NUM_STATE_FEATURES),
    "action_in_proj": (1, ACTION_DIM),
    "action_out_proj": (0, ACTION_DIM),
}
"""The layers that take a robot's state or actions: the weight's axis that is theirs, and its size here."""


def plan_policy(
    vlm: Path | str, expert: Path | str | None = None, size: str = "spear1"
) -> Conversion[Spear1ForActionPrediction]:
    """SPEAR-VLM and an action expert → SPEAR-1, with all names and shapes checked and nothing read yet.

    vlm     a folder, or a name on the Hub.
    expert  None: a new one of the preset's width, as deep as the VLM. Else a π0 in safetensors: a folder, or
            a name on the Hub. Of its layers that take states and give actions those are loaded that have our
            sizes (state 10, action 8); the others are new, since their numbers mean other things. π0's
            velocity points to the noise, so its last layer is negated; new where clean actions are predicted.
    size    the preset of the horizon, the flow and a new expert.

    Raises `SpearError` as `plan_backbones` does, and for an expert that does not fit the VLM.
    """
    stored = StoredCheckpoint.open(vlm, "SPEAR-VLM")
    sources = {"SPEAR-VLM": describe_source(vlm, stored.folder)}
    kind = str(stored.config.get("model_type"))
    check_known(f"architecture in {stored.folder}:", [SpearVLMConfig.model_type], kind)
    inner, dtype = stored.read_config(SpearVLMConfig), stored.precision(stored.weights)
    fields, periods = None, {}
    if expert is not None:
        shards = StoredCheckpoint.open(expert, "π0")
        names = _expert_names(shards)
        fields = _expert_fields(shards, names, inner.text_config.head_dim)
        periods = {k: v for k, v in shards.config.items() if k in ("min_period", "max_period")}
        sources["action expert"] = describe_source(expert, shards.folder)
    config = build_spear1_config(get_preset(size), inner, fields)
    config.update(periods)
    with torch.device("meta"):
        wanted = Spear1ForActionPrediction(copy.deepcopy(config)).state_dict()
    inside = {k: v for k, v in wanted.items() if k.startswith("vlm.")}
    outside = {k: v for k, v in wanted.items() if k not in inside}
    ours = {f"vlm.{name}": name for name in stored.weights}
    keys, found = match_weights(inside, stored, ours, "SPEAR-VLM")
    keys += report_unused_weights(
        {o: n for o, n in ours.items() if o not in inside}, stored, {}, "SPEAR-VLM"
    )
    parts = [make_weight_reader(stored, found)]
    if expert is None:
        keys += [_new(name, weight, config) for name, weight in outside.items()]
    else:
        of_expert, more = _pi0(outside, shards, names, config)
        keys, parts = keys + of_expert, parts + more
    return Conversion(
        Spear1ForActionPrediction, config, ConversionReport(keys), parts, dtype, sources
    )


def _expert_names(shards: StoredCheckpoint) -> dict[str, str]:
    """Our names -> π0's, of all its weights. Raises `SpearError` when it is not a π0."""
    names = shards.names(_RENAMED)
    other = f"another architecture: {shards.folder}"
    if any(".dense." in name or name.startswith("time_mlp_") for name in names):
        raise SpearError(
            f"{other} is a π0.5, whose norms depend on time: give a π0 (lerobot/pi0_base)"
        )
    if "expert.layers.0.self_attn.q_proj.weight" not in names:
        raise SpearError(f"{other} holds no action expert: give a π0 (lerobot/pi0_base)")
    return names


def _expert_fields(
    shards: StoredCheckpoint, names: Mapping[str, str], head_dim: int
) -> dict[str, Any]:
    """The sizes of π0's expert, from the shapes of its weights, and what its config says beside them."""
    said = shards.config.get("dit_config") or {}

    def rows(layer: str) -> int:
        name = f"expert.layers.0.{layer}.weight"
        if name not in names:
            raise SpearError(f"checkpoint incomplete: {shards.folder} has no {name}: copy it again")
        return shards.weights[names[name]].shape[0]

    return {
        **{
            name: said[name]
            for name in ("rms_norm_eps", "rope_parameters", "hidden_act")
            if name in said
        },
        "hidden_size": rows("input_layernorm"),
        "intermediate_size": rows("mlp.gate_proj"),
        "num_attention_heads": rows("self_attn.q_proj") // head_dim,
        "num_key_value_heads": rows("self_attn.k_proj") // head_dim,
        "num_hidden_layers": len(
            {n.split(".")[2] for n in names if n.startswith("expert.layers.")}
        ),
        "head_dim": head_dim,
    }


def _pi0(
    wanted: Mapping[str, Tensor],
    shards: StoredCheckpoint,
    names: Mapping[str, str],
    config: Spear1Config,
) -> tuple[list[WeightStatus], list[WeightReader]]:
    """The keys of π0's expert, and what reads them."""
    # The ends whose states or actions are not ours, or that predict something else.
    other = {"action_out_proj"} if _is_clean(config) else set()
    for layer, (axis, ours) in _ENDS.items():
        stored = names.get(f"{layer}.weight")
        if stored is not None and shards.weights[stored].shape[axis] != ours:
            other.add(layer)
    fresh = [name for name in wanted if name.split(".")[0] in other]
    keys, found = match_weights(
        {k: v for k, v in wanted.items() if k not in fresh}, shards, names, "π0"
    )
    last = {ours: name for ours, name in found.items() if ours.startswith("action_out_proj.")}
    negated = "negated: π0's velocity points to the noise"
    keys = [replace(k, note=f"{k.note}, {negated}") if k.name in last else k for k in keys]
    keys += [_new(name, wanted[name], config) for name in fresh]
    rest = {ours: name for ours, name in names.items() if ours not in wanted or ours in fresh}
    others = dict.fromkeys(fresh, "its states and actions mean other numbers")
    keys += report_unused_weights(rest, shards, {**others, **_UNUSED}, "the action expert")
    parts = [
        make_weight_reader(shards, {ours: name for ours, name in found.items() if ours not in last})
    ]
    return keys, [*parts, make_weight_reader(shards, last, sign=-1.0)]


def _is_clean(config: Spear1Config) -> bool:
    return (config.flow or {})["prediction"] == "clean"


def _new(name: str, weight: Tensor, config: Spear1Config) -> WeightStatus:
    """A new weight, with the initialisation that `Spear1ForActionPrediction` gives it."""
    shape = tuple(weight.shape)
    if name.startswith("expert."):
        norm = name.endswith("norm.weight")
        how = "0 (a scale of 1)" if norm else f"N(0, {config.expert_config.initializer_range}²)"
    elif name.endswith("bias"):
        how = (
            "the action that stays"
            if _is_clean(config) and name.startswith("action_out_proj")
            else "0"
        )
    else:
        how = f"N(0, {'0.01' if name.startswith('action_out_proj') else '1'} / {shape[1]})"
    return WeightStatus(name, shape, "new", how)
