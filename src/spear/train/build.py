"""What a recipe asks for, put together: the model, its data and its task, before the first step."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spear.data.mixture import Mixture, TrainingSamples
from spear.data.normalize import Mode, Normalizer
from spear.errors import SpearError, check_known, notice
from spear.flow import FlowConfig
from spear.labels.questions.generate import iterate_tokenizer_texts
from spear.labels.store import DepthImages, find_shards, read_depth
from spear.models.presets import Preset, build_spear1_config, build_vlm_config, get_preset
from spear.models.processing import NUM_LOCATIONS, Processor
from spear.models.spear1 import Spear1Config, Spear1ForActionPrediction, load_inner_vlm
from spear.models.stage0 import MogeDepthConfig, MogeForDepth, PatchClassification
from spear.models.vlm import SpearVLMConfig
from spear.models.vlm import SpearVLMForConditionalGeneration as SpearVLM
from spear.models.weights import load as weights
from spear.monitor.distribution import TrainingDistribution
from spear.question_types import QUESTION_TYPES_PIXEL
from spear.tokens import CoordinateTokenizer, init_new_embeddings
from spear.train import optimize, parallel, tasks
from spear.train.optimize import Task
from spear.train.options import Recipe, TrainingInputs, check_inputs
from spear.types import LabeledImage
from spear.util.images import decode_image

Built = tuple[torch.nn.Module, Task, Sequence[Callable[[Path], object]]]
"""A model, the task that trains it, and what writes the result into a folder, part by part."""
Labels = dict[str, list[LabeledImage]]
"""Labelled images by view, as `load_labels` gives them."""


def build(
    stage: Recipe, inputs: TrainingInputs, seed: int = 0
) -> tuple[torch.nn.Module, Task, Callable[[Path], None]]:
    """A recipe's model, the task that trains it, before the first step, and what saves the result.

    Raises `SpearError` for inputs that are missing, or that do not fit the recipe or each other.
    """
    check_inputs(stage, inputs)
    stage, size = check(stage, inputs)
    torch.manual_seed(seed)
    make = {"depth": _depth, "naming": _naming, "vlm": _vlm, "vla": _vla}[stage.kind]
    model, task, writers = make(stage, size, inputs, seed)
    rank = stage.lora_rank
    adapters = optimize.add_adapters(model, rank, stage.lora_alpha) if rank else None

    def save(folder: Path) -> None:
        """A plain model, with the LoRA merged in, which is also in `adapter`."""
        if adapters is not None:
            adapters.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
            adapters.merge_and_unload()
        for write in writers:
            write(folder)

    return model, task, save


def check(stage: Recipe, inputs: TrainingInputs) -> tuple[Recipe, Preset]:
    """Raises `SpearError` for what is wrong with a recipe, its labels, `init` and `moge`, as far as a
    moment's look can tell: no weights and no demonstrations are read.

    Returns the recipe for one piece of each batch, and its size with its flow, and without MoGe as it may be.
    """
    init, labels, acts = inputs.init, inputs.labels, stage.kind == "vla"
    pieces, names = stage.optimization.accumulate, ("batch_size", "question_images")
    shares = {
        name: parallel.divide_into_pieces(getattr(stage, name), name, pieces) for name in names
    }
    size = get_preset(stage.preset)
    size = dataclasses.replace(
        size, flow={**size.flow, **stage.flow}, moge=size.moge if stage.moge else None
    )
    check_known(
        "flow setting", [field.name for field in dataclasses.fields(FlowConfig)], *size.flow
    )
    policy = init is not None and weights.read_architecture(init) == Spear1Config.model_type
    FlowConfig(**size.flow)
    for folder in labels if stage.kind != "depth" else ():
        for view in tasks.view_folders(folder, list(size.image_sizes)).values():
            if (
                view.is_file()
            ):  # what a run says of its labels, and compares, it looks for in folders
                raise SpearError(f"--labels {folder}: a file: give the folder that it is in")
            find_shards(view)
    horizon = size.horizon
    config: Any = build_vlm_config(size)
    if init is not None:
        found: Any = weights.check_checkpoint(
            Spear1ForActionPrediction if policy else SpearVLM, init
        )
        inner = found.vlm_config if policy else found
        horizon = found.horizon if policy else horizon
        if (
            inner.vision_config.hidden_size != size.vision["hidden_size"]
        ):  # the text's: PaliGemma 1's or 2's
            raise SpearError(
                f"--init {init} is not of preset {size.name}: give the --preset it has"
            )
        if acts and (stage.bins is not None or stage.spacing is not None):
            keeps = f"recipe {stage.name} keeps the 3D tokens of its --init"
            raise SpearError(f"{keeps}: set bins and spacing in the VLM's")
        if policy and acts and (fixed := {"rotation", "prediction"} & stage.flow.keys()):
            raise SpearError(
                f"recipe key flow: {init} fixes {', '.join(sorted(fixed))}: begin at a VLM"
            )
        if not stage.moge and inner.moge_config is not None:
            raise SpearError(
                f"recipe {stage.name} has no MoGe, --init {init} has: begin with one without"
            )
        if inputs.moge and inner.moge_config is not None:
            raise SpearError(
                f"--moge {inputs.moge}: --init has an encoder already: leave --moge out"
            )
        if not acts and stage.moge and inner.moge_config is None and inputs.moge is None:
            adds = f"recipe {stage.name} adds MoGe's encoder"
            raise SpearError(f"{adds}: give --moge FOLDER (the result of nano-depth)")
        Processor.load(init, inner)
        config = inner if acts else config
    clean = FlowConfig(**(found.flow if policy else size.flow)).prediction == "clean"
    if clean and "geodesic_step" in stage.flow:
        raise SpearError("recipe key flow: geodesic_step is of velocities alone: leave it out")
    if stage.committed is not None and stage.committed >= horizon:
        raise SpearError(
            f"recipe key committed is {stage.committed}: a chunk has {horizon}: give less"
        )
    if inputs.moge is not None:
        weights.check_checkpoint(MogeForDepth, inputs.moge)
    if stage.kind in ("vlm", "vla"):
        empty_model(stage, build_spear1_config(size, config) if acts else config)
    return stage.with_changes(**shares), size


def normalization(stage: Recipe, init: Path | None) -> Mode:
    """A recipe's, or else as the policy has it that it begins with; a new one has the paper's."""
    if stage.normalization or init is None or stage.kind != "vla":
        return stage.normalization or "quantile"
    return Normalizer.load(own).mode if (own := init / "normalizer.json").is_file() else "quantile"


def empty_model(stage: Recipe, config: SpearVLMConfig | Spear1Config) -> torch.nn.Module:
    """A recipe's model without contents, with its LoRA, frozen and stored. `SpearError`: these do not fit."""
    with torch.device("meta"):
        model = (
            Spear1ForActionPrediction(config)
            if isinstance(config, Spear1Config)
            else SpearVLM(config)
        )
        if stage.lora_rank:
            optimize.add_adapters(model, stage.lora_rank, stage.lora_alpha)
    optimize.apply_freeze(model, stage.optimization)
    optimize.set_weight_precision(model, stage.optimization)
    return model


