"""Conversion of a SPEAR-VLM and an action expert to a SPEAR-1. The expert is new, or π0's.

Published files of π0 name its weights in two ways, and both can be read: as openpi's PyTorch port
and LeRobot do (`paligemma_with_expert.gemma_expert.model.…`), and as Transformers does
(`model.dit.…`).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

RENAMED_PREFIXES = (
    ("model.", ""),
    ("dit.", "expert."),
    ("paligemma_with_expert.gemma_expert.model.", "expert."),
    ("embed_action_time.", ""),
)
"""Rules (old prefix, new prefix) that turn π0's names into ours. They are applied in this order."""

UNUSED_WEIGHTS = {
    # The reasons are part of the report that the user sees.
    r"vlm\.": "π0's own VLM, which SPEAR-VLM replaces",
    r"paligemma_with_expert\.paligemma\.": "π0's own VLM, which SPEAR-VLM replaces",
    r"expert\.embed_tokens\.": "the expert reads no text",
    r"paligemma_with_expert\.gemma_expert\.lm_head\.": "the expert writes no text",
    r"(un)?normalize_": "statistics of π0's data",
}
"""Patterns of the names of weights in π0's files that SPEAR-1 does not need -> the reason."""

OUTPUT_LAYER = "action_out_proj"


@dataclass(frozen=True)
class RobotLayer:
    """A layer whose input or output is a robot's state or actions.

    axis  The axis of the layer's weight that belongs to the state or the action.
    size  Our number of features along this axis.
    """

    axis: int
    size: int


ROBOT_LAYERS = {
    "state_proj": RobotLayer(axis=1, size=NUM_STATE_FEATURES),
    "action_in_proj": RobotLayer(axis=1, size=ACTION_DIM),
    OUTPUT_LAYER: RobotLayer(axis=0, size=ACTION_DIM),
}


def plan_policy(
    vlm: Path | str, expert: Path | str | None = None, size: str = "spear1"
) -> Conversion[Spear1ForActionPrediction]:
    """Plan the conversion of SPEAR-VLM and an action expert to SPEAR-1.

    All names and shapes are checked; no weights are read yet.

    Args:
        vlm: A SPEAR-VLM, given as a folder or a name on the Hub.
        expert: A π0 in safetensors, given as a folder or a name on the Hub. None makes a new
            expert, which is as wide as the preset's and as deep as the VLM.
        size: The preset that gives the horizon, the flow, and the width of a new expert.

    Of a π0, the layers for states and actions (`ROBOT_LAYERS`) are loaded only if they have our
    sizes (state 10, action 8). Otherwise they are new, because the state's or action's numbers have
    another meaning. π0's velocity points to the noise and ours to the data, so the weights of the
    output layer are negated. If the preset predicts clean actions, the output layer is new.

    Raises:
        SpearError: A checkpoint is missing, incomplete, broken or of another architecture, or the
            expert does not fit the VLM.
    """
    # The VLM and the expert, and the config of both.
    stored_vlm = StoredCheckpoint.open(vlm, "SPEAR-VLM")
    vlm_config = _read_vlm_config(stored_vlm)
    dtype = stored_vlm.precision(stored_vlm.weights)
    sources = {"SPEAR-VLM": describe_source(vlm, stored_vlm.folder)}
    pi0 = None
    if expert is not None:
        pi0 = _Pi0.open(expert)
        sources["action expert"] = describe_source(expert, pi0.stored.folder)
    config = _make_config(size, vlm_config, pi0)

    # The weights that the new model needs. On the meta device they have only shapes.
    with torch.device("meta"):
        expected_weights = Spear1ForActionPrediction(copy.deepcopy(config)).state_dict()
    wanted_of_vlm = {name: w for name, w in expected_weights.items() if name.startswith("vlm.")}
    wanted_of_expert = {
        name: w for name, w in expected_weights.items() if not name.startswith("vlm.")
    }

    # The weights that the VLM has.
    vlm_names = {f"vlm.{name}": name for name in stored_vlm.weights}
    keys, loaded_names = match_weights(wanted_of_vlm, stored_vlm, vlm_names, "SPEAR-VLM")
    leftover_names = {our: name for our, name in vlm_names.items() if our not in wanted_of_vlm}
    keys += report_unused_weights(leftover_names, stored_vlm, {}, "SPEAR-VLM")
    readers = [make_weight_reader(stored_vlm, loaded_names)]

    # The other weights are π0's, or new.
    if pi0 is None:
        keys += [_report_new(name, weight, config) for name, weight in wanted_of_expert.items()]
    else:
        expert_keys, expert_readers = _plan_pi0(wanted_of_expert, pi0, config)
        keys += expert_keys
        readers += expert_readers
    report = ConversionReport(keys)
    return Conversion(Spear1ForActionPrediction, config, report, readers, dtype, sources)


