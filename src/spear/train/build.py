"""From a recipe to a training before its first step: the model, its data and its task.

`check` finds mistakes in a recipe and its inputs before anything large is read. `build` then reads
the inputs and builds the model. There are four kinds of recipes, each with its own builder:

depth    stage 0 (nano only): an image encoder learns depth, in place of MoGe's pretraining.
naming   stage 0 (nano only): a VLM's image encoder learns the names of the objects that image
         patches show, in place of SigLIP's pretraining.
vlm      SPEAR-VLM learns to answer questions about labeled images.
vla      SPEAR-1 learns to act from demonstrations.

MoGe's encoder is SPEAR-VLM's second image encoder. A VLM without it ("has no MoGe") is a plain
PaliGemma.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spear.data.frames import (
    fill_in_frame_versions_if_simulator_only,
    get_newest_frame_version,
    list_names_with_outdated_frames,
    merge_frame_versions,
)
from spear.data.mixture import Mixture, TrainingSamples
from spear.data.normalize import Mode, Normalizer
from spear.data.store.episode_store import WeightedStore
from spear.errors import SpearError, check_known, notice
from spear.flow import FlowConfig
from spear.labels.questions.generate import iterate_tokenizer_texts
from spear.labels.store import DepthImages, list_label_shards, read_images_with_coarse_depth
from spear.models.presets import Preset, build_spear1_config, build_vlm_config, get_preset
from spear.models.processing import NUM_LOCATIONS, Processor
from spear.models.spear1 import Spear1Config, Spear1ForActionPrediction, load_inner_vlm
from spear.models.stage0 import MogeDepthConfig, MogeForDepth, PatchClassification
from spear.models.vlm import SpearVLMConfig
from spear.models.vlm import SpearVLMForConditionalGeneration as SpearVLM
from spear.models.weights import load as weights
from spear.models.weights.folders import is_simulator_only
from spear.monitor.distribution import TrainingDistribution
from spear.question_types import QUESTION_TYPES_PIXEL
from spear.tokens import CoordinateTokenizer, sample_new_embeddings
from spear.train import optimize, parallel, tasks
from spear.train.optimize import Task
from spear.train.options import Recipe, TrainingInputs, check_inputs
from spear.types import LabeledImage
from spear.util.images import decode_image

# Name of the VLM's parameter with the token embeddings.
EMBEDDINGS_NAME = "language_model.embed_tokens.weight"

LabelsByView = dict[str, list[LabeledImage]]
"""View (camera) -> its labeled images, as `tasks.load_labels` returns them."""


class _Built(NamedTuple):
    """A model, the task that trains it, and functions that each write a part of the result."""

    model: torch.nn.Module
    task: Task
    writers: Sequence[Callable[[Path], object]]


class BuiltTraining(NamedTuple):
    """What a recipe trains.

    Attributes:
        model: The model before the first step.
        task: The task that trains the model.
        save: Writes the trained model into a folder.
    """

    model: torch.nn.Module
    task: Task
    save: Callable[[Path], None]


def build(
    recipe: Recipe, inputs: TrainingInputs, seed: int = 0, is_checked: bool = False
) -> BuiltTraining:
    """Build a recipe's model and task, before the first step.

    Args:
        recipe: what to train.
        inputs: what to learn from and to start from.
        seed: the seed of new weights and of the batches.
        is_checked: whether `check` has passed, so that it need not read the inputs again.

    Raises:
        SpearError: for inputs that are missing, or that do not fit the recipe or each other.
    """
    check_inputs(recipe, inputs)
    if not is_checked:
        check(recipe, inputs)
    recipe_of_piece = _divide_batch(recipe)
    preset = _build_preset(recipe)
    torch.manual_seed(seed)
    builders = {
        "depth": _build_depth,
        "naming": _build_naming,
        "vlm": _build_vlm,
        "vla": _build_vla,
    }
    built = builders[recipe.kind](recipe_of_piece, preset, inputs, seed)

    adapters = None
    if recipe.lora_rank:
        adapters = optimize.add_adapters(built.model, recipe.lora_rank, recipe.lora_alpha)

    def save(folder: Path) -> None:
        """Write the trained model. If it has LoRA matrices, they are merged into its weights.

        The LoRA matrices are also written separately, to the folder `adapter`.
        """
        if adapters is not None:
            adapters.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
            adapters.merge_and_unload()
        for write in built.writers:
            write(folder)

    return BuiltTraining(built.model, built.task, save)


def check(recipe: Recipe, inputs: TrainingInputs) -> None:
    """Check a recipe and its inputs without reading weights or demonstrations.

    Raises:
        SpearError: for the first mistake in the recipe or its inputs.
    """
    _divide_batch(recipe)  # raises `SpearError` if the pieces are not equal

    # The flow settings and the folders of labels.
    preset = _build_preset(recipe)
    check_known(
        "flow setting", [field.name for field in dataclasses.fields(FlowConfig)], *preset.flow
    )
    FlowConfig(**preset.flow)
    if recipe.kind != "depth":
        _check_label_folders(recipe, preset, inputs.labels)

    # The weights to start from.
    init_config = None
    if inputs.init is not None:
        init_config = _check_init_and_read_config(recipe, preset, inputs)
    _check_recipe_fits_policy(recipe, preset, init_config)
    if inputs.init_depth_encoder is not None:
        weights.read_compatible_config(MogeForDepth, inputs.init_depth_encoder)

    # The freeze schedule. A model without memory for weights is built to check that the recipe's
    # frozen and trained prefixes name modules that the model has.
    if recipe.kind == "vlm":
        build_empty_model(recipe, build_vlm_config(preset))
    elif recipe.kind == "vla":
        vlm = build_vlm_config(preset) if init_config is None else _get_vlm_config(init_config)
        build_empty_model(recipe, build_spear1_config(preset, vlm))


def _divide_batch(recipe: Recipe) -> Recipe:
    """Return the recipe of one piece of a batch, whose batch sizes are divided by their number.

    A step's batch is divided among processes and gradient accumulation, see
    `spear.train.parallel`. Raises `SpearError` if it cannot be divided into equal pieces.
    """
    pieces_per_process = recipe.optimization.accumulate
    sizes_per_piece = {
        name: parallel.compute_piece_size(getattr(recipe, name), name, pieces_per_process)
        for name in ("batch_size", "question_images")
    }
    return recipe.with_changes(**sizes_per_piece)


def _build_preset(recipe: Recipe) -> Preset:
    """Return the recipe's preset, with its flow settings, and without MoGe if it has none."""
    preset = get_preset(recipe.preset)
    flow = {**preset.flow, **recipe.flow}
    moge = preset.moge if recipe.moge else None
    return dataclasses.replace(preset, flow=flow, moge=moge)


