"""What `build` makes of a recipe and its inputs: new 3D tokens, models, notices and refusals.

`make_labeled_image(i)` is a labeled image of a tabletop scene, with coordinates of about a meter.
`write_store` writes episodes to a folder and opens them. The episodes among `TrainingInputs` are
triples of a dataset's name, its store and its sampling weight.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from data_tiny import edit_json, make_episode, write_store
from labels_boxes import make_labeled_image
from refusals import no_warning, refuses
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.embodiments import load
from spear.errors import Notice
from spear.flow import FlowConfig
from spear.labels.store import write_images_with_coarse_depth, write_labels
from spear.models.presets import build_vlm_config, get_preset
from spear.models.processing import Processor
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.policy import Spear1Policy, load_vlm, locate_checkpoint
from spear.tokens import sample_new_embeddings
from spear.train.build import build, check
from spear.train.optimize import set_weight_precision
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.tasks import DepthTask, load_labels
from spear.util.images import decode_image


def make_example_observation() -> dict[str, Any]:
    """An observation that the shipped policy understands."""
    return load("generic").example()


EMBEDDINGS = "language_model.embed_tokens.weight"  # name of the table of token embeddings
VLM_RECIPE = get_recipe("nano-vlm-2").with_changes(batch_size=2)
POLICY_RECIPE = get_recipe("nano-post").with_changes(batch_size=1)

# Numbers of 3D tokens; the shipped SPEAR-VLM has `SHIPPED_BINS`.
FEW_BINS = 256
SHIPPED_BINS = 1024
MANY_BINS = 1500


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    """Twelve labeled images, and the shipped SPEAR-VLM to start from; it has 1,024 3D tokens."""
    folder = tmp_path_factory.mktemp("labels")
    write_labels((make_labeled_image(i) for i in range(12)), folder / "labels-00000.parquet")
    return TrainingInputs(labels=[folder], init=locate_checkpoint("nano-vlm"))


# Fewer and more 3D tokens than the shipped SPEAR-VLM has.
new_tokens = pytest.mark.parametrize(
    ("bins", "spacing"), [(FEW_BINS, None), (MANY_BINS, "uniform")]
)


@new_tokens
def test_new_3d_tokens_have_new_embeddings_and_words_keep_theirs(
    bins: int, spacing: str | None, inputs: TrainingInputs
) -> None:
    original = load_vlm(inputs.init)
    original_rows = original.model.get_parameter(EMBEDDINGS)

    model, _, _ = build(VLM_RECIPE.with_changes(bins=bins, spacing=spacing), inputs)

    assert isinstance(model, SpearVLMForConditionalGeneration)
    rows = model.get_parameter(EMBEDDINGS)
    first_token = model.config.coordinate_start
    assert model.config.coordinate_bins == bins
    # If there are fewer 3D tokens than before, the other ones stay in the vocabulary.
    assert len(rows) == first_token + max(bins, SHIPPED_BINS)
    assert model.config.text_config.vocab_size == len(rows)
    assert torch.equal(rows[:first_token], original_rows[:first_token])
    words = original_rows[: original.processor.location_start]
    expected = sample_new_embeddings(words, bins, torch.Generator().manual_seed(0))
    assert torch.equal(rows[first_token : first_token + bins], expected)
    # No 3D token that has an old embedding keeps it.
    end_token = first_token + FEW_BINS
    is_close = torch.isclose(
        rows[first_token:end_token], original_rows[first_token:end_token]
    )  # [FEW_BINS, width]
    assert not is_close.all(dim=1).any()


@new_tokens
def test_a_vlm_with_new_3d_tokens_learns_and_answers(
    bins: int, spacing: str | None, inputs: TrainingInputs, tmp_path: Path
) -> None:
    model, task, save = build(VLM_RECIPE.with_changes(bins=bins, spacing=spacing), inputs)

    loss, loss_parts = task.loss(task.batch(0), torch.Generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert model.get_parameter(EMBEDDINGS).grad is not None
    assert loss_parts["coordinates"] > 0

    save(tmp_path / "out")
    vlm = load_vlm(tmp_path / "out")
    widths = np.diff(vlm.processor.coordinates.bin_edges)
    assert vlm.processor.coordinates.num_bins == bins
    assert np.allclose(widths, widths[0]) == (spacing == "uniform")
    image = np.zeros((128, 192, 3), np.uint8)
    (answer,) = vlm.answer([image], ["Where is the mug?"], "box_vertices", distributions=True)
    assert len(answer.values) == 24  # eight vertices with three coordinates each
    assert answer.distribution is not None
    assert answer.distribution.probabilities.shape == (24, bins)


@pytest.fixture
def room_labels(inputs: TrainingInputs, tmp_path: Path) -> TrainingInputs:
    """Labels nine times as large as a tabletop.

    Their coordinates exceed the range of the shipped VLM's 3D tokens.
    """
    folder = tmp_path / "rooms"
    write_labels(
        (make_labeled_image(i, scale=9.0) for i in range(4)), folder / "labels-00000.parquet"
    )
    return dataclasses.replace(inputs, labels=[folder])


def test_numbers_outside_of_the_3d_tokens_are_noted(room_labels: TrainingInputs) -> None:
    with pytest.warns(Notice, match="outside of the 3D tokens.*--set bins=1024 to fit"):
        build(VLM_RECIPE, room_labels)


@pytest.mark.parametrize("changes", [{"bins": 1024}, {"families": ["what_at"]}])
def test_numbers_that_the_recipe_can_say_or_does_not_ask_for_are_not_noted(
    changes: dict[str, Any], room_labels: TrainingInputs
) -> None:
    with no_warning():
        build(VLM_RECIPE.with_changes(**changes), room_labels)


def test_numbers_inside_of_the_3d_tokens_are_not_noted(inputs: TrainingInputs) -> None:
    with no_warning():
        build(VLM_RECIPE, inputs)


@pytest.fixture
def relative_shard(tmp_path: Path) -> Path:
    """A file of labels in another unit. Its number, 2, says that its folder lacks two files."""
    shard = tmp_path / "labels-00002.parquet"
    write_labels([dataclasses.replace(make_labeled_image(0), unit="relative")], shard)
    return shard


def test_complete_labels_are_loaded_without_a_notice(
    inputs: TrainingInputs, relative_shard: Path
) -> None:
    with no_warning():
        load_labels(inputs.labels, ["external"])
        load_labels([relative_shard], ["external"])  # given as a file, a shard lacks no others


def test_labels_that_are_given_twice_are_noted(inputs: TrainingInputs) -> None:
    with pytest.warns(Notice, match=r"^12 of 24 .* twice\. Give each folder once"):
        load_labels([*inputs.labels, *inputs.labels], ["external"])


def test_labels_that_lack_shards_are_noted(relative_shard: Path) -> None:
    with pytest.warns(Notice, match="lacks 2 of its shards"):
        load_labels([relative_shard.parent], ["external"])


@pytest.mark.filterwarnings("ignore:.*lacks 2 of its shards")
def test_labels_of_several_units_are_refused(inputs: TrainingInputs, relative_shard: Path) -> None:
    folders = [*inputs.labels, relative_shard.parent]

    refuses("metre, relative", load_labels, folders, ["external"])


def test_an_action_expert_is_as_deep_as_the_vlm_that_the_policy_begins_with(
    tmp_path: Path,
) -> None:
    """A VLM of a preset may have another language model than the preset, as PaliGemma 2 has.

    Here it has two layers and three key-value heads. The action expert reads the keys and values of
    each layer, so it needs the same numbers, but it keeps the preset's width.
    """
    processor = load_vlm("nano").processor
    config = build_vlm_config(
        get_preset("nano"), len(processor.tokenizer), processor.coordinate_ids.start
    )
    fields = {
        **config.text_config.to_dict(),
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
    }
    del fields["model_type"]
    config.text_config = AutoConfig.for_model("gemma2", **fields)
    SpearVLMForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    processor.save(tmp_path / "vlm")
    store = write_store([make_episode(0)], tmp_path / "mine")
    inputs = TrainingInputs(episodes=[WeightedStore("made", store, 1.0)], init=tmp_path / "vlm")

    with pytest.warns(Notice, match="random weights"):
        model, task, _ = build(POLICY_RECIPE, inputs)

    expert = model.get_submodule("expert").config
    assert expert.num_hidden_layers == 2
    assert expert.num_key_value_heads == 3
    assert expert.head_dim == 32
    assert expert.hidden_size == get_preset("nano").expert["hidden_size"]
    loss, _ = task.loss(task.batch(0), torch.Generator())
    assert torch.isfinite(loss)


# The policy or VLM to start from, changes of the recipe, and the mode that results. Nano itself was
# trained with "meanstd".
@pytest.mark.parametrize(
    ("init", "changes", "mode"),
    [
        ("nano", {}, "meanstd"),
        ("nano-vlm", {}, "quantile"),
        ("nano", {"normalization": "minmax"}, "minmax"),
    ],
)
def test_a_policy_keeps_its_normalization_unless_the_recipe_has_another(
    init: str, changes: dict[str, Any], mode: Any, tmp_path: Path
) -> None:
    """With another normalization the policy's actions would have another length.

    Nano's would at first be three times as long.
    """
    store = write_store([make_episode(0, num_steps=9)], tmp_path / "mine")
    inputs = TrainingInputs(
        episodes=[WeightedStore("made", store, 1.0)], init=locate_checkpoint(init)
    )

    # The same notice about images is printed when the policy acts.
    with pytest.warns(Notice, match="'external' .* black bars"):
        _, task, _ = build(POLICY_RECIPE.with_changes(**changes), inputs)

    expected = Normalizer.fit([(store, 1.0)], mode)
    # Neither the made episode nor nano has frames of a known robot.
    assert task.normalizer == dataclasses.replace(expected, frames={})


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_the_aspects_of_the_training_images_are_recorded(tmp_path: Path) -> None:
    """A policy that acts says nothing of black bars that its training images had, too."""
    store = write_store([make_episode(0, num_steps=9)], tmp_path / "mine")
    inputs = TrainingInputs(
        episodes=[WeightedStore("made", store, 1.0)], init=locate_checkpoint("nano")
    )

    _, _, save = build(POLICY_RECIPE, inputs)
    save(tmp_path / "trained")

    image = store[0].images["external"][0]
    height, width = decode_image(image, "the first image").shape[:2]
    trained = Processor.load(tmp_path / "trained")
    assert trained.training_aspects["external"] == [pytest.approx(width / height, abs=1e-4)]


def make_store_with_frames(folder: Path, frames: dict[str, int] | None) -> EpisodeStore:
    """A prepared store whose request.json records these frames, or none as earlier ones."""
    write_store([make_episode(0, num_steps=9)], folder)
    request: dict[str, Any] = {"shards": 1, "path": "/data/droid/1.0.0"}
    if frames is not None:
        request["frames"] = frames
    (folder / "request.json").write_text(json.dumps(request))
    return EpisodeStore(folder)


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_a_policy_records_the_frames_of_its_episodes(tmp_path: Path) -> None:
    store = make_store_with_frames(tmp_path / "new", {"droid": 2})
    inputs = TrainingInputs(
        episodes=[WeightedStore("new", store, 1.0)], init=locate_checkpoint("nano")
    )

    _, task, _ = build(POLICY_RECIPE, inputs)

    assert task.normalizer.frames == {"droid": 2}


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_episodes_of_earlier_frames_are_learned_with_a_notice(tmp_path: Path) -> None:
    store = make_store_with_frames(tmp_path / "old", None)
    inputs = TrainingInputs(
        episodes=[WeightedStore("old", store, 1.0)], init=locate_checkpoint("nano")
    )

    with pytest.warns(Notice, match="learns version 1 of the frames of droid"):
        _, task, _ = build(POLICY_RECIPE, inputs)

    assert task.normalizer.frames == {"droid": 1}


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_episodes_of_two_versions_of_frames_are_not_mixed(tmp_path: Path) -> None:
    old = make_store_with_frames(tmp_path / "old", {"droid": 1})
    new = make_store_with_frames(tmp_path / "new", {"droid": 2})
    episodes = [WeightedStore("old", old, 1.0), WeightedStore("new", new, 1.0)]
    inputs = TrainingInputs(episodes=episodes, init=locate_checkpoint("nano"))

    message = "old has version 1 of the frames of droid, but new has version 2"
    refuses(message, build, POLICY_RECIPE, inputs)


def copy_nano_with_frames(folder: Path, frames: dict[str, int] | None) -> Path:
    """The shipped policy as if it had been trained on robots, with these frames recorded."""
    shutil.copytree(locate_checkpoint("nano"), folder)
    edit_json(folder / "recipe.json", lambda fields: fields.update(simulator_only=False, files={}))
    if frames is not None:
        edit_json(folder / "normalizer.json", lambda fields: fields.update(frames=frames))
    return folder


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_a_policy_of_earlier_frames_does_not_go_on_with_new_ones(tmp_path: Path) -> None:
    init = copy_nano_with_frames(tmp_path / "init", {"droid": 1})
    store = make_store_with_frames(tmp_path / "new", {"droid": 2})

    inputs = TrainingInputs(episodes=[WeightedStore("new", store, 1.0)], init=init)
    refuses("new has version 2 of the frames of droid, but .*init", build, POLICY_RECIPE, inputs)


@pytest.mark.filterwarnings("ignore:.*black bars")
def test_a_policy_without_recorded_frames_does_not_go_on_with_changed_ones(
    tmp_path: Path,
) -> None:
    init = copy_nano_with_frames(tmp_path / "init", None)
    store = make_store_with_frames(tmp_path / "new", {"fractal20220817_data": 2})

    inputs = TrainingInputs(episodes=[WeightedStore("new", store, 1.0)], init=init)
    refuses('made before frames had versions.*"frames": {}', build, POLICY_RECIPE, inputs)


def test_settings_that_a_mapping_drops_are_noted() -> None:
    """A mapping replaces the recipe's whole mapping, which has these two other settings."""
    with pytest.warns(Notice, match="rotation_loss, rotation_weight"):
        recipe = get_recipe("nano-vla", flow={"steps": 5})

    assert recipe.flow == {"steps": 5}


