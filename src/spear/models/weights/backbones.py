"""PaliGemma and MoGe, as published, → SPEAR-VLM.

PaliGemma 1 and 2 are read under the names that were published in 2024 and under those that Transformers has
written since; MoGe as `spear.models.moge.checkpoint` reads it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig

from spear.errors import SpearError
from spear.models.moge.checkpoint import (
    Checkpoint,
    fill_encoder,
    make_encoder_config,
    match_encoder,
    read_checkpoint,
)
from spear.models.presets import SPECIAL_TOKEN_IDS, Preset, build_vlm_config, get_preset
from spear.models.processing import check_tokenizer
from spear.models.vision import MogeEncoder
from spear.models.vlm import SpearVLMConfig, SpearVLMForConditionalGeneration
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
    load_tokenizer,
    make_weight_reader,
)
from spear.tokens import TOKEN_FORMAT, extend_tokenizer, init_new_embeddings

EMBEDDINGS = "language_model.embed_tokens.weight"
_BOTH = "take both from the same checkpoint"
_UNUSED = {
    r"vision_tower\.head\.": "SigLIP's pooling, which PaliGemma does not read",
    r"vision_tower\.embeddings\.position_ids": "computed, not learned",
    r".*\.rotary_emb\.inv_freq": "computed, not learned",
}
"""Weights that may lie in a PaliGemma's file and are of no use, by patterns of our names -> why."""
_RENAMED = (
    ("model.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "language_model."),
    ("vision_tower.vision_model.", "vision_tower."),
)
"""PaliGemma's names, whichever Transformers wrote them -> SPEAR-VLM's, one after the other."""
_NOT_OURS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_bidirectional_attention",
)
"""Fields of a part's config that describe the file it came from, or what our masks say."""


def plan_backbones(
    paligemma: Path | str, moge: Path | str | None, size: str = "spear1"
) -> Conversion[SpearVLMForConditionalGeneration]:
    """PaliGemma and MoGe → SPEAR-VLM, with all names and shapes checked and nothing read yet.

    paligemma  the folder of a PaliGemma 1 or 2, or its name on the Hub.
    moge       a MoGe v1 or MoGe-2 as `read_checkpoint` takes it; None: a plain PaliGemma, no 3D encoder.
    size       the preset whose views, image sizes and number of 3D tokens the model gets; the sizes of the
               networks are those of the checkpoints.

    The 3D tokens follow the tokenizer's own tokens, or the embeddings where the folder has no tokenizer, and
    are drawn from N(mean, covariance) of the rows before them (the paper). MoGe's projection is new.
    Raises `SpearError` for a checkpoint that is missing, incomplete, broken or of another architecture, a
    dtype that is not floating point, and a vocabulary that does not fit. What is wrong with single weights is
    in the report, and raised by `check` and `run`.
    """
    numbers = get_preset(size)
    shards = StoredCheckpoint.open(paligemma, "PaliGemma")
    published = _paligemma_config(shards)
    stored = shards.names(_RENAMED)
    head = stored.pop("lm_head.weight", None)
    if head is not None and EMBEDDINGS not in stored:  # one matrix, saved under the head's name
        stored[EMBEDDINGS], head = head, None
    if EMBEDDINGS not in stored:
        raise SpearError(
            f"checkpoint incomplete: {shards.folder} has no token embeddings: copy it again"
        )
    table = stored[EMBEDDINGS]
    rows = shards.weights[table].shape[0]
    if rows != published.text_config.vocab_size:
        apart = f"its config says {published.text_config.vocab_size} tokens, its embeddings have {rows} rows"
        raise SpearError(f"vocabulary mismatch: {shards.folder}: {apart}: {_BOTH}")
    tokenizer, start = _extended_tokenizer(shards.folder, rows, numbers.bins)
    encoder = None if moge is None else read_checkpoint(moge)
    config = _vlm_config(numbers, published, max(rows, start + numbers.bins), start, encoder)
    patch = config.vision_config.patch_size
    for view, (width, height) in numbers.image_sizes.items():
        if width % patch or height % patch:
            why = f"its {view} images of {width}×{height} are no multiple of the checkpoint's patch, {patch}"
            raise SpearError(f"preset {size} does not fit: {why}: choose another preset")

    with torch.device("meta"):
        model = SpearVLMForConditionalGeneration(copy.deepcopy(config))
    wanted = model.state_dict()
    plain = {k: v for k, v in wanted.items() if not k.startswith("moge") and k != EMBEDDINGS}
    keys, names = match_weights(plain, shards, stored, "PaliGemma")
    of_vocabulary, grow = _vocabulary(shards, table, head, start, numbers.bins)
    keys, parts = keys + of_vocabulary, [grow, make_weight_reader(shards, names)]
    sources = {"PaliGemma": describe_source(paligemma, shards.folder)}
    if encoder is not None and model.moge is not None:
        keys += _moge_keys(model.moge, encoder)
        for part, how in (("weight", f"N(0, {config.initializer_range}²)"), ("bias", "0")):
            name = f"moge_projector.linear.{part}"
            keys.append(WeightStatus(name, tuple(wanted[name].shape), "new", how))
        parts.insert(
            0, _moge_part(config, encoder.path)
        )  # first, while there is room for its float32 copy
        sources["MoGe"] = describe_source(str(moge), encoder.path.parent)
    if head is not None:
        keys.append(
            WeightStatus(
                head, shards.weights[head].shape, "left out", "tied to the token embeddings"
            )
        )
    rest = {ours: name for ours, name in stored.items() if ours not in wanted}
    keys += report_unused_weights(rest, shards, _UNUSED, "SPEAR-VLM")
    place = {name: i for i, name in enumerate(wanted)}  # the report has the order of the model
    report = ConversionReport(
        sorted(keys, key=lambda key: place.get(key.name.split("[")[0], len(place)))
    )
    kind, dtype = SpearVLMForConditionalGeneration, shards.precision([table, *names.values()])
    return Conversion(kind, config, report, parts, dtype, sources, tokenizer)