def _check_label_folders(recipe: Recipe, preset: Preset, folders: Sequence[Path]) -> None:
    """Check that the paths of labels are folders that contain shards of labels.

    Training could read a single file, too. But a resumed run is compared with the recorded contents
    of its folders of labels, so labels have to be in a folder.
    """
    for folder in folders:
        view_folders = tasks.find_view_folders_or_single_folder(folder, list(preset.image_sizes))
        for path in view_folders.values():
            if path.is_file():
                raise SpearError(f"--labels {folder} is a file. Give the folder that it is in.")
            list_label_shards(path)


def _check_init_and_read_config(recipe: Recipe, preset: Preset, inputs: TrainingInputs) -> Any:
    """Check that the recipe can begin with `inputs.init`; return that checkpoint's config.

    The config is a `Spear1Config` if the checkpoint is a policy, a `MogeDepthConfig` if the recipe
    trains the depth encoder, otherwise a `SpearVLMConfig`.
    """
    init = inputs.init
    assert init is not None
    if recipe.kind == "depth":
        return weights.read_compatible_config(MogeForDepth, init)
    is_policy = weights.read_model_type(init) == Spear1Config.model_type
    model_class = Spear1ForActionPrediction if is_policy else SpearVLM
    config: Any = weights.read_compatible_config(model_class, init)
    vlm = _get_vlm_config(config)

    # The vision encoder's width tells the presets apart. The text model does not, because a
    # preset's checkpoint may have the one of PaliGemma 1 or of PaliGemma 2.
    if vlm.vision_config.hidden_size != preset.vision["hidden_size"]:
        raise SpearError(
            f"--init {init} is not of preset {preset.name}. Give the --preset that it has."
        )
    if recipe.kind == "vla":
        if recipe.bins is not None or recipe.spacing is not None:
            raise SpearError(
                f"recipe {recipe.name} keeps the 3D tokens of its --init. Set bins and spacing in "
                "the VLM's recipe."
            )
        fixed_settings = sorted({"rotation", "prediction"} & recipe.flow.keys())
        if is_policy and fixed_settings:
            raise SpearError(
                f"the recipe key flow cannot change what {init} fixes "
                f"({', '.join(fixed_settings)}). Begin with a VLM instead."
            )
    _check_moge(recipe, inputs, init_has_moge=vlm.moge_config is not None)
    Processor.load(init, vlm)  # raises `SpearError` if its files are missing or do not fit
    return config


