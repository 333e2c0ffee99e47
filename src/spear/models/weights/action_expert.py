"""Conversion of a SPEAR-VLM and an action expert to a SPEAR-1. The expert is new, π0's or π0.5's.

π0.5's expert has the shape of π0's, but for its norms (see `names_pi05.toml`).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spear.errors import check_known
from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1Config, Spear1ForActionPrediction
from spear.models.vlm import SpearVLMConfig
from spear.models.weights.conversion import (
    Conversion,
    ConversionReport,
    WeightStatus,
    list_statuses_of_unused_weights,
    match_weights,
)
from spear.models.weights.load import (
    StoredCheckpoint,
    WeightReader,
    describe_source,
    make_weight_reader,
)
from spear.models.weights.pi0 import VLM_PREFIX, Pi0Checkpoint
from spear.types import ACTION_DIM

OUTPUT_LAYER = "action_out_proj"

NEW_LAYERS_OF_PI05 = ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out")
"""Layers that are new with a π0.5. It reads the state as text, and the flow time in its norms."""


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
        expert: A π0 or π0.5 in safetensors, given as a folder or a name on the Hub. None makes a
            new expert, which is as wide as the preset's and as deep as the VLM.
        size: The preset that gives the horizon, the flow, and the width of a new expert.

    A π0's layers for states and actions (`ROBOT_LAYERS`) are loaded only if they have our sizes
    (state 10, action 8). Otherwise these layers are new, because the numbers of the π0's states or
    actions have another meaning. π0's velocity points to the noise and ours to the data, so the
    weights of the output layer are negated. If the preset predicts clean actions, the output layer
    is new. From a π0.5, only the attention and the MLPs of the expert are loaded;
    `names_pi05.toml` says why the other weights are not.

    Raises:
        SpearError: A checkpoint is missing, incomplete, broken or of another architecture, or the
            expert does not fit the VLM.
    """
    # The VLM and the expert, and the config of both.
    stored_vlm = StoredCheckpoint.open(vlm, "SPEAR-VLM")
    vlm_config = _read_config_of_vlm(stored_vlm)
    dtype = stored_vlm.compute_common_dtype(stored_vlm.weights)
    sources = {"SPEAR-VLM": describe_source(vlm, stored_vlm.folder)}
    pi0 = None
    if expert is not None:
        pi0 = Pi0Checkpoint.open(expert)
        sources["action expert"] = describe_source(expert, pi0.checkpoint.folder)
    config = make_policy_config(size, vlm_config, pi0)

    # The weights that the new model needs. On the meta device they have only shapes.
    with torch.device("meta"):
        expected_weights = Spear1ForActionPrediction(copy.deepcopy(config)).state_dict()
    wanted_of_vlm = {name: w for name, w in expected_weights.items() if name.startswith("vlm.")}
    wanted_of_expert = {
        name: w for name, w in expected_weights.items() if not name.startswith("vlm.")
    }

    # The weights that the VLM has.
    vlm_names = {f"vlm.{name}": name for name in stored_vlm.weights}
    entries, loaded_names = match_weights(wanted_of_vlm, stored_vlm, vlm_names, "SPEAR-VLM")
    leftover_names = {our: name for our, name in vlm_names.items() if our not in wanted_of_vlm}
    entries += list_statuses_of_unused_weights(
        leftover_names, stored_vlm, unused={}, model_name="SPEAR-VLM"
    )
    readers = [make_weight_reader(stored_vlm, loaded_names)]

    # The other weights are π0's, or new.
    if pi0 is None:
        entries += [
            _make_status_of_new_weight(name, weight, config)
            for name, weight in wanted_of_expert.items()
        ]
    else:
        expert_entries, expert_readers = plan_expert(wanted_of_expert, pi0, config)
        entries += expert_entries
        # The pattern "" matches every name: all weights of π0's VLM are left out.
        unused = {"": f"{pi0.title}'s own VLM, which SPEAR-VLM replaces"}
        entries += list_statuses_of_unused_weights(
            pi0.map_vlm_to_stored_names(), pi0.checkpoint, unused, "SPEAR-1"
        )
        readers += expert_readers
    report = ConversionReport(entries)
    return Conversion(Spear1ForActionPrediction, config, report, readers, dtype, sources)


def _read_config_of_vlm(checkpoint: StoredCheckpoint) -> SpearVLMConfig:
    """Return the config of a SPEAR-VLM. Raise `SpearError` if it is another model."""
    architecture = str(checkpoint.config.get("model_type"))
    check_known(
        "architecture", [SpearVLMConfig.model_type], architecture, location=str(checkpoint.folder)
    )
    return checkpoint.read_config(SpearVLMConfig)


