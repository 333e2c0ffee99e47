"""Conversion of a published PaliGemma and a published MoGe to a SPEAR-VLM.

Files of PaliGemma 1 and 2 name the weights in several ways, which can all be read (see
`names_paligemma.toml`). `spear.models.moge.checkpoint` reads MoGe.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig

from spear.errors import SpearError
from spear.models.presets import SPECIAL_TOKEN_IDS, Preset, build_vlm_config, get_preset
from spear.models.processing import check_paligemma_tokens
from spear.models.vlm import SpearVLMConfig, SpearVLMForConditionalGeneration
from spear.models.weights.conversion import (
    Conversion,
    ConversionReport,
    WeightStatus,
    list_statuses_of_unused_weights,
    match_weights,
)
from spear.models.weights.depth_encoder import (
    PublishedMoge,
    TrainedDepthEncoder,
    open_depth_encoder,
)
from spear.models.weights.load import (
    StoredCheckpoint,
    WeightReader,
    describe_source,
    load_tokenizer,
    make_weight_reader,
    make_zero_reader,
)
from spear.models.weights.name_rules import read_name_rules
from spear.tokens import TOKEN_FORMAT, extend_tokenizer, sample_new_embeddings

# Our names of the token embeddings, and of the output head, which is a copy of them in some files.
EMBEDDINGS = "language_model.embed_tokens.weight"
HEAD = "lm_head.weight"

MOGE_PROJECTOR = "moge_projector."
SIGLIP_PROJECTOR = "multi_modal_projector."
"""Beginnings of our names of the two projections, whose average is a visual token."""

IGNORED_CONFIG_FIELDS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_bidirectional_attention",
)
"""Fields of a published network's config that are not copied to our config. They describe the file
that the config came from, or an attention mask, which our code makes itself."""


@dataclass(frozen=True)
class StoredPaliGemma:
    """A PaliGemma whose weights have been listed, not read.

    title             What reports call it.
    source            Its path or name, for messages and the model card.
    checkpoint        The checkpoint that contains it.
    names             Our name of each of its weights -> the name in the checkpoint.
    config            Its `PaliGemmaConfig`.
    tokenizer_folder  The folder of its tokenizer, which may have none.
    """

    title: str
    source: str
    checkpoint: StoredCheckpoint
    names: Mapping[str, str]
    config: Any
    tokenizer_folder: Path


@dataclass(frozen=True)
class _StoredVocabulary:
    """The token embeddings of a PaliGemma.

    name       The embeddings' name in the checkpoint.
    head_name  The name of the output head, which is a copy of the embeddings. None if the
               checkpoint has no such copy.
    num_rows   Number of embeddings.
    """

    name: str
    head_name: str | None
    num_rows: int


@dataclass(frozen=True)
class _CoordinateTokens:
    """The ids of the 3D tokens: start … end - 1."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


def plan_backbones(
    paligemma: Path | str, moge: Path | str | None, size: str = "spear1"
) -> Conversion[SpearVLMForConditionalGeneration]:
    """Plan the conversion of PaliGemma and MoGe to SPEAR-VLM.

    All names and shapes are checked. No weights are read yet. The ids of the 3D tokens follow the
    tokens of the folder's tokenizer. If the folder has no tokenizer, they follow the embeddings.
    The embeddings of the 3D tokens are drawn from N(mean, covariance) of the embeddings before them
    (the paper). The projection of MoGe's features is new.

    Args:
        paligemma: The folder of a PaliGemma 1 or 2, or its name on the Hub.
        moge: A MoGe or a depth encoder, as `open_depth_encoder` takes it. None makes a plain
            PaliGemma without 3D encoder.
        size: The preset that gives the views, the image sizes and the number of 3D tokens. The
            sizes of the networks are those of the checkpoints.

    Returns:
        The conversion. Its report has the problems with single weights, and its `check` and `run`
        raise them as errors.

    Raises:
        SpearError: A checkpoint is missing, incomplete, broken or of another architecture; a weight
            is not floating point; or the vocabulary does not fit.
    """
    checkpoint = StoredCheckpoint.open(paligemma, "PaliGemma")
    published = StoredPaliGemma(
        title="PaliGemma",
        source=describe_source(paligemma, checkpoint.folder),
        checkpoint=checkpoint,
        names=checkpoint.map_to_stored_names(read_name_rules("paligemma").renamed),
        config=_read_paligemma_config(checkpoint),
        tokenizer_folder=checkpoint.folder,
    )
    return plan_vlm(published, moge, get_preset(size))