def _get_vlm_config(config: Any) -> SpearVLMConfig:
    """Return the config of the VLM: the inner one of a policy's config, or a VLM's own config."""
    return config.vlm_config if isinstance(config, Spear1Config) else config


def _check_moge(recipe: Recipe, inputs: TrainingInputs, init_has_moge: bool) -> None:
    """Check that the recipe and the initial weights agree about MoGe's encoder.

    `init_has_moge` says whether the VLM of `--init` has the encoder already. Otherwise the encoder
    comes from `--init-depth-encoder`.
    """
    if not recipe.moge and init_has_moge:
        raise SpearError(
            f"recipe {recipe.name} has no MoGe, but --init {inputs.init} has. Begin with weights "
            "without MoGe."
        )
    if inputs.init_depth_encoder and init_has_moge:
        raise SpearError(
            f"--init-depth-encoder {inputs.init_depth_encoder} has no effect, because --init "
            "has an encoder of MoGe already. Leave it out."
        )
    # A policy takes the VLM of `--init` as it is. All other recipes add a missing encoder.
    should_add_moge = recipe.kind != "vla" and recipe.moge and not init_has_moge
    if should_add_moge and inputs.init_depth_encoder is None:
        raise SpearError(
            f"recipe {recipe.name} adds MoGe's encoder. Give --init-depth-encoder FOLDER, the "
            "result of nano-depth."
        )


def _check_recipe_fits_policy(recipe: Recipe, preset: Preset, init_config: Any) -> None:
    """Check that the recipe's flow settings and committed prefix fit the policy.

    If `--init` is a policy, its own flow settings and horizon count, otherwise the preset's.
    """
    flow: Any = preset.flow
    horizon = preset.horizon
    if isinstance(init_config, Spear1Config):
        flow = init_config.flow
        horizon = init_config.horizon

    if FlowConfig(**flow).prediction == "clean" and "geodesic_step" in recipe.flow:
        raise SpearError(
            "geodesic_step of the recipe key flow has an effect on predicted velocities alone. "
            "Leave it out."
        )
    if recipe.committed is not None and recipe.committed >= horizon:
        raise SpearError(
            f"recipe key committed is {recipe.committed}, but a chunk has {horizon} actions. "
            f"Give at most {horizon - 1}."
        )