def test_a_mapping_that_drops_nothing_or_everything_is_not_noted() -> None:
    drops_nothing = {"rotation_loss": "mse", "rotation_weight": 1.0}
    drops_everything: dict[str, float] = {}

    with no_warning():
        get_recipe("nano-vla", flow=drops_nothing, lr_scale=drops_everything)


def test_the_vision_encoder_learns_from_wrist_images_alone(tmp_path: Path) -> None:
    write_labels((make_labeled_image(i) for i in range(3)), tmp_path / "wrist/labels-00000.parquet")
    recipe = get_recipe("nano-siglip").with_changes(batch_size=1)

    _, task, _ = build(recipe, TrainingInputs([tmp_path]))

    # Each batch draws its view at random, so a single batch could miss an error.
    for step in range(8):
        assert len(task.batch(step)["pixels"]) == 1


def test_stage_0_may_begin_with_an_earlier_image_encoder(inputs: TrainingInputs) -> None:
    recipe = get_recipe("nano-siglip").with_changes(batch_size=2, moge=True)

    model: Any
    model, _, _ = build(recipe, inputs)

    shipped = load_vlm("nano-vlm").model.vision_tower.state_dict()
    for name, weight in model.vlm.vision_tower.state_dict().items():
        assert torch.equal(weight, shipped[name])