def plan_vlm(
    published: StoredPaliGemma,
    moge: Path | str | None,
    preset: Preset,
    keeps_visual_tokens: bool = False,
) -> Conversion[SpearVLMForConditionalGeneration]:
    """Plan the conversion of a listed PaliGemma to SPEAR-VLM, as `plan_backbones` does.

    Args:
        published: The PaliGemma.
        moge: As in `plan_backbones`.
        preset: As `size` in `plan_backbones`.
        keeps_visual_tokens: Whether visual tokens with MoGe are at first those without it. A visual
            token is the average of two projections, SigLIP's and MoGe's. So MoGe's new projection
            is zero, and SigLIP's is doubled. Otherwise MoGe's projection is random.
    """
    # PaliGemma's vocabulary, MoGe, and the new model's config.
    checkpoint = published.checkpoint
    stored_names = dict(published.names)
    vocabulary = _resolve_vocabulary_and_remove_head(checkpoint, stored_names, published.config)
    tokenizer, first_new_id = _load_and_extend_tokenizer(
        published.tokenizer_folder, vocabulary.num_rows, preset.bins
    )
    new_tokens = _CoordinateTokens(first_new_id, preset.bins)
    depth_encoder = None if moge is None else open_depth_encoder(moge)
    config = _make_vlm_config(preset, published.config, vocabulary, new_tokens, depth_encoder)
    _check_image_sizes(preset, config.vision_config.patch_size)

    # The weights that the new model needs. On the meta device they have only shapes.
    with torch.device("meta"):
        model = SpearVLMForConditionalGeneration(copy.deepcopy(config))
    expected_weights = model.state_dict()

    # The weights that PaliGemma has.
    wanted_of_paligemma = {
        name: weight
        for name, weight in expected_weights.items()
        if not name.startswith("moge") and name != EMBEDDINGS
    }
    entries, loaded_names = match_weights(
        wanted_of_paligemma, checkpoint, stored_names, published.title
    )
    entries += _list_statuses_of_vocabulary(published, vocabulary, new_tokens)
    is_doubled = keeps_visual_tokens and moge is not None  # see `_make_network_readers`
    readers = [_make_vocabulary_reader(checkpoint, vocabulary, new_tokens)]
    readers += _make_network_readers(checkpoint, loaded_names, is_doubled)
    if is_doubled:
        entries = [_with_note_on_doubling(entry) for entry in entries]
    sources = {published.title: published.source}

    # The weights that MoGe has. MoGe is read first, because it needs a copy in float32, for which
    # there is most room before the other weights are read.
    if depth_encoder is not None and model.moge is not None:
        encoder_plan = depth_encoder.plan(model.moge)
        entries += encoder_plan.entries
        entries += _list_statuses_of_new_projector(expected_weights, config, keeps_visual_tokens)
        readers.insert(0, encoder_plan.reader)
        if keeps_visual_tokens:
            readers.append(make_zero_reader(_select_moge_projector_shapes(expected_weights)))
        sources["MoGe"] = depth_encoder.describe_source()

    entries += _list_statuses_of_left_out(checkpoint, stored_names, vocabulary, expected_weights)
    return Conversion(
        model_class=SpearVLMForConditionalGeneration,
        config=config,
        report=ConversionReport(_sort_like_model(entries, expected_weights)),
        readers=readers,
        dtype=checkpoint.compute_common_dtype([vocabulary.name, *loaded_names.values()]),
        sources=sources,
        tokenizer=tokenizer,
    )


def _make_network_readers(
    checkpoint: StoredCheckpoint, loaded_names: Mapping[str, str], is_siglip_projector_doubled: bool
) -> list[WeightReader]:
    """Return readers of PaliGemma's networks.

    With `is_siglip_projector_doubled`, they double SigLIP's projection. The new model averages the
    projections of SigLIP and MoGe. MoGe's projection is 0 at first, so the average is what
    PaliGemma computes.
    """
    if not is_siglip_projector_doubled:
        return [make_weight_reader(checkpoint, loaded_names)]
    projector_names: dict[str, str] = {}
    other_names: dict[str, str] = {}
    for our_name, stored_name in loaded_names.items():
        is_projector = our_name.startswith(SIGLIP_PROJECTOR)
        target = projector_names if is_projector else other_names
        target[our_name] = stored_name
    return [
        make_weight_reader(checkpoint, other_names),
        make_weight_reader(checkpoint, projector_names, factor=2.0),
    ]


def _with_note_on_doubling(entry: WeightStatus) -> WeightStatus:
    """Add to the note of SigLIP's projection that it is doubled. Return other weights as is."""
    if entry.status != "loaded" or not entry.name.startswith(SIGLIP_PROJECTOR):
        return entry
    return replace(entry, note=f"{entry.note}, doubled: averaged with MoGe's, which is 0")