def resolve_normalization(recipe: Recipe, init: Path | None) -> Recipe:
    """Return the recipe with all that says how actions are measured and normalized.

    What the recipe leaves open is as in the policy in `init`. A policy that begins with a VLM or
    without weights has the paper's normalization, "quantile", and measures actions from the pose
    before (our choice).

    Raises:
        SpearError: the normalization is "bounds", but nothing says which bounds, or the other way
            round.
    """
    mode: Mode = recipe.normalization or "quantile"
    bounds_m = recipe.bounds_m
    reference = recipe.action_reference
    path = None if init is None else init / "normalizer.json"
    if recipe.kind == "vla" and path is not None and path.is_file():
        initial = Normalizer.load(path)
        mode = recipe.normalization or initial.mode
        reference = reference or initial.action_reference
        if mode == initial.mode == "bounds" and bounds_m is None:
            bounds_m = initial.translation_scale
    if mode == "bounds" and bounds_m is None:
        raise SpearError(
            "normalization=bounds needs the length of a step that becomes 1. Add --set "
            "bounds_m=[0.05,0.05,0.05], in meters per axis."
        )
    if mode != "bounds" and bounds_m is not None:
        raise SpearError(
            f"bounds_m has no effect with normalization={mode}. Add --set normalization=bounds, or "
            "leave bounds_m out."
        )
    return dataclasses.replace(
        recipe, normalization=mode, bounds_m=bounds_m, action_reference=reference or "previous"
    )


def build_empty_model(recipe: Recipe, config: SpearVLMConfig | Spear1Config) -> torch.nn.Module:
    """Build a recipe's model on PyTorch's meta device, where weights have shapes but no memory.

    The model has the recipe's LoRA matrices, freeze schedule and precision. Raises `SpearError` if
    the freeze schedule does not fit the model.
    """
    with torch.device("meta"):
        model: torch.nn.Module
        if isinstance(config, Spear1Config):
            model = Spear1ForActionPrediction(config)
        else:
            model = SpearVLM(config)
        if recipe.lora_rank:
            optimize.add_adapters(model, recipe.lora_rank, recipe.lora_alpha)
    optimize.apply_freeze(model, recipe.optimization)
    optimize.set_weight_precision(model, recipe.optimization)
    return model


def _build_depth(recipe: Recipe, preset: Preset, inputs: TrainingInputs, seed: int) -> _Built:
    """Build stage 0's encoder, which learns depth. It may begin with an earlier one."""
    if inputs.init is None:
        model = MogeForDepth(MogeDepthConfig(moge_config=build_vlm_config(preset).moge_config))
    else:
        model = weights.load(MogeForDepth, inputs.init)
    folders: list[Path] = []
    for folder in inputs.labels:
        folders.extend(folder.glob("depth/*/"))

    # A folder `depth/VIEW` has the images of one view. Several label folders may have that view.
    views: dict[str, DepthImages] = {}
    for folder in sorted(folders):
        view = folder.name
        views[view] = [*views.get(view, []), *read_images_with_coarse_depth(folder)]
    if not views:
        searched = ", ".join(str(folder / "depth") for folder in inputs.labels)
        raise SpearError(
            f"there are no images with depth in {searched}. Make some with `spear label`."
        )
    task = tasks.DepthTask(model, views, recipe.batch_size, seed)
    return _Built(model, task, writers=[model.save_pretrained])