def _read_vlm_config(stored: StoredCheckpoint) -> SpearVLMConfig:
    """Return the config of a SPEAR-VLM. Raise `SpearError` if it is another model."""
    architecture = str(stored.config.get("model_type"))
    check_known(f"architecture in {stored.folder}:", [SpearVLMConfig.model_type], architecture)
    return stored.read_config(SpearVLMConfig)


@dataclass(frozen=True)
class _Pi0:
    """A π0 checkpoint.

    Attributes:
        stored: The checkpoint's weights and config.
        names: Our name of each weight -> the name in the checkpoint.
    """

    stored: StoredCheckpoint
    names: Mapping[str, str]

    @staticmethod
    def open(expert: Path | str) -> "_Pi0":
        """List the weights of a π0. Raise `SpearError` if the checkpoint is no π0."""
        stored = StoredCheckpoint.open(expert, "π0")
        names = stored.names(RENAMED_PREFIXES)
        is_pi05 = any(".dense." in name or name.startswith("time_mlp_") for name in names)
        if is_pi05:
            raise SpearError(
                f"another architecture: {stored.folder} is a π0.5, whose norms depend on time."
                " Give a π0 (lerobot/pi0_base)."
            )
        if "expert.layers.0.self_attn.q_proj.weight" not in names:
            raise SpearError(
                f"another architecture: {stored.folder} holds no action expert."
                " Give a π0 (lerobot/pi0_base)."
            )
        return _Pi0(stored, names)

    def num_rows(self, layer: str) -> int:
        """Return the number of rows of a weight in the first layer of the expert.

        `layer` is the name of a module in that layer, such as "mlp.gate_proj".
        """
        name = f"expert.layers.0.{layer}.weight"
        if name not in self.names:
            raise SpearError(
                f"checkpoint incomplete: {self.stored.folder} has no {name}. Copy it again."
            )
        return self.stored.weights[self.names[name]].shape[0]


def _make_config(size: str, vlm_config: SpearVLMConfig, pi0: _Pi0 | None) -> Spear1Config:
    """Return the config of the new model. Without a π0 the action expert is the preset's."""
    preset = get_preset(size)
    if pi0 is None:
        return build_spear1_config(preset, vlm_config, None)
    expert_fields = _read_expert_fields(pi0, vlm_config.text_config.head_dim)
    config = build_spear1_config(preset, vlm_config, expert_fields)
    for name in ("min_period", "max_period"):
        if name in pi0.stored.config:
            config.update({name: pi0.stored.config[name]})
    return config


def _read_expert_fields(pi0: _Pi0, head_dim: int) -> dict[str, Any]:
    """Return config fields of π0's expert: its sizes, from the shapes of its weights, and the
    settings that its own config names."""
    fields: dict[str, Any] = {}
    expert_config = pi0.stored.config.get("dit_config") or {}
    for name in ("rms_norm_eps", "rope_parameters", "hidden_act"):
        if name in expert_config:
            fields[name] = expert_config[name]

    layer_numbers = set()
    for name in pi0.names:
        if name.startswith("expert.layers."):
            layer_numbers.add(name.split(".")[2])
    fields["hidden_size"] = pi0.num_rows("input_layernorm")
    fields["intermediate_size"] = pi0.num_rows("mlp.gate_proj")
    fields["num_attention_heads"] = pi0.num_rows("self_attn.q_proj") // head_dim
    fields["num_key_value_heads"] = pi0.num_rows("self_attn.k_proj") // head_dim
    fields["num_hidden_layers"] = len(layer_numbers)
    fields["head_dim"] = head_dim
    return fields


