"""The 3D encoder of a converted SPEAR-VLM: that of a published MoGe, or one that `spear train
nano-depth` has trained.

Published encoders have patches of 14 pixels. A depth encoder of our own may have any size, so that
it fits a small VLM.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.models.moge.checkpoint import (
    Checkpoint,
    fill_encoder,
    make_encoder_config,
    match_encoder_weight_names,
    read_checkpoint,
)
from spear.models.stage0 import MogeForDepth
from spear.models.vision import MogeEncoder
from spear.models.weights.conversion import (
    WeightStatus,
    list_statuses_of_unused_weights,
    match_weights,
)
from spear.models.weights.folders import BUNDLED_WEIGHTS, locate_checkpoint
from spear.models.weights.load import (
    StoredCheckpoint,
    WeightReader,
    describe_source,
    make_prefixed_reader,
    make_weight_reader,
    read_compatible_config,
)

MOGE_PREFIX = "moge."
"""Beginning of the names of the encoder's weights in a SPEAR-VLM, and in a `MogeForDepth`."""


@dataclass(frozen=True)
class EncoderPlan:
    """How the 3D encoder of a new SPEAR-VLM gets its weights.

    entries  The status of each weight of the encoder and of the source.
    reader   The reader of the encoder's weights, by their names in a SPEAR-VLM.
    """

    entries: list[WeightStatus]
    reader: WeightReader


@dataclass(frozen=True)
class PublishedMoge:
    """The encoder of a published MoGe.

    name        What the user gave: a file or a name on the Hub.
    checkpoint  The content of its file.
    """

    name: str
    checkpoint: Checkpoint

    def make_config(self) -> dict[str, Any]:
        """Return the `moge_config` of a SPEAR-VLM with this encoder."""
        return make_encoder_config(self.checkpoint)

    def describe_source(self) -> str:
        """Return where it is, for the model card."""
        return describe_source(self.name, self.checkpoint.path.parent)

    def plan(self, encoder: MogeEncoder) -> EncoderPlan:
        """Plan how `encoder`, whose weights are on the meta device, gets its weights.

        Raises:
            SpearError: The checkpoint's weights are not those of the encoder.
        """
        return EncoderPlan(
            entries=_list_statuses_of_published(encoder, self.checkpoint),
            reader=_make_published_reader(encoder, self.checkpoint.path),
        )


@dataclass(frozen=True)
class TrainedDepthEncoder:
    """The encoder of a `MogeForDepth` that `spear train` has saved.

    name        What the user gave: a folder, or the name of bundled weights.
    checkpoint  Its weights, which were listed and not read.
    config      The encoder's config.
    """

    name: str
    checkpoint: StoredCheckpoint
    config: Mapping[str, Any]

    def make_config(self) -> dict[str, Any]:
        """Return the `moge_config` of a SPEAR-VLM with this encoder."""
        return dict(self.config)

    def describe_source(self) -> str:
        """Return where it is, for the model card."""
        return self.name

    def plan(self, encoder: MogeEncoder) -> EncoderPlan:
        """Plan how `encoder`, whose weights are on the meta device, gets its weights."""
        expected_weights = {f"{MOGE_PREFIX}{name}": w for name, w in encoder.state_dict().items()}
        # Our name of a weight -> its name in the checkpoint, which is the same here.
        stored_names = {name: name for name in self.checkpoint.weights}
        entries, loaded_names = match_weights(
            expected_weights, self.checkpoint, stored_names, "MoGe"
        )
        leftover_names = {
            name: name for name in self.checkpoint.weights if name not in expected_weights
        }
        reason_of_unused = {r"head\.": "the head that predicts depth"}
        entries += list_statuses_of_unused_weights(
            leftover_names, self.checkpoint, reason_of_unused, "SPEAR-VLM"
        )
        return EncoderPlan(entries, make_weight_reader(self.checkpoint, loaded_names))


def open_depth_encoder(name: Path | str) -> PublishedMoge | TrainedDepthEncoder:
    """Open a 3D encoder.

    Args:
        name: A MoGe v1 or MoGe-2, given as a `.pt` file or a name on the Hub; or a depth encoder of
            `spear train nano-depth`, given as a folder or as the name of bundled weights.

    Raises:
        SpearError: There is no such encoder, or its files are broken.
    """
    is_bundled = (BUNDLED_WEIGHTS / name / "config.json").is_file()
    if not is_bundled and not Path(name).is_dir():
        return PublishedMoge(str(name), read_checkpoint(name))
    folder = locate_checkpoint(name)
    config: Any = read_compatible_config(MogeForDepth, folder)
    checkpoint = StoredCheckpoint.open(folder, "depth encoder")
    return TrainedDepthEncoder(str(name), checkpoint, config.moge_config.to_dict())


# --- A published MoGe ---


def _list_statuses_of_published(encoder: MogeEncoder, checkpoint: Checkpoint) -> list[WeightStatus]:
    """Report the weights of MoGe: those of the encoder are loaded, the others left out."""
    stored_names = match_encoder_weight_names(encoder, checkpoint)
    entries = []
    for name, weight in encoder.state_dict().items():
        source = f"MoGe: {stored_names[name]}"
        entries.append(WeightStatus(f"{MOGE_PREFIX}{name}", tuple(weight.shape), "loaded", source))
    loaded_names = set(stored_names.values())
    for name, weight in checkpoint.weights.items():
        if name not in loaded_names:
            reason = _explain_unused_weight(name)
            entries.append(WeightStatus(name, tuple(weight.shape), "left out", reason))
    return entries


def _explain_unused_weight(name: str) -> str:
    """Return the reason for which a weight of a published MoGe is left out."""
    if name.endswith(("image_mean", "image_std")):
        return "ImageNet's, checked"
    if "mask_token" in name:
        return "DINOv2's own training"
    return "MoGe's head"


def _make_published_reader(encoder: MogeEncoder, path: Path) -> WeightReader:
    """Return a reader of the encoder's weights from a checkpoint of MoGe."""

    def read(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        # A copy is filled, so that this plan can be run again.
        filled_encoder = copy.deepcopy(encoder)
        fill_encoder(filled_encoder, read_checkpoint(path))
        return {name: weight.to(dtype) for name, weight in filled_encoder.state_dict().items()}

    return make_prefixed_reader(read, MOGE_PREFIX)