def test_stage_0_may_begin_with_an_earlier_depth_encoder(tmp_path: Path) -> None:
    depth_folder = tmp_path / "depth/external"
    depth_folder.mkdir(parents=True)
    images = [(make_labeled_image(0).image, np.ones((4, 4), np.float16))]
    write_images_with_coarse_depth(images, depth_folder / "depth-00000.parquet")
    recipe = get_recipe("nano-depth").with_changes(batch_size=2)

    model: Any
    inputs = TrainingInputs(labels=[tmp_path], init=locate_checkpoint("nano-depth"))
    model, _, _ = build(recipe, inputs)

    shipped = load_file(locate_checkpoint("nano-depth") / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, shipped[name].float())


def test_a_policy_is_no_depth_encoder_to_begin_with() -> None:
    inputs = TrainingInputs(labels=[Path("labels")], init=locate_checkpoint("nano"))

    refuses("spear1", check, get_recipe("nano-depth"), inputs)


def test_the_depth_encoder_learns_from_wrist_images_alone() -> None:
    images = [(make_labeled_image(0).image, np.ones((4, 4)))]
    task = DepthTask(torch.nn.Identity(), {"wrist": images}, batch_size=1, seed=0)

    # Each batch draws its view at random, so a single batch could miss an error.
    for step in range(8):
        assert len(task.batch(step)["pixels"]) == 1