def _list_statuses_of_left_out(
    checkpoint: StoredCheckpoint,
    stored_names: Mapping[str, str],
    vocabulary: _StoredVocabulary,
    expected_weights: Mapping[str, Tensor],
) -> list[WeightStatus]:
    """Report the weights of PaliGemma that the new model does not have."""
    entries = []
    if vocabulary.head_name is not None:
        head_shape = checkpoint.weights[vocabulary.head_name].shape
        reason = "tied to the token embeddings"
        entries.append(WeightStatus(vocabulary.head_name, head_shape, "left out", reason))
    leftover_names = {
        our: name for our, name in stored_names.items() if our not in expected_weights
    }
    unused = read_name_rules("paligemma").unused
    entries += list_statuses_of_unused_weights(leftover_names, checkpoint, unused, "SPEAR-VLM")
    return entries


def _sort_like_model(
    entries: Sequence[WeightStatus], expected_weights: Mapping[str, Tensor]
) -> list[WeightStatus]:
    """Sort by the order of the model's weights. Weights that the model does not have come last."""
    order = {name: index for index, name in enumerate(expected_weights)}

    def position(entry: WeightStatus) -> int:
        # The entry may be about some rows of a weight, such as "name[:10]".
        whole_name = entry.name.split("[")[0]
        return order.get(whole_name, len(order))

    return sorted(entries, key=position)


# --- PaliGemma ---


def _read_paligemma_config(checkpoint: StoredCheckpoint) -> Any:
    """Return the `PaliGemmaConfig` of a folder.

    Raises:
        SpearError: The folder contains no PaliGemma that can be converted to a SPEAR-VLM.
    """
    model_type = checkpoint.config.get("model_type")
    file = checkpoint.folder / "config.json"
    if model_type != PaliGemmaConfig.model_type:
        raise SpearError(
            f"{file} is of the architecture {model_type!r}. Give a PaliGemma 1 or 2 folder "
            "('paligemma')."
        )
    config: Any = checkpoint.read_config(PaliGemmaConfig)
    text_type = config.text_config.model_type
    if text_type not in ("gemma", "gemma2"):
        raise SpearError(f"the language model of {file} is {text_type!r}. Give a PaliGemma 1 or 2.")
    if checkpoint.config.get("tie_word_embeddings") is False:
        raise SpearError(
            f"the head of {file} is not tied to its embeddings, as SPEAR-VLM's is. Give a "
            "PaliGemma 1 or 2."
        )
    return config


def _resolve_vocabulary_and_remove_head(
    checkpoint: StoredCheckpoint, stored_names: dict[str, str], published_config: Any
) -> _StoredVocabulary:
    """Find the token embeddings, and change `stored_names` so that it lacks the output head.

    If the embeddings were saved under the head's name, `stored_names` also gets an entry for them.
    """
    head_name = stored_names.pop(HEAD, None)
    if head_name is not None and EMBEDDINGS not in stored_names:
        # The embeddings and the head are one matrix, which was saved under the head's name.
        stored_names[EMBEDDINGS] = head_name
        head_name = None
    if EMBEDDINGS not in stored_names:
        raise SpearError(f"{checkpoint.folder} has no token embeddings. Copy it again.")
    name = stored_names[EMBEDDINGS]
    num_rows = checkpoint.weights[name].shape[0]
    num_tokens = published_config.text_config.vocab_size
    if num_rows != num_tokens:
        raise SpearError(
            f"the config of {checkpoint.folder} says {num_tokens} tokens, its embeddings have "
            f"{num_rows} rows. Take both from the same checkpoint."
        )
    return _StoredVocabulary(name, head_name, num_rows)


def _load_and_extend_tokenizer(folder: Path, num_rows: int, num_new_tokens: int) -> tuple[Any, int]:
    """Add the 3D tokens to a folder's tokenizer.

    Returns:
        The tokenizer, or None if the folder has none; and the id of the first 3D token.
    """
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if not has_tokenizer:
        return None, num_rows
    tokenizer = load_tokenizer(folder)
    check_paligemma_tokens(tokenizer)
    if TOKEN_FORMAT.format(0) in tokenizer.get_vocab():
        raise SpearError(
            f"the tokenizer in {folder} has 3D tokens already. Give a PaliGemma's own."
        )
    # The tokenizer may have one token more than there are embeddings. This is PaliGemma's image
    # token, in whose place the visual tokens are inserted.
    if len(tokenizer) > num_rows + 1:
        raise SpearError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, its embeddings {num_rows} "
            "rows. Take both from the same checkpoint."
        )
    return tokenizer, extend_tokenizer(tokenizer, num_new_tokens).start


def _make_vlm_config(
    preset: Preset,
    published_config: Any,
    vocabulary: _StoredVocabulary,
    new_tokens: _CoordinateTokens,
    moge: PublishedMoge | TrainedDepthEncoder | None,
) -> SpearVLMConfig:
    """Return the preset's config with the checkpoints' networks. Without `moge` it has no MoGe."""
    text_config = _copy_config_without_ignored_fields(published_config.text_config)
    text_config["vocab_size"] = max(vocabulary.num_rows, new_tokens.end)
    vision_config = _copy_config_without_ignored_fields(published_config.vision_config)
    vision_config["vision_use_head"] = False
    network_configs = {
        "vision_config": vision_config,
        "moge_config": None if moge is None else moge.make_config(),
        "text_config": {**text_config, **SPECIAL_TOKEN_IDS},
    }
    return build_vlm_config(
        preset, coordinate_start=new_tokens.start, network_configs=network_configs
    )