def _build_naming(recipe: Recipe, preset: Preset, inputs: TrainingInputs, seed: int) -> _Built:
    """Build stage 0's VLM, whose image encoder learns which objects the image patches show.

    With `--init` the training begins with the VLM in that folder. It may be that of a later stage,
    which then learns to name objects in other surroundings.
    """
    labels = tasks.load_labels(inputs.labels, list(preset.image_sizes))
    if inputs.init is None:
        processor, vlm = _make_new_vlm(recipe, preset, inputs.labels, labels, seed)
    else:
        processor, vlm = Processor.load(inputs.init), load_inner_vlm(inputs.init)

    # Names that only other views contain are not learned. The tokenizer of a new VLM is made from
    # the same names.
    names = _list_object_names_in_first_view(labels)
    token_ids = [processor.tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    model = PatchClassification(vlm, token_ids)

    patch_side_px = vlm.config.vision_config.patch_size
    views = {}
    for view, labels_of_view in labels.items():
        image_size = processor.image_sizes[view]
        views[view] = [
            tasks.compute_patch_targets(label, names, patch_side_px, image_size)
            for label in labels_of_view
        ]
    task = tasks.PatchTask(model, processor, views, recipe.batch_size, seed)
    return _Built(model, task, writers=[vlm.save_pretrained, processor.save])


def _build_vlm(recipe: Recipe, preset: Preset, inputs: TrainingInputs, seed: int) -> _Built:
    """Build a VLM that learns to answer questions."""
    labels = tasks.load_labels(inputs.labels, list(preset.image_sizes))
    if inputs.init is None:
        processor, model = _make_new_vlm(recipe, preset, inputs.labels, labels, seed)
    else:
        processor, model = _load_and_adapt_initial_vlm(recipe, preset, inputs, labels, seed)

    questions = _make_question_samples(recipe, inputs, labels, processor, recipe.batch_size, seed)
    task = tasks.VlmTask(model, questions, recipe.coordinate_rows_only)
    return _Built(model, task, writers=[model.save_pretrained, processor.save])


def _load_and_adapt_initial_vlm(
    recipe: Recipe, preset: Preset, inputs: TrainingInputs, labels: LabelsByView, seed: int
) -> tuple[Processor, SpearVLM]:
    """Load the VLM of `inputs.init`; add new 3D tokens and MoGe's encoder if the recipe says so."""
    assert inputs.init is not None
    processor = Processor.load(inputs.init)
    model = load_inner_vlm(inputs.init)
    is_moge_new = recipe.moge and model.moge is None
    fits_tokens = bool(recipe.bins or recipe.spacing)
    if fits_tokens:
        coordinates = _fit_coordinates(recipe, labels, processor.coordinates.num_bins, seed)
        processor = dataclasses.replace(processor, coordinates=coordinates)

    # The 3D tokens' embeddings begin anew if the tokens were fitted, if MoGe's encoder is added,
    # and in a recipe without MoGe that trains these embeddings alone.
    learns_tokens_without_moge = recipe.coordinate_rows_only and not recipe.moge
    if fits_tokens or is_moge_new or learns_tokens_without_moge:
        _renew_coordinate_embeddings(model, processor, recipe, seed)
    if is_moge_new:
        model = _copy_vlm_with_moge(model, preset, inputs.init_depth_encoder)
    _set_coordinate_loss(model.config, recipe)
    return processor, model


def _build_vla(recipe: Recipe, preset: Preset, inputs: TrainingInputs, seed: int) -> _Built:
    """Build a policy that learns from demonstrations, and from questions if the recipe asks any."""
    labels = tasks.load_labels(inputs.labels, list(preset.image_sizes))
    if inputs.init is None:
        processor, vlm = _make_new_vlm(recipe, preset, inputs.labels, labels, seed)
        model = _build_policy_around_vlm(vlm, preset)
    else:
        processor = Processor.load(inputs.init)
        model = _load_policy_or_add_action_expert(recipe, preset, inputs.init)
    if recipe.committed is not None:
        model.config.committed = recipe.committed
    recipe = resolve_normalization(recipe, inputs.init)
    assert recipe.action_reference is not None
    model.config.action_reference = recipe.action_reference

    # Demonstrations with the cameras that the policy sees, and their normalization. The processor
    # has sizes as (width, height), the samples take (height, width).
    image_shapes = {
        view: (height, width) for view, (width, height) in processor.image_sizes.items()
    }
    datasets = [
        dataset._replace(store=dataset.store.select_episodes_with_any_camera(image_shapes))
        for dataset in inputs.episodes
    ]
    _record_image_aspects(datasets, processor)
    frames = _merge_frame_versions(inputs.init, datasets)
    normalizer = _fit_normalizer(recipe, model.config.horizon, datasets)
    normalizer = dataclasses.replace(normalizer, frames=frames)
    samples = TrainingSamples(
        Mixture(datasets, seed), image_shapes, model.config.horizon, recipe.augment
    )

    # Questions.
    questions = None
    if recipe.question_images:
        questions = _make_question_samples(
            recipe, inputs, labels, processor, recipe.question_images, seed
        )
        _set_coordinate_loss(model.vlm.config, recipe)

    def save_data_statistics(folder: Path) -> None:
        """Write the normalizer, and the training distribution summary for the drift monitor."""
        normalizer.save(folder / "normalizer.json")
        TrainingDistribution.from_samples(samples, recipe.batch_size).save(folder / "seen.json")

    task = tasks.VlaTask(model, processor, normalizer, samples, recipe, questions)
    writers: list[Callable[[Path], object]] = [
        model.save_pretrained,
        processor.save,
        save_data_statistics,
    ]
    return _Built(model, task, writers)


def _load_policy_or_add_action_expert(
    recipe: Recipe, preset: Preset, init: Path
) -> Spear1ForActionPrediction:
    """Load the policy in the folder `init`. If it contains a VLM, add a new action expert to it."""
    if weights.read_model_type(init) != Spear1Config.model_type:
        model = _build_policy_around_vlm(weights.load(SpearVLM, init), preset)
        notice(f"{init} is a SPEAR-VLM, so the action expert begins with random weights.")
        return model
    model = weights.load(Spear1ForActionPrediction, init)
    model.config.flow = {**(model.config.flow or {}), **recipe.flow}
    model.flow_config = FlowConfig(**model.config.flow)
    return model


def _build_policy_around_vlm(vlm: SpearVLM, preset: Preset) -> Spear1ForActionPrediction:
    """Build SPEAR-1 with a copy of the VLM's weights and a new action expert."""
    model = Spear1ForActionPrediction(build_spear1_config(preset, vlm.config))
    model.vlm.load_state_dict(vlm.state_dict())
    return model


def _record_image_aspects(datasets: Sequence[WeightedStore], processor: Processor) -> None:
    """Record in the processor which aspects (width / height) the images of each view have.

    An image that has another aspect than the network's images gets black bars. When the policy acts
    later, the processor gives no notice of bars that the images of training had, too.

    The first image of each dataset and view stands for all. It is also prepared, so that the
    processor gives its notices now, which say what images lose when they are fitted to the network.
    """
    processor.training_aspects = {}  # those of an earlier training do not count
    aspects: dict[str, list[float]] = {}
    for dataset in datasets:
        store = dataset.store
        for view in processor.image_sizes:
            encoded = store.image(index=0, step=0, camera=view)
            if encoded:
                image = decode_image(encoded, f"{store.path}: camera {view!r}")
                processor.prepare_image(image, view)
                height, width = image.shape[:2]
                aspect = round(width / height, 4)
                if aspect not in aspects.setdefault(view, []):
                    aspects[view].append(aspect)
    processor.training_aspects = aspects


def _merge_frame_versions(init: Path | None, datasets: Sequence[WeightedStore]) -> dict[str, int]:
    """Merge the versions of frames of the demonstrations with those of the policy in `init`.

    A version says in which base frame and end-effector frame the poses of a dataset or robot are
    written (`spear.data.frames`). A notice names the frames whose merged version is older than the
    current one. Raises `SpearError` if demonstrations and policy have different versions of the
    same frames, or if `init` may have learned another version.

    Returns:
        Name of a dataset or robot → version of its frames.
    """
    sources = [(dataset.name, dataset.store.frame_versions) for dataset in datasets]
    normalizer_file = None if init is None else init / "normalizer.json"
    if init is not None and normalizer_file is not None and normalizer_file.is_file():
        recorded_frames = Normalizer.load(normalizer_file).frames
        init_frames = fill_in_frame_versions_if_simulator_only(
            recorded_frames, is_simulator_only(init)
        )
        if init_frames is None:
            _check_frames_have_version_1(init, sources)
            init_frames = {}
        sources.append((str(init), init_frames))

    frames = merge_frame_versions(sources)
    for name in list_names_with_outdated_frames(frames):
        newest_version = get_newest_frame_version(name)
        notice(
            f"the policy learns version {frames[name]} of the frames of {name}, because its "
            f"episodes were prepared in it; the current version is {newest_version}. "
            "Prepare the episodes again to use it."
        )
    return frames


def _check_frames_have_version_1(
    init: Path, dataset_frames: Sequence[tuple[str, Mapping[str, int]]]
) -> None:
    """Raise `SpearError` if demonstrations have frames that are newer than version 1.

    The policy in `init` records no versions of frames, so it was made when all of them had
    version 1.

    Args:
        init: the policy's folder.
        dataset_frames: name of each dataset, and the versions of its frames.
    """
    for source, frames in dataset_frames:
        for name, version in frames.items():
            if version > 1:
                raise SpearError(
                    f"--init {init} was made before frames had versions, and {source} has version "
                    f"{version} of the frames of {name}. Begin with a VLM or a newer policy; or, "
                    f'if {init} learned nothing of {name}, write "frames": {{}} into its '
                    "normalizer.json."
                )


def _fit_normalizer(recipe: Recipe, horizon: int, datasets: Sequence[WeightedStore]) -> Normalizer:
    """Fit the normalization to the datasets: one for all of them, or one for each.

    The recipe is one of `resolve_normalization`, and `horizon` the number of actions per chunk.
    """
    assert recipe.normalization is not None
    assert recipe.action_reference is not None
    settings: dict[str, Any] = {
        "mode": recipe.normalization,
        "bounds_m": recipe.bounds_m,
        "action_reference": recipe.action_reference,
        "horizon": horizon,
    }
    if recipe.normalize_each:
        return Normalizer.fit_per_dataset(datasets, **settings)
    weighted_stores = [(dataset.store, dataset.weight) for dataset in datasets]
    return Normalizer.fit(weighted_stores, **settings)


def _make_question_samples(
    recipe: Recipe,
    inputs: TrainingInputs,
    labels: LabelsByView,
    processor: Processor,
    num_images: int,
    seed: int,
) -> tasks.QuestionSamples:
    """Return batches of questions about labeled images.

    If the recipe asks about pixels, the batches also need the depth of the images.
    """
    mix = recipe.questions
    depth = None
    if set(mix.families) & set(QUESTION_TYPES_PIXEL):
        depth = tasks.load_depth(inputs.labels, labels)
    return tasks.QuestionSamples(labels, processor, mix, num_images, seed, recipe.augment, depth)


def _list_object_names_in_first_view(labels: LabelsByView) -> list[str]:
    """Return the sorted names of all objects in the first view's images, without repetition.

    Names that only other views contain are missing in the result.
    """
    names: set[str] = set()
    for label in next(iter(labels.values())):
        names.update(item.name for item in label.objects)
    return sorted(names)


def _fit_coordinates(
    recipe: Recipe, labels: LabelsByView, default_bins: int, seed: int
) -> CoordinateTokenizer:
    """Fit 3D tokens to the labels. `default_bins` is their number if the recipe gives none."""
    all_labels: list[LabeledImage] = []
    for labels_of_view in labels.values():
        all_labels.extend(labels_of_view)
    num_bins = recipe.bins or default_bins
    spacing = recipe.spacing or "quantile"
    return tasks.fit_coordinates(all_labels, num_bins, seed, spacing)


def _renew_coordinate_embeddings(
    vlm: SpearVLM, processor: Processor, recipe: Recipe, seed: int
) -> None:
    """Give a VLM new embeddings for the 3D tokens of `processor`.

    The embedding table [vocabulary size, width] has one row per token. It grows if there are more
    3D tokens than before. If there are fewer, the surplus tokens stay in the vocabulary, but no
    answer uses them. New rows are drawn from a normal distribution with the mean and covariance of
    the rows of words (paper). The location tokens' rows are left out of this mean and covariance
    (our choice): nano's rows of location tokens are random draws themselves, and PaliGemma's
    location tokens stand for places instead of words.
    """
    first_id = processor.coordinate_ids.start
    num_bins = processor.coordinates.num_bins
    end_id = first_id + num_bins
    old_rows = vlm.get_parameter(EMBEDDINGS_NAME).detach()
    word_rows = old_rows[: processor.location_start]
    generator = torch.Generator().manual_seed(seed)
    new_rows = sample_new_embeddings(word_rows, num_bins, generator, smooth=recipe.smooth_tokens)
    rows = torch.cat([old_rows[:first_id], new_rows, old_rows[end_id:]])

    # Only the weight is replaced, not the module: Gemma's embedding module scales the rows that it
    # looks up, which a plain `torch.nn.Embedding` would not do.
    embeddings: Any = vlm.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(rows)
    embeddings.num_embeddings = len(rows)
    vlm.config.coordinate_bins = num_bins
    vlm.config.text_config.vocab_size = len(rows)


def _make_new_vlm(
    recipe: Recipe, preset: Preset, folders: Sequence[Path], labels: LabelsByView, seed: int
) -> tuple[Processor, SpearVLM]:
    """Return a processor with a new tokenizer and fitted 3D tokens, and a VLM with random weights.

    The tokenizer is made for the wording of our questions and for the texts in the file
    `wording.txt` of each folder of labels. The embeddings of two location tokens, or of two 3D
    tokens, start similar if the tokens stand for neighboring values.
    """
    texts = list(iterate_tokenizer_texts(_list_object_names_in_first_view(labels)))
    for folder in folders:
        wording = folder / "wording.txt"
        if wording.is_file():
            texts += wording.read_text("utf-8-sig").splitlines()
    coordinates = _fit_coordinates(recipe, labels, preset.bins, seed)
    processor = Processor.build(preset, texts, coordinates)

    config = build_vlm_config(preset, len(processor.tokenizer), processor.coordinate_ids.start)
    config.coordinate_bins = processor.coordinates.num_bins
    _set_coordinate_loss(config, recipe)
    vlm = SpearVLM(config)

    embeddings = vlm.get_parameter(EMBEDDINGS_NAME)
    word_rows = embeddings[: processor.location_start]
    generator = torch.Generator().manual_seed(seed)
    # (first token id, count) of the location tokens, and of the 3D tokens.
    number_tokens = (
        (processor.location_start, NUM_LOCATIONS),
        (config.coordinate_start, config.coordinate_bins),
    )
    with torch.no_grad():
        for first_id, count in number_tokens:
            rows = sample_new_embeddings(word_rows, count, generator, smooth=True)
            embeddings[first_id : first_id + count] = rows
    return processor, vlm


def _set_coordinate_loss(config: SpearVLMConfig, recipe: Recipe) -> None:
    """Copy the weight and the smoothing of the 3D tokens' loss into the model's config."""
    config.coordinate_loss_weight = recipe.questions.coordinate_weight
    config.coordinate_smoothing = recipe.questions.coordinate_smoothing


def _copy_vlm_with_moge(vlm: SpearVLM, preset: Preset, depth_encoder: Path | None) -> SpearVLM:
    """Copy the VLM, with MoGe's encoder and a projection for it, added without changing outputs.

    With MoGe a visual token is the average of two projections, SigLIP's and MoGe's. So that visual
    tokens stay what the language model already knows, SigLIP's projection is doubled and MoGe's
    starts at zero (our choice for nano). `depth_encoder` is the folder of a trained "depth" recipe,
    from which MoGe's weights come.
    """
    moge_config = build_vlm_config(preset).moge_config.to_dict()
    config = SpearVLMConfig.from_dict({**vlm.config.to_dict(), "moge_config": moge_config})
    model = SpearVLM(config)
    model.load_state_dict(vlm.state_dict(), strict=False)  # without MoGe's encoder and projection
    assert depth_encoder is not None
    assert model.moge is not None
    assert model.moge_projector is not None
    trained_encoder = weights.load(MogeForDepth, depth_encoder).moge
    model.moge.load_state_dict(trained_encoder.state_dict())
    with torch.no_grad():
        for parameter in model.multi_modal_projector.parameters():
            parameter.mul_(2)
        for parameter in model.moge_projector.parameters():
            parameter.zero_()
    return model
