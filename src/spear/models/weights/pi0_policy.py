"""Conversion of a whole π0 or π0.5 to a SPEAR-1: its PaliGemma becomes SPEAR-VLM, and its action
expert SPEAR-1's. A MoGe joins such that nothing changes at first."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spear.models.presets import get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.action_expert import make_policy_config, plan_expert
from spear.models.weights.backbones import StoredPaliGemma, plan_vlm
from spear.models.weights.conversion import Conversion, ConversionReport, WeightStatus
from spear.models.weights.load import (
    describe_source,
    get_or_download_tokenizer,
    make_prefixed_reader,
)
from spear.models.weights.pi0 import VLM_PREFIX, Pi0Checkpoint


def plan_pi0(
    pi0: Path | str,
    moge: Path | str | None,
    size: str = "spear1",
    tokenizer: Path | str | None = None,
) -> Conversion[Spear1ForActionPrediction]:
    """Plan the conversion of a whole π0 or π0.5, and a MoGe, to SPEAR-1.

    All names and shapes are checked; no weights are read yet. The conversion of the VLM is that of
    `plan_vlm`, which keeps π0's visual tokens. The expert's is that of `plan_expert`. So with the
    same states and actions, the new model computes what the π0 computes.

    Args:
        pi0: A π0 or π0.5 in safetensors, given as a folder or a name on the Hub.
        moge: A MoGe or a depth encoder, as `open_depth_encoder` takes it. None makes a model
            without 3D encoder.
        size: The preset that gives the views, the image sizes, the number of 3D tokens, the horizon
            and the flow. The sizes of the networks are those of the checkpoints.
        tokenizer: The folder of PaliGemma's tokenizer, or a name on the Hub. By default it is the
            tokenizer in the folder of the π0. π0's own files usually have none.

    Raises:
        SpearError: A checkpoint is missing, incomplete, broken or of another architecture, or the
            vocabulary does not fit.
    """
    pi0_checkpoint = Pi0Checkpoint.open(pi0)
    tokenizer_folder = pi0_checkpoint.checkpoint.folder
    if tokenizer is not None:
        tokenizer_folder = get_or_download_tokenizer(tokenizer)
    paligemma = StoredPaliGemma(
        title=pi0_checkpoint.title,
        source=describe_source(pi0, pi0_checkpoint.checkpoint.folder),
        checkpoint=pi0_checkpoint.checkpoint,
        names=pi0_checkpoint.map_vlm_to_stored_names(),
        config=pi0_checkpoint.read_paligemma_config(),
        tokenizer_folder=tokenizer_folder,
    )
    vlm_plan = plan_vlm(paligemma, moge, get_preset(size), keeps_visual_tokens=True)
    vlm_config: Any = vlm_plan.config
    config = make_policy_config(size, vlm_config, pi0_checkpoint)

    # The weights that the expert needs. On the meta device they have only shapes.
    with torch.device("meta"):
        model = Spear1ForActionPrediction(copy.deepcopy(config))
    expected_of_expert = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(VLM_PREFIX):
            expected_of_expert[name] = weight
    expert_entries, expert_readers = plan_expert(expected_of_expert, pi0_checkpoint, config)

    vlm_entries = _with_prefix_on_our_names(vlm_plan.report.entries)
    vlm_readers = [make_prefixed_reader(reader, VLM_PREFIX) for reader in vlm_plan.readers]
    sources = dict(vlm_plan.sources)
    if tokenizer is not None:
        sources["tokenizer"] = describe_source(tokenizer, tokenizer_folder)
    return Conversion(
        model_class=Spear1ForActionPrediction,
        config=config,
        report=ConversionReport([*vlm_entries, *expert_entries]),
        readers=[*vlm_readers, *expert_readers],
        dtype=vlm_plan.dtype,
        sources=sources,
        tokenizer=vlm_plan.tokenizer,
    )


def _with_prefix_on_our_names(entries: Iterable[WeightStatus]) -> Iterator[WeightStatus]:
    """Rename the weights of a SPEAR-VLM to those of the VLM inside SPEAR-1.

    Weights that are left out or refused have the checkpoint's names, which stay.
    """
    for entry in entries:
        if entry.status in ("loaded", "new", "missing"):
            yield replace(entry, name=f"{VLM_PREFIX}{entry.name}")
        else:
            yield entry
