"""What a recipe asks for, put together: the model, its data and its task, before the first step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spear.data.mixture import Mixture, TrainingSamples
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, unknown_name
from spear.flow import FlowConfig
from spear.labels.questions.generate import FAMILIES_PIXEL, all_texts
from spear.models.moge.encoder import MogeDepthConfig, MogeForDepth
from spear.models.patch_classification import PatchClassification
from spear.models.presets import Preset, preset, spear1_config, vlm_config
from spear.models.processing import LOCATIONS, Processor, fit_image
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.vlm import SpearVLMConfig, SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.tokens import CoordinateTokenizer, init_new_embeddings
from spear.train import parallel
from spear.train.inputs import check_inputs
from spear.train.lora import add_adapters, merge_adapters, save_adapters
from spear.train.optimize import Task
from spear.train.recipes import Recipe
from spear.train.tasks.depth import DepthTask
from spear.train.tasks.patch_classification import NamingTask
from spear.train.tasks.questions import QuestionSamples, VlmTask, fit_coordinates, load_depth, load_labels
from spear.train.tasks.vla import VlaTask
from spear.types import LabeledImage

Built = tuple[torch.nn.Module, Task, Callable[[Path], Any]]
"""A model, the task that trains it, and what saves the result into a folder."""


def build(
    stage: Recipe,
    labels: Path | None = None,
    episodes: Sequence[tuple[str, EpisodeStore, float]] = (),
    init: Path | None = None,
    moge: Path | None = None,
    seed: int = 0,
) -> Built:
    """A recipe's model and task, before the first step; arguments as in `train`."""
    check_inputs(stage, labels is not None, bool(episodes), init is not None, moge is not None)
    torch.manual_seed(seed)
    size = _with_flow(preset(stage.preset), stage.flow)
    pieces = stage.optimization.accumulate
    stage = stage.changed(
        batch_size=parallel.share(stage.batch_size, "batch_size", pieces),
        question_images=parallel.share(stage.question_images, "question_images", pieces),
    )
    if stage.kind == "depth":
        return _depth(stage, size, _given(labels), seed)
    if stage.kind == "naming":
        return _naming(stage, size, _given(labels), seed)
    if stage.kind == "vlm":
        built = _vlm(stage, size, _given(labels), init, moge, seed)
    else:
        built = _vla(stage, size, labels, episodes, init, seed)
    return _with_lora(stage, *built) if stage.lora_rank else built


def _with_flow(size: Preset, changes: Mapping[str, Any]) -> Preset:
    known = {field.name for field in dataclasses.fields(FlowConfig)}
    for key in changes:
        if key not in known:
            raise unknown_name("flow setting", key, known)
    return dataclasses.replace(size, flow={**size.flow, **changes})


def _with_lora(stage: Recipe, model: torch.nn.Module, task: Task, save: Callable[[Path], Any]) -> Built:
    """The same with LoRA. Saved are a plain model, with the LoRA merged into it, and the LoRA, in
    `adapter`."""
    add_adapters(model, stage.lora_rank, stage.lora_alpha)

    def save_merged(folder: Path) -> None:
        save_adapters(model, folder / "adapter", stage.lora_rank, stage.lora_alpha)
        merge_adapters(model)
        save(folder)

    return model, task, save_merged


def _depth(stage: Recipe, size: Preset, labels: Path, seed: int) -> Built:
    encoder = vlm_config(size).moge_config
    model = MogeForDepth(MogeDepthConfig(moge_config=encoder))
    return model, DepthTask(model, labels / "depth", stage.batch_size, seed), model.save_pretrained