def _plan_pi0(
    expected_weights: Mapping[str, Tensor], pi0: _Pi0, config: Spear1Config
) -> tuple[list[WeightStatus], list[WeightReader]]:
    """Plan the weights of the action expert and the layers around it.

    Args:
        expected_weights: The weights that the new model needs, by our names.
        pi0: The checkpoint.
        config: The config of the new model.

    Returns:
        The status of each weight of the new model and of the checkpoint, and the readers of the
        loaded weights.
    """
    new_layers = _find_new_layers(pi0, config)
    new_names = [name for name in expected_weights if name.split(".")[0] in new_layers]
    wanted_of_pi0 = {name: w for name, w in expected_weights.items() if name not in new_names}
    keys, loaded_names = match_weights(wanted_of_pi0, pi0.stored, pi0.names, "π0")

    # The output layer is negated.
    output_names: dict[str, str] = {}
    other_names: dict[str, str] = {}
    for our_name, stored_name in loaded_names.items():
        is_output = our_name.startswith(f"{OUTPUT_LAYER}.")
        target = output_names if is_output else other_names
        target[our_name] = stored_name
    keys = [_note_negation(key) if key.name in output_names else key for key in keys]
    readers = [
        make_weight_reader(pi0.stored, other_names),
        make_weight_reader(pi0.stored, output_names, sign=-1.0),
    ]

    # Layers for other states or actions are new, and π0's weights of these layers are not read.
    keys += [_report_new(name, expected_weights[name], config) for name in new_names]
    leftover_names = {}
    for our_name, stored_name in pi0.names.items():
        if our_name not in expected_weights or our_name in new_names:
            leftover_names[our_name] = stored_name
    reasons = dict.fromkeys(new_names, "its states and actions mean other numbers")
    unused = {**reasons, **UNUSED_WEIGHTS}
    keys += report_unused_weights(leftover_names, pi0.stored, unused, "the action expert")
    return keys, readers


def _find_new_layers(pi0: _Pi0, config: Spear1Config) -> set[str]:
    """Return the names of layers that cannot be π0's, because π0's have other states or actions, or
    predict another quantity."""
    new_layers = set()
    if _predicts_clean_actions(config):
        new_layers.add(OUTPUT_LAYER)
    for name, layer in ROBOT_LAYERS.items():
        stored_name = pi0.names.get(f"{name}.weight")
        if stored_name is None:
            continue
        if pi0.stored.weights[stored_name].shape[layer.axis] != layer.size:
            new_layers.add(name)
    return new_layers


def _note_negation(key: WeightStatus) -> WeightStatus:
    """Add to a weight's note that its values are negated."""
    return replace(key, note=f"{key.note}, negated: π0's velocity points to the noise")


def _predicts_clean_actions(config: Spear1Config) -> bool:
    return (config.flow or {})["prediction"] == "clean"


def _report_new(name: str, weight: Tensor, config: Spear1Config) -> WeightStatus:
    """Report a new weight, with the initialization that `Spear1ForActionPrediction` gives it."""
    shape = tuple(weight.shape)
    return WeightStatus(name, shape, "new", _describe_initialization(name, shape, config))


def _describe_initialization(name: str, shape: tuple[int, ...], config: Spear1Config) -> str:
    """Describe the distribution of a new weight's initial values."""
    is_output = name.startswith(OUTPUT_LAYER)
    if name.startswith("expert."):
        if name.endswith("norm.weight"):
            return "0 (a scale of 1)"
        return f"N(0, {config.expert_config.initializer_range}²)"
    if name.endswith("bias"):
        if is_output and _predicts_clean_actions(config):
            return "the action that does not move"
        return "0"
    variance = "0.01" if is_output else "1"
    return f"N(0, {variance} / {shape[1]})"