def _paligemma_config(shards: StoredCheckpoint) -> Any:
    """The `PaliGemmaConfig` of a folder, checked to be one that SPEAR-VLM can be made from."""
    kind, where = shards.config.get("model_type"), shards.folder / "config.json"
    other = f"another architecture: {where}"
    if kind != PaliGemmaConfig.model_type:
        raise SpearError(f"{other} says {kind!r}: give a PaliGemma 1 or 2 folder ('paligemma')")
    config: Any = shards.read_config(PaliGemmaConfig)
    text = config.text_config.model_type
    if text not in ("gemma", "gemma2"):
        raise SpearError(f"{other}: its language model is {text!r}: give a PaliGemma 1 or 2")
    if shards.config.get("tie_word_embeddings") is False:
        raise SpearError(f"{other}: its head is not tied to its embeddings: SPEAR-VLM ties both")
    return config


def _extended_tokenizer(folder: Path, rows: int, bins: int) -> tuple[Any, int]:
    """The folder's tokenizer with the 3D tokens, or None; and the id of the first 3D token."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None, rows
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer)
    mismatch = f"vocabulary mismatch: {folder}: its tokenizer has"
    if TOKEN_FORMAT.format(0) in tokenizer.get_vocab():
        raise SpearError(f"{mismatch} 3D tokens already: give a PaliGemma's own")
    if (
        len(tokenizer) > rows + 1
    ):  # the image token may lie one past the embeddings: it is never embedded
        raise SpearError(f"{mismatch} {len(tokenizer)} tokens, its embeddings {rows} rows: {_BOTH}")
    return tokenizer, extend_tokenizer(tokenizer, bins)


def _vlm_config(
    size: Preset, published: Any, vocabulary: int, start: int, moge: Checkpoint | None
) -> SpearVLMConfig:
    """The preset's config, with networks of the checkpoints' sizes."""
    parts = (published.text_config.to_dict(), published.vision_config.to_dict())
    text, vision = ({k: v for k, v in part.items() if k not in _NOT_OURS} for part in parts)
    networks = {
        "vision_config": {**vision, "vision_use_head": False},
        "moge_config": None if moge is None else make_encoder_config(moge),
        "text_config": {**text, "vocab_size": vocabulary, **SPECIAL_TOKEN_IDS},
    }
    return build_vlm_config(size, coordinate_start=start, networks=networks)


def _vocabulary(
    shards: StoredCheckpoint, source: str, head: str | None, start: int, bins: int
) -> tuple[list[WeightStatus], WeightReader]:
    """The embeddings in their parts, known rows and new 3D tokens, and how they are read. head: its copy."""
    rows, width = shards.weights[source].shape
    known, end = min(rows, start), start + bins
    loaded, drawn = f"PaliGemma: {source}", f"N(mean, covariance) of rows 0:{known} (the paper)"
    keys = [
        WeightStatus(f"{EMBEDDINGS}[:{known}]", (known, width), "loaded", loaded),
        WeightStatus(f"{EMBEDDINGS}[{known}:{end}]", (end - known, width), "new", drawn),
    ]
    if rows > end:
        keys.append(WeightStatus(f"{EMBEDDINGS}[{end}:]", (rows - end, width), "loaded", loaded))

    def part(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        table = torch.empty(max(rows, end), width, dtype=dtype)
        shards.read_into(source, table[:rows])
        if head is not None and not (
            shards.weights[head].shape == (rows, width)
            and all(
                torch.equal(piece.to(dtype), table[:rows][place])
                for place, piece in shards.pieces(head)
            )
        ):
            raise SpearError(f"{shards.folder}: {head} is not {source}: SPEAR-VLM ties both")
        table[known:end] = init_new_embeddings(table[:known], end - known, generator)
        return {EMBEDDINGS: table}

    return keys, part


def _moge_part(config: SpearVLMConfig, path: Path) -> WeightReader:
    def part(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        with torch.device("meta"):
            encoder = MogeEncoder(copy.deepcopy(config.moge_config))
        fill_encoder(encoder, read_checkpoint(path))
        return {f"moge.{name}": weight.to(dtype) for name, weight in encoder.state_dict().items()}

    return part


def _moge_keys(encoder: MogeEncoder, checkpoint: Checkpoint) -> list[WeightStatus]:
    names = match_encoder(encoder, checkpoint)
    ours = encoder.state_dict().items()
    keys = [
        WeightStatus(f"moge.{n}", tuple(weight.shape), "loaded", f"MoGe: {names[n]}")
        for n, weight in ours
    ]
    for name, weight in checkpoint.weights.items():
        if name not in names.values():
            why = "DINOv2's own training" if "mask_token" in name else "MoGe's head"
            if name.endswith(("image_mean", "image_std")):
                why = "ImageNet's, checked"
            keys.append(WeightStatus(name, tuple(weight.shape), "left out", why))
    return keys