@pytest.fixture
def policy_inputs(tmp_path: Path) -> TrainingInputs:
    """One episode, and the shipped policy."""
    store = write_store([make_episode(0)], tmp_path / "mine")
    return TrainingInputs(
        episodes=[WeightedStore("made", store, 1.0)], init=locate_checkpoint("nano")
    )


@pytest.mark.slow
def test_a_policy_keeps_its_longest_delay_until_a_recipe_has_another(
    policy_inputs: TrainingInputs, tmp_path: Path
) -> None:
    """Each recipe starts from the result of the one before. `committed` None is no change."""
    inputs = policy_inputs
    for committed, expected in ((None, 0), (3, 3), (None, 3), (0, 0)):
        model, _, save = build(POLICY_RECIPE.with_changes(committed=committed), inputs)
        assert model.config.committed == expected
        save(tmp_path / "out")
        inputs = dataclasses.replace(inputs, init=tmp_path / "out")


@pytest.mark.slow
def test_a_policy_keeps_its_action_reference_until_a_recipe_has_another(
    policy_inputs: TrainingInputs, tmp_path: Path
) -> None:
    """Each recipe starts from the result of the one before. `reference` None is no change."""
    inputs = policy_inputs
    for reference, expected in (
        (None, "previous"),
        ("observed", "observed"),
        (None, "observed"),
        ("previous", "previous"),
    ):
        recipe = POLICY_RECIPE.with_changes(action_reference=reference)
        model, _, save = build(recipe, inputs)
        save(tmp_path / "out")
        inputs = dataclasses.replace(inputs, init=tmp_path / "out")

        assert model.config.action_reference == expected
        assert Normalizer.load(tmp_path / "out/normalizer.json").action_reference == expected