def _naming(stage: Recipe, size: Preset, labels: Path, seed: int) -> Built:
    known = load_labels(labels, list(size.image_sizes), masks=True)
    processor = _new_processor(stage, size, labels, known, seed)
    vlm = _new_vlm(stage, size, processor, seed)
    names = sorted({o.name for label in known["external"] for o in label.objects})
    ids = [processor.tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    model = PatchClassification(vlm, ids)
    task = NamingTask(model, processor, names, known, size.vision["patch_size"], stage.batch_size, seed)

    def save(folder: Path) -> None:
        vlm.save_pretrained(folder)
        processor.save(folder)

    return model, task, save


def _vlm(stage: Recipe, size: Preset, labels: Path, init: Path | None, moge: Path | None, seed: int) -> Built:
    known = load_labels(labels, list(size.image_sizes))
    if init is None:
        processor = _new_processor(stage, size, labels, known, seed)
        model = _new_vlm(stage, size, processor, seed)
    else:
        processor = Processor.load(init)
        earlier = weights.load(SpearVLMForConditionalGeneration, init)
        _check_size(earlier.config, size, init)
        if stage.bins is not None or stage.spacing is not None:
            processor = dataclasses.replace(
                processor, coordinates=_fitted(stage, known, processor.coordinates.bins, seed)
            )
            _renew_coordinates(earlier, processor, stage, seed)
        model = _grown(earlier, stage, size, processor, moge, seed)
    samples = _questions(stage, labels, known, processor, stage.batch_size, seed)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save(folder)

    return model, VlmTask(model, samples, stage.coordinate_rows_only), save


def _vla(
    stage: Recipe,
    size: Preset,
    labels: Path | None,
    episodes: Sequence[tuple[str, EpisodeStore, float]],
    init: Path | None,
    seed: int,
) -> Built:
    known = load_labels(labels, list(size.image_sizes)) if labels is not None else {}
    if init is None:
        processor = _new_processor(stage, size, _given(labels), known, seed)
        vlm = _new_vlm(stage, size, processor, seed)
        model = Spear1ForActionPrediction(spear1_config(size, vlm.config))
        model.vlm.load_state_dict(vlm.state_dict())
    else:
        if stage.bins is not None or stage.spacing is not None:
            raise SpearError(
                f"recipe {stage.name} keeps the 3D tokens of its --init: set bins and spacing when the VLM is trained"
            )
        processor = Processor.load(init)
        kind = json.loads((init / "config.json").read_text())["model_type"]
        if kind == Spear1ForActionPrediction.config_class.model_type:
            if stage.flow:
                raise SpearError(
                    f"recipe {stage.name} changes the flow, which that of {init} fixes: begin at a SPEAR-VLM"
                )
            model = weights.load(Spear1ForActionPrediction, init)
        else:
            vlm = weights.load(SpearVLMForConditionalGeneration, init)
            model = Spear1ForActionPrediction(spear1_config(size, vlm.config))
            model.vlm.load_state_dict(vlm.state_dict())
        _check_size(model.vlm.config, size, init)
    if stage.normalize_each:
        normalizer = Normalizer.fit_each(episodes, stage.normalization)
    else:
        normalizer = Normalizer.fit([(store, weight) for _, store, weight in episodes], stage.normalization)
    views = {view: (height, width) for view, (width, height) in processor.image_sizes.items()}
    for name, store, _ in episodes:
        if not set(store.cameras) & set(views):
            raise SpearError(
                f"dataset {name!r}: no camera {' or '.join(views)}: it has {', '.join(store.cameras)}: name them so in "
                "its spear.json"
            )
    samples = TrainingSamples(Mixture(episodes, seed), views, fit_image, model.config.horizon, stage.augment)
    questions = None
    if stage.question_images:
        questions = _questions(stage, _given(labels), known, processor, stage.question_images, seed)
        _weigh_numbers(model.vlm.config, stage)
    task = VlaTask(
        model,
        processor,
        normalizer,
        samples,
        stage.batch_size,
        stage.flow_samples,
        questions,
        stage.question_weight,
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save(folder)
        normalizer.save(folder / "normalizer.json")

    return model, task, save


def _check_size(config: SpearVLMConfig, size: Preset, init: Path) -> None:
    """Raises `SpearError` if a trained model is not of a preset's size."""
    widths = config.text_config.hidden_size, config.vision_config.hidden_size
    if widths != (size.text["hidden_size"], size.vision["hidden_size"]):
        raise SpearError(
            f"--init {init} is not of preset {size.name}: give the --preset that it was made with"
        )


def _questions(
    stage: Recipe,
    folder: Path,
    labels: dict[str, list[LabeledImage]],
    processor: Processor,
    images: int,
    seed: int,
) -> QuestionSamples:
    mix = stage.questions
    depth = load_depth(folder, labels) if set(mix.families) & set(FAMILIES_PIXEL) else None
    return QuestionSamples(labels, processor, mix, images, seed, stage.augment, depth)


def _given(labels: Path | None) -> Path:
    """Labels that `check_inputs` has seen to be there."""
    assert labels is not None
    return labels


def _new_processor(
    stage: Recipe, size: Preset, folder: Path, labels: dict[str, list[LabeledImage]], seed: int
) -> Processor:
    """A tokenizer for the wording of our questions and for the texts in `folder/wording.txt`, and fitted 3D
    tokens."""
    first = next(iter(labels.values()))
    names = sorted({o.name for label in first for o in label.objects})
    wording = folder / "wording.txt"
    texts = [*all_texts(names), *(wording.read_text().splitlines() if wording.is_file() else [])]
    return Processor.build(size, texts, _fitted(stage, labels, size.bins, seed))


def _fitted(
    stage: Recipe, labels: dict[str, list[LabeledImage]], usual: int, seed: int
) -> CoordinateTokenizer:
    """The recipe's 3D tokens, fitted to the labels of the first view; `usual` many where it does not say."""
    bins = usual if stage.bins is None else stage.bins
    return fit_coordinates(next(iter(labels.values())), bins, seed, stage.spacing or "quantile")


def _renew_coordinates(
    vlm: SpearVLMForConditionalGeneration, processor: Processor, stage: Recipe, seed: int
) -> None:
    """Give a model the 3D tokens of `processor`: more rows of embeddings if it needs them, all of them new.

    Of fewer tokens than before the others stay in the vocabulary, as words that no answer has.
    """
    first, bins = processor.coordinate_start, processor.coordinates.bins
    words = vlm.get_parameter("language_model.embed_tokens.weight").detach()
    new = _new_tokens(words, processor, stage, seed)
    rows = torch.cat([words[:first], new, words[first + bins :]])
    embeddings: Any = vlm.get_input_embeddings()  # kept, since Gemma's scales what it looks up
    embeddings.weight, embeddings.num_embeddings = torch.nn.Parameter(rows), len(rows)
    vlm.config.coordinate_bins = bins
    vlm.config.text_config.vocab_size = len(rows)


def _new_vlm(
    stage: Recipe, size: Preset, processor: Processor, seed: int
) -> SpearVLMForConditionalGeneration:
    """A VLM with random weights; location and 3D tokens are alike where their places are alike."""
    vlm = SpearVLMForConditionalGeneration(_vlm_config(stage, size, processor))
    embeddings = vlm.get_parameter("language_model.embed_tokens.weight")
    generator = torch.Generator().manual_seed(seed)
    words = embeddings[: processor.location_start]
    with torch.no_grad():
        for first, count in (
            (processor.location_start, LOCATIONS),
            (processor.coordinate_start, processor.coordinates.bins),
        ):
            embeddings[first : first + count] = init_new_embeddings(words, count, generator, smooth=True)
    return vlm


def _vlm_config(stage: Recipe, size: Preset, processor: Processor) -> SpearVLMConfig:
    config = vlm_config(size, processor.vocabulary, processor.coordinate_start)
    config.coordinate_bins = processor.coordinates.bins
    if not stage.moge:
        config.moge_config = None
    _weigh_numbers(config, stage)
    return config


def _grown(
    vlm: SpearVLMForConditionalGeneration,
    stage: Recipe,
    size: Preset,
    processor: Processor,
    moge: Path | None,
    seed: int,
) -> SpearVLMForConditionalGeneration:
    """The earlier stage's VLM, with what this stage adds: MoGe's encoder, a new projection, new 3D tokens.

    The 3D tokens are new where MoGe joins, and, without MoGe, in the stage that learns their rows alone.
    """
    joins = (vlm.moge is None) == stage.moge
    if joins:
        vlm = _with_moge(vlm, stage, size, processor, moge)
    elif moge is not None:
        raise SpearError(f"--moge {moge}: --init has an encoder already: leave --moge out")
    _weigh_numbers(vlm.config, stage)
    if joins or (stage.coordinate_rows_only and not stage.moge):
        first, bins = processor.coordinate_start, processor.coordinates.bins
        embeddings = vlm.get_parameter("language_model.embed_tokens.weight")
        with torch.no_grad():
            embeddings[first : first + bins] = _new_tokens(embeddings, processor, stage, seed)
    return vlm


def _new_tokens(embeddings: torch.Tensor, processor: Processor, stage: Recipe, seed: int) -> torch.Tensor:
    """Rows for the 3D tokens, drawn with the mean and covariance of the words' rows (the paper, section 3).

    The location tokens' are left out, since they were drawn the same way (our choice; `models.backbones` has
    all).
    """
    words = embeddings[: processor.location_start]
    generator = torch.Generator().manual_seed(seed)
    return init_new_embeddings(words, processor.coordinates.bins, generator, stage.smooth_tokens)


def _weigh_numbers(config: SpearVLMConfig, stage: Recipe) -> None:
    """What the loss of 3D tokens is, from the recipe into the model that computes it."""
    config.coordinate_loss_weight = stage.questions.coordinate_weight
    config.coordinate_smoothing = stage.questions.coordinate_smoothing


def _with_moge(
    vlm: SpearVLMForConditionalGeneration,
    stage: Recipe,
    size: Preset,
    processor: Processor,
    moge: Path | None,
) -> SpearVLMForConditionalGeneration:
    """The VLM with MoGe's encoder and a projection for it, by which no visual token changes yet."""
    model = SpearVLMForConditionalGeneration(_vlm_config(stage, size, processor))
    missing, unexpected = model.load_state_dict(vlm.state_dict(), strict=False)
    wrong = [k for k in missing if not k.startswith(("moge.", "moge_projector."))] + list(unexpected)
    if wrong:
        raise SpearError(f"--init does not fit recipe {stage.name}: {', '.join(wrong[:3])}")
    if moge is None:
        raise SpearError(
            f"recipe {stage.name} adds MoGe's encoder: give --moge FOLDER (the result of nano-depth)"
        )
    encoder = weights.load(MogeForDepth, moge)
    assert model.moge is not None
    model.moge.load_state_dict(encoder.moge.state_dict())
    assert model.moge_projector is not None
    with torch.no_grad():
        # A visual token becomes the average of two projections. At the start it is what it was, so that the
        # language model still reads it (our choice for nano): twice SigLIP's, and nothing of MoGe's.
        for parameter in model.multi_modal_projector.parameters():
            parameter.mul_(2)
        for parameter in model.moge_projector.parameters():
            parameter.zero_()
    return model