def _copy_config_without_ignored_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a network's config without `IGNORED_CONFIG_FIELDS`."""
    fields = config.to_dict()
    return {name: value for name, value in fields.items() if name not in IGNORED_CONFIG_FIELDS}


def _check_image_sizes(preset: Preset, patch_px: int) -> None:
    """Raise `SpearError` if images of the preset do not consist of whole patches."""
    for view, (width, height) in preset.image_sizes.items():
        if width % patch_px or height % patch_px:
            raise SpearError(
                f"the {view} images of preset {preset.name}, {width}×{height}, are no multiple "
                f"of the checkpoint's patch, {patch_px}. Choose another preset."
            )


def _list_statuses_of_vocabulary(
    published: StoredPaliGemma, vocabulary: _StoredVocabulary, new_tokens: _CoordinateTokens
) -> list[WeightStatus]:
    """Report the embeddings in parts: loaded rows, new rows of 3D tokens, and loaded rows after
    these, if there are any."""
    num_rows, width = published.checkpoint.weights[vocabulary.name].shape
    end = new_tokens.end
    num_known = min(num_rows, new_tokens.start)
    source = f"{published.title}: {vocabulary.name}"
    initialization = f"N(mean, covariance) of rows 0:{num_known} (the paper)"
    known_shape = (num_known, width)
    new_shape = (end - num_known, width)
    entries = [
        WeightStatus(f"{EMBEDDINGS}[:{num_known}]", known_shape, "loaded", source),
        WeightStatus(f"{EMBEDDINGS}[{num_known}:{end}]", new_shape, "new", initialization),
    ]
    if num_rows > end:
        rest_shape = (num_rows - end, width)
        entries.append(WeightStatus(f"{EMBEDDINGS}[{end}:]", rest_shape, "loaded", source))
    return entries


def _make_vocabulary_reader(
    checkpoint: StoredCheckpoint, vocabulary: _StoredVocabulary, new_tokens: _CoordinateTokens
) -> WeightReader:
    """Return a reader that reads the known rows of the embeddings and draws the new ones."""
    num_rows, width = checkpoint.weights[vocabulary.name].shape
    end = new_tokens.end
    num_known = min(num_rows, new_tokens.start)

    def read(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        embeddings = torch.empty(max(num_rows, end), width, dtype=dtype)
        checkpoint.read_into(vocabulary.name, embeddings[:num_rows])
        _check_head_equals_embeddings(checkpoint, vocabulary, embeddings[:num_rows])
        known_rows = embeddings[:num_known]
        embeddings[num_known:end] = sample_new_embeddings(known_rows, end - num_known, generator)
        return {EMBEDDINGS: embeddings}

    return read


def _check_head_equals_embeddings(
    checkpoint: StoredCheckpoint, vocabulary: _StoredVocabulary, embeddings: Tensor
) -> None:
    """Raise `SpearError` if the output head, a copy of the embeddings, differs from them."""
    head_name = vocabulary.head_name
    if head_name is None:
        return
    is_equal = checkpoint.weights[head_name].shape == embeddings.shape
    if is_equal:
        is_equal = all(
            torch.equal(piece.to(embeddings.dtype), embeddings[row_range])
            for row_range, piece in checkpoint.read_pieces(head_name)
        )
    if not is_equal:
        raise SpearError(
            f"{head_name} in {checkpoint.folder} differs from {vocabulary.name}, but SPEAR-VLM "
            "ties both. Give a PaliGemma's own."
        )


# --- MoGe ---


def _select_moge_projector_shapes(
    expected_weights: Mapping[str, Tensor],
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the projection of MoGe's features, by name."""
    shapes = {}
    for name, weight in expected_weights.items():
        if name.startswith(MOGE_PROJECTOR):
            shapes[name] = tuple(weight.shape)
    return shapes


def _list_statuses_of_new_projector(
    expected_weights: Mapping[str, Tensor], config: SpearVLMConfig, is_zero: bool
) -> list[WeightStatus]:
    """Report the projection of MoGe's features, which is new: zero, or a random matrix."""
    entries = []
    for name, shape in _select_moge_projector_shapes(expected_weights).items():
        is_random = name.endswith(".weight") and not is_zero
        initialization = f"N(0, {config.initializer_range}²)" if is_random else "0"
        entries.append(WeightStatus(name, shape, "new", initialization))
    return entries