def test_the_loss_is_of_the_motions_that_the_recipe_says(policy_inputs: TrainingInputs) -> None:
    _, task, _ = build(POLICY_RECIPE.with_changes(action_reference="observed"), policy_inputs)
    _, task_of_steps, _ = build(POLICY_RECIPE, policy_inputs)

    motions = task.batch(0)["actions"]
    steps = task_of_steps.batch(0)["actions"]

    assert motions.shape == steps.shape
    assert not torch.allclose(motions[:, 1:, :3], steps[:, 1:, :3])


def test_a_policy_of_motions_from_the_observed_pose_answers_with_steps(
    policy_inputs: TrainingInputs, tmp_path: Path
) -> None:
    """Unnormalizing the network's chunk and summing the answered steps give the same motions."""
    recipe = POLICY_RECIPE.with_changes(action_reference="observed")
    _, _, save = build(recipe, policy_inputs)
    save(tmp_path / "out")
    policy = Spear1Policy.load(tmp_path / "out")
    observation = {**make_example_observation(), "seed": 0}

    network_chunk = policy.predict(policy.prepare_inputs([observation])).translation[0]
    answered = policy.infer(observation)["actions"]

    scale = torch.tensor(policy.normalizer.chunk_scale)
    offset = torch.tensor(policy.normalizer.chunk_offset)
    motions_m = network_chunk * scale + offset
    np.testing.assert_allclose(answered[:, :3].cumsum(axis=0), motions_m, atol=1e-5)


def test_weights_and_normalization_of_different_trainings_are_refused(
    policy_inputs: TrainingInputs, tmp_path: Path
) -> None:
    recipe = POLICY_RECIPE.with_changes(action_reference="observed")
    _, _, save = build(recipe, policy_inputs)
    save(tmp_path / "out")
    shutil.copy(locate_checkpoint("nano") / "normalizer.json", tmp_path / "out")

    refuses("normalizer.json", Spear1Policy.load, tmp_path / "out")


def test_flow_settings_of_a_recipe_are_added_to_the_policys(policy_inputs: TrainingInputs) -> None:
    original, _, _ = build(POLICY_RECIPE, policy_inputs)

    model: Any
    recipe = POLICY_RECIPE.with_changes(flow={"rotation_weight": 7.0})
    model, _, _ = build(recipe, policy_inputs)

    assert model.flow_config == dataclasses.replace(original.flow_config, rotation_weight=7.0)  # type: ignore
    assert model.flow_config == FlowConfig(**model.config.flow)


def test_gemmas_embedding_scale_is_exact_after_a_checkpoint_in_bfloat16(
    policy_inputs: TrainingInputs,
) -> None:
    model: Any
    model, _, _ = build(POLICY_RECIPE, policy_inputs)
    model.to(torch.bfloat16)

    set_weight_precision(model, POLICY_RECIPE.optimization)

    # Gemma scales embeddings by the root of their width, which is 192 in nano.
    scale = float(model.vlm.language_model.embed_tokens.embed_scale)
    assert scale == pytest.approx(192**0.5, rel=1e-6)