def make_policy_config(
    size: str, vlm_config: SpearVLMConfig, pi0: Pi0Checkpoint | None
) -> Spear1Config:
    """Return the config of the new model. Without a π0 the action expert is the preset's."""
    preset = get_preset(size)
    if pi0 is None:
        return build_spear1_config(preset, vlm_config, None)
    expert_fields = pi0.read_expert_config_fields(vlm_config.text_config.head_dim)
    config = build_spear1_config(preset, vlm_config, expert_fields)
    for name in ("min_period", "max_period"):
        if name in pi0.checkpoint.config:
            config.update({name: pi0.checkpoint.config[name]})
    return config


def plan_expert(
    expected_weights: Mapping[str, Tensor], pi0: Pi0Checkpoint, config: Spear1Config
) -> tuple[list[WeightStatus], list[WeightReader]]:
    """Plan the weights of the action expert and the layers around it.

    Args:
        expected_weights: The weights that the new model needs, by our names.
        pi0: The checkpoint. Its VLM is not part of this plan.
        config: The config of the new model.

    Returns:
        The status of each weight of the new model and of the checkpoint, and the readers of the
        loaded weights.
    """
    new_names = _list_new_weights(expected_weights, pi0, config)
    wanted_of_pi0 = {name: w for name, w in expected_weights.items() if name not in new_names}
    entries, loaded_names = match_weights(wanted_of_pi0, pi0.checkpoint, pi0.names, pi0.title)

    # The output layer is negated.
    output_names: dict[str, str] = {}
    other_names: dict[str, str] = {}
    for our_name, stored_name in loaded_names.items():
        is_output = our_name.startswith(f"{OUTPUT_LAYER}.")
        target = output_names if is_output else other_names
        target[our_name] = stored_name
    entries = [
        _with_note_on_negation(entry) if entry.name in output_names else entry for entry in entries
    ]
    readers = [
        make_weight_reader(pi0.checkpoint, other_names),
        make_weight_reader(pi0.checkpoint, output_names, factor=-1.0),
    ]

    # Layers for other states or actions are new, and π0's weights of these layers are not read.
    entries += [
        _make_status_of_new_weight(name, expected_weights[name], config) for name in new_names
    ]
    leftover_names = {}
    for our_name, stored_name in pi0.names.items():
        is_wanted = our_name in expected_weights and our_name not in new_names
        if not is_wanted and not our_name.startswith(VLM_PREFIX):
            leftover_names[our_name] = stored_name
    robot_layers = dict.fromkeys(ROBOT_LAYERS, "its states and actions mean other numbers")
    unused = {**pi0.rules.unused, **robot_layers}
    entries += list_statuses_of_unused_weights(
        leftover_names, pi0.checkpoint, unused, "the action expert"
    )
    return entries, readers


def _list_new_weights(
    expected_weights: Mapping[str, Tensor], pi0: Pi0Checkpoint, config: Spear1Config
) -> list[str]:
    """Return the names of weights that cannot be the checkpoint's."""
    new_layers = _find_new_layers_around_expert(pi0, config)
    new_names = []
    for name in expected_weights:
        is_in_new_layer = name.split(".")[0] in new_layers
        is_norm_of_pi05 = pi0.is_pi05 and name.endswith("norm.weight")
        if is_in_new_layer or is_norm_of_pi05:
            new_names.append(name)
    return new_names


def _find_new_layers_around_expert(pi0: Pi0Checkpoint, config: Spear1Config) -> set[str]:
    """Return the names of layers around the expert that cannot be the checkpoint's, because it has
    other states or actions, predicts another quantity, or has no such layer (π0.5)."""
    new_layers = set(NEW_LAYERS_OF_PI05 if pi0.is_pi05 else ())
    if _predicts_clean_actions(config):
        new_layers.add(OUTPUT_LAYER)
    for name, layer in ROBOT_LAYERS.items():
        stored_name = pi0.names.get(f"{name}.weight")
        if stored_name is None:
            continue
        if pi0.checkpoint.weights[stored_name].shape[layer.axis] != layer.size:
            new_layers.add(name)
    return new_layers


def _with_note_on_negation(entry: WeightStatus) -> WeightStatus:
    """Add to a weight's note that its values are negated."""
    return replace(entry, note=f"{entry.note}, negated: π0's velocity points to the noise")


def _predicts_clean_actions(config: Spear1Config) -> bool:
    return (config.flow or {})["prediction"] == "clean"


def _make_status_of_new_weight(name: str, weight: Tensor, config: Spear1Config) -> WeightStatus:
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