def _depth(stage: Recipe, size: Preset, inputs: TrainingInputs, seed: int) -> Built:
    model = MogeForDepth(MogeDepthConfig(moge_config=build_vlm_config(size).moge_config))
    views: dict[str, DepthImages] = {}
    for path in sorted(path for folder in inputs.labels for path in folder.glob("depth/*/")):
        views[path.name] = [*views.get(path.name, []), *read_depth(path)]
    if not views:
        where = ", ".join(str(folder / "depth") for folder in inputs.labels)
        raise SpearError(f"no images with depth in {where}: make some with `spear label`")
    return model, tasks.DepthTask(model, views, stage.batch_size, seed), [model.save_pretrained]


def _naming(stage: Recipe, size: Preset, inputs: TrainingInputs, seed: int) -> Built:
    known = tasks.load_labels(inputs.labels, list(size.image_sizes))
    processor, vlm = _new_vlm(stage, size, inputs.labels, known, seed)
    names = _names(known)
    ids = [processor.tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    model = PatchClassification(vlm, ids)
    patch, sizes = vlm.config.vision_config.patch_size, processor.image_sizes
    views = {
        v: [tasks.patch_targets(x, names, patch, sizes[v]) for x in some]
        for v, some in known.items()
    }
    task = tasks.PatchTask(model, processor, views, stage.batch_size, seed)
    return model, task, [vlm.save_pretrained, processor.save]


def _vlm(stage: Recipe, size: Preset, inputs: TrainingInputs, seed: int) -> Built:
    labels = inputs.labels
    known = tasks.load_labels(labels, list(size.image_sizes))
    if inputs.init is None:
        processor, model = _new_vlm(stage, size, labels, known, seed)
    else:
        processor = Processor.load(inputs.init)
        model = load_inner_vlm(inputs.init)
        joins, refit = (model.moge is None) == stage.moge, bool(stage.bins or stage.spacing)
        if refit:
            coordinates = _fitted(stage, known, processor.coordinates.num_bins, seed)
            processor = dataclasses.replace(processor, coordinates=coordinates)
        # 3D tokens are also new where MoGe joins, and, without MoGe, in the stage that learns their rows.
        if refit or joins or (stage.coordinate_rows_only and not stage.moge):
            _renew_coordinates(model, processor, stage, seed)
        if joins:
            model = _with_moge(model, size, inputs.moge)
        _weigh_numbers(model.config, stage)
    samples = _questions(stage, labels, known, processor, stage.batch_size, seed)
    task = tasks.VlmTask(model, samples, stage.coordinate_rows_only)
    return model, task, [model.save_pretrained, processor.save]


def _vla(stage: Recipe, size: Preset, inputs: TrainingInputs, seed: int) -> Built:
    labels, init, episodes = inputs.labels, inputs.init, inputs.episodes
    known = tasks.load_labels(labels, list(size.image_sizes))
    if init is None:
        processor, vlm = _new_vlm(stage, size, labels, known, seed)
        model = _acting(vlm, size)
    else:
        processor = Processor.load(init)
        if weights.read_architecture(init) == Spear1Config.model_type:
            model = weights.load(Spear1ForActionPrediction, init)
            model.config.flow = {**(model.config.flow or {}), **stage.flow}
            model.flow = FlowConfig(**model.config.flow)
        else:
            model = _acting(weights.load(SpearVLM, init), size)
            notice(f"{init} is a SPEAR-VLM: its action expert begins with random weights")
    if stage.committed is not None:
        model.config.committed = stage.committed
    views = {view: (height, width) for view, (width, height) in processor.image_sizes.items()}
    episodes = [(name, store.select_cameras(views), share) for name, store, share in episodes]
    for _, store, _ in episodes:
        for view in views:
            if encoded := store.image(0, 0, view):  # the processor says what is lost of it
                processor.prepare_image(
                    decode_image(encoded, f"{store.path}: camera {view!r}"), view
                )
    each, mode = [(store, share) for _, store, share in episodes], normalization(stage, init)
    normalizer = (
        Normalizer.fit_per_dataset(episodes, mode)
        if stage.normalize_each
        else Normalizer.fit(each, mode)
    )
    samples = TrainingSamples(Mixture(episodes, seed), views, model.config.horizon, stage.augment)
    questions = None
    if stage.question_images:
        questions = _questions(stage, labels, known, processor, stage.question_images, seed)
        _weigh_numbers(model.vlm.config, stage)
    task = tasks.VlaTask(model, processor, normalizer, samples, stage, questions)

    def save(out: Path) -> None:
        normalizer.save(out / "normalizer.json")
        seen = TrainingDistribution.from_samples(samples, stage.batch_size)
        seen.save(out / "seen.json")

    return model, task, (model.save_pretrained, processor.save, save)


def _acting(vlm: SpearVLM, size: Preset) -> Spear1ForActionPrediction:
    """SPEAR-1 around a VLM, with a new action expert."""
    model = Spear1ForActionPrediction(build_spear1_config(size, vlm.config))
    model.vlm.load_state_dict(vlm.state_dict())
    return model


def _questions(
    stage: Recipe,
    folders: Sequence[Path],
    labels: Labels,
    processor: Processor,
    images: int,
    seed: int,
) -> tasks.QuestionSamples:
    mix = stage.questions
    depth = (
        tasks.load_depth(folders, labels) if set(mix.families) & set(QUESTION_TYPES_PIXEL) else None
    )
    return tasks.QuestionSamples(labels, processor, mix, images, seed, stage.augment, depth)


def _names(labels: Labels) -> list[str]:
    """What the objects of the first view are called, once each."""
    return sorted({o.name for label in next(iter(labels.values())) for o in label.objects})


def _fitted(stage: Recipe, labels: Labels, usual: int, seed: int) -> CoordinateTokenizer:
    """The recipe's 3D tokens (`usual` many if it does not say), fitted to the labels."""
    every = [label for some in labels.values() for label in some]
    return tasks.fit_coordinates(every, stage.bins or usual, seed, stage.spacing or "quantile")


def _renew_coordinates(vlm: SpearVLM, processor: Processor, stage: Recipe, seed: int) -> None:
    """Give a model the 3D tokens of `processor`, all of them new, in more rows of embeddings if needed. If
    there are fewer than before, the others stay in the vocabulary as words that no answer has.

    Rows are drawn with the mean and covariance of the words' rows (the paper), without those of the
    location tokens (our choice): nano's were drawn themselves, PaliGemma's stand for places.
    """
    first, bins = processor.coordinate_ids.start, processor.coordinates.num_bins
    words = vlm.get_parameter("language_model.embed_tokens.weight").detach()
    generator = torch.Generator().manual_seed(seed)
    new = init_new_embeddings(
        words[: processor.location_start], bins, generator, stage.smooth_tokens
    )
    rows = torch.cat([words[:first], new, words[first + bins :]])
    embeddings: Any = vlm.get_input_embeddings()  # kept, since Gemma's scales what it looks up
    embeddings.weight, embeddings.num_embeddings = torch.nn.Parameter(rows), len(rows)
    vlm.config.coordinate_bins = bins
    vlm.config.text_config.vocab_size = len(rows)


def _new_vlm(
    stage: Recipe, size: Preset, folders: Sequence[Path], labels: Labels, seed: int
) -> tuple[Processor, SpearVLM]:
    """A tokenizer for our questions' wording and the texts in each `wording.txt`, with fitted 3D tokens; and
    a VLM with random weights, in which location and 3D tokens are alike where their places are alike."""
    texts = list(iterate_tokenizer_texts(_names(labels)))
    for wording in (folder / "wording.txt" for folder in folders):
        texts += wording.read_text("utf-8").splitlines() if wording.is_file() else []
    processor = Processor.build(size, texts, _fitted(stage, labels, size.bins, seed))
    config = build_vlm_config(size, len(processor.tokenizer), processor.coordinate_ids.start)
    config.coordinate_bins = processor.coordinates.num_bins
    _weigh_numbers(config, stage)
    vlm = SpearVLM(config)
    embeddings = vlm.get_parameter("language_model.embed_tokens.weight")
    generator = torch.Generator().manual_seed(seed)
    words = embeddings[: processor.location_start]
    places = (
        (processor.location_start, NUM_LOCATIONS),
        (config.coordinate_start, config.coordinate_bins),
    )
    with torch.no_grad():
        for first, count in places:
            embeddings[first : first + count] = init_new_embeddings(
                words, count, generator, smooth=True
            )
    return processor, vlm


def _weigh_numbers(config: SpearVLMConfig, stage: Recipe) -> None:
    """Copy the weight and smoothing of the 3D tokens' loss from the recipe into the model's config."""
    config.coordinate_loss_weight = stage.questions.coordinate_weight
    config.coordinate_smoothing = stage.questions.coordinate_smoothing


def _with_moge(vlm: SpearVLM, size: Preset, moge: Path | None) -> SpearVLM:
    """The VLM with MoGe's encoder and a projection for it, by which no visual token changes yet."""
    parts = {**vlm.config.to_dict(), "moge_config": build_vlm_config(size).moge_config.to_dict()}
    model = SpearVLM(SpearVLMConfig.from_dict(parts))
    model.load_state_dict(vlm.state_dict(), strict=False)
    assert moge is not None and model.moge is not None and model.moge_projector is not None
    model.moge.load_state_dict(weights.load(MogeForDepth, moge).moge.state_dict())
    with torch.no_grad():
        # A visual token becomes the average of two projections: twice SigLIP's and nothing of MoGe's is what
        # the language model knows (our choice for nano).
        for parameter in model.multi_modal_projector.parameters():
            parameter.mul_(2)
        for parameter in model.moge_projector.parameters():
            parameter.zero_()
    return model
