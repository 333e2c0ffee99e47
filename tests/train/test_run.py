"""The whole pipeline with tiny models, and runs that are continued, refused or recorded.

The first half trains every stage for two steps (fixture `walked`): labels and demonstrations from
the simulator, a depth encoder, a VLM in three stages, and SPEAR-1. The second half trains a policy
(fixtures `finished_run`, `one_episode` and `learn`). A run is a folder with
checkpoints; its result is the folder `final` in it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tiny import make_episode, write_store
from models_tiny import TINY
from refusals import refuses
from spear import embodiments
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import get_dataset_name
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import open_or_prepare_store
from spear.errors import Notice
from spear.labels.inputs import hash_content
from spear.labels.store import read_labels
from spear.models.presets import PRESETS
from spear.models.stage0 import MogeForDepth
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.folders import locate_checkpoint
from spear.policy import Spear1Policy, load_vlm
from spear.sim_data.label_scenes import label_scenes
from spear.train.loop import RunOptions
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.run import train, weigh_datasets
from spear.util.held_out import FIRST_TRAIN_SEED
from train_tiny import read_losses, run_recipe, save_policy

# A new tokenizer has more tokens than the tiny preset: bytes, words and the location tokens.
TINY_WITH_WORDS = dataclasses.replace(TINY, vocabulary_size=2048)
FEW_STEPS = {"preset": "tiny", "steps": 2, "batch_size": 2, "warmup": 1}
POLICY_CHANGES = {
    **FEW_STEPS,
    "schedule": "constant",
    "question_images": 2,
    "coordinate_weight": 5.0,
    "coordinate_smoothing": 0.5,
}
# Changes of the recipe nano-post for a policy of the tiny preset.
TINY_CHANGES = {"preset": "tiny", "flow_samples": 1, "warmup": 0}
EMBEDDINGS = "language_model.embed_tokens.weight"


@pytest.fixture(autouse=True, scope="module")
def tiny_preset() -> Iterator[None]:
    """Make the preset "tiny" known to recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY_WITH_WORDS)
        yield


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run every stage for two steps.

    Returns `labels` (a folder), `episodes` (a store), and `folders`: recipe -> folder of its
    result. "grown" is the result of nano-vlm-1 after no step, so the VLM with MoGe's encoder and
    new 3D tokens that nano-vlm-1 begins with.
    """
    from spear.sim.record import record_episodes

    root = tmp_path_factory.mktemp("path")
    sizes = dict(PRESETS["nano"].image_sizes)
    labels = root / "labels"
    label_scenes(labels, num_scenes=3, sizes=sizes, first_seed=FIRST_TRAIN_SEED, workers=1)
    episodes = record_episodes([("put_on", FIRST_TRAIN_SEED)], sizes, workers=1)
    store = write_store(episodes, root / "episodes")

    depth = run_recipe("nano-depth", root / "depth", labels, **FEW_STEPS)
    siglip = run_recipe("nano-siglip", root / "siglip", labels, **FEW_STEPS)
    vlm_0 = run_recipe("nano-vlm-0", root / "0", labels, init=siglip, **FEW_STEPS)
    no_step = {**FEW_STEPS, "steps": 0}
    grown = run_recipe("nano-vlm-1", root / "grown", labels, init=vlm_0, moge=depth, **no_step)
    vlm_1 = run_recipe("nano-vlm-1", root / "1", labels, init=vlm_0, moge=depth, **FEW_STEPS)
    vlm_2 = run_recipe("nano-vlm-2", root / "2", labels, init=vlm_1, **FEW_STEPS)
    vla = run_recipe("nano-vla", root / "vla", labels, store, vlm_2, **POLICY_CHANGES)
    folders = {
        "nano-depth": depth,
        "nano-vlm-0": vlm_0,
        "grown": grown,
        "nano-vlm-1": vlm_1,
        "nano-vlm-2": vlm_2,
        "nano-vla": vla,
    }
    return SimpleNamespace(labels=labels, episodes=store, folders=folders)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The folder of a random policy of the preset "tiny"."""
    return save_policy(tmp_path / "tiny")


def load_vlm_parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(weights.load(SpearVLMForConditionalGeneration, folder).named_parameters())


def read_origin(final: Path) -> dict[str, Any]:
    """Return the content of a result's recipe.json, which says how it was trained."""
    return json.loads((final / "recipe.json").read_text())


def test_the_vlm_answers(walked: SimpleNamespace) -> None:
    image = np.full((240, 320, 3), 90, np.uint8)
    vlm = load_vlm(walked.folders["nano-vlm-2"])

    (answer,) = vlm.answer([image], ["Where is the cube?"], "box_vertices")

    assert len(answer.values) == 24  # eight vertices with three coordinates each


def test_the_policy_acts_and_repeats_itself(
    walked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Spear1Policy.load(walked.folders["nano-vla"])
    observation = embodiments.load("generic").example()
    # After two steps the policy is nearly random, and wants to turn farther than a robot may.
    monkeypatch.setattr("spear.embodiments.actions.MAX_ACTION_TURN_RAD", 4)

    actions = policy.infer(observation)["actions"]

    assert actions.shape == (5, 8)  # five actions of eight numbers
    assert np.isfinite(actions).all()
    # The rotations are unit quaternions with w >= 0.
    np.testing.assert_allclose(np.linalg.norm(actions[:, 3:7], axis=-1), 1, atol=1e-5)
    assert (actions[:, 3] >= 0).all()
    policy.reset()
    np.testing.assert_array_equal(policy.infer(observation)["actions"], actions)


def test_the_policy_records_the_loss_of_its_questions(walked: SimpleNamespace) -> None:
    config = Spear1Policy.load(walked.folders["nano-vla"]).model.vlm.config

    assert config.coordinate_loss_weight == 5.0
    assert config.coordinate_smoothing == 0.5


def test_the_result_lists_all_that_was_learned_from(walked: SimpleNamespace) -> None:
    learned = read_origin(walked.folders["nano-vla"])["learned"].split()

    expected = list(walked.episodes.list_episode_fingerprints())
    for view in ("external", "wrist"):
        labels = read_labels(walked.labels / view)
        expected.extend(hash_content(label.image) for label in labels)
    assert sorted(learned) == sorted(expected)


def test_moge_changes_no_visual_token_before_it_has_learned(walked: SimpleNamespace) -> None:
    """Adding MoGe changes no visual token; training nano-vlm-1 for two steps does.

    "nano-vlm-0" is the VLM before MoGe is added.
    """
    generator = torch.Generator().manual_seed(0)
    width, height = TINY.image_sizes["external"]
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=generator).byte()
    tokens = {}
    has_moge = {}
    for name in ("nano-vlm-0", "grown", "nano-vlm-1"):
        vlm = weights.load(SpearVLMForConditionalGeneration, walked.folders[name]).eval()
        has_moge[name] = vlm.moge is not None
        with torch.no_grad():
            tokens[name] = vlm.encode_views(pixels)[0]

    assert has_moge == {"nano-vlm-0": False, "grown": True, "nano-vlm-1": True}
    torch.testing.assert_close(tokens["grown"], tokens["nano-vlm-0"], rtol=1e-5, atol=1e-5)
    assert (tokens["nano-vlm-1"] - tokens["grown"]).abs().max() > 1e-4


def test_stage_one_learns_what_the_paper_says_and_nothing_else(walked: SimpleNamespace) -> None:
    original = load_vlm_parameters(walked.folders["grown"])
    trained = load_vlm_parameters(walked.folders["nano-vlm-1"])
    first_token = load_vlm(walked.folders["nano-vlm-1"]).processor.coordinate_ids.start

    changed = {name for name in original if not torch.equal(original[name], trained[name])}

    projectors = ("multi_modal_projector.", "moge_projector.")
    assert changed == {EMBEDDINGS} | {name for name in original if name.startswith(projectors)}
    assert torch.equal(original[EMBEDDINGS][:first_token], trained[EMBEDDINGS][:first_token])
    assert not torch.equal(original[EMBEDDINGS][first_token:], trained[EMBEDDINGS][first_token:])


def test_stage_one_has_the_encoder_that_learned_depth(walked: SimpleNamespace) -> None:
    vlm = load_vlm_parameters(walked.folders["nano-vlm-1"])

    depth = dict(weights.load(MogeForDepth, walked.folders["nano-depth"]).named_parameters())

    encoder_names = [name for name in vlm if name.startswith("moge.")]
    assert encoder_names
    for name in encoder_names:
        assert torch.equal(depth[name], vlm[name])


def test_a_policy_run_repeats_and_continues_bit_for_bit(
    walked: SimpleNamespace, tmp_path: Path
) -> None:
    uninterrupted = walked.folders["nano-vla"]
    inputs = {
        "labels": walked.labels,
        "store": walked.episodes,
        "init": walked.folders["nano-vlm-2"],
    }

    run_recipe("nano-vla", tmp_path, **inputs, **{**POLICY_CHANGES, "steps": 1})
    continued = run_recipe("nano-vla", tmp_path, **inputs, **POLICY_CHANGES)

    losses = read_losses(continued.parent)
    assert len(losses) == 2
    assert losses == read_losses(uninterrupted.parent)
    expected = dict(Spear1Policy.load(uninterrupted).model.named_parameters())
    actual = dict(Spear1Policy.load(continued).model.named_parameters())
    for name, value in expected.items():
        assert torch.equal(value, actual[name])


ONE_STEP = {**TINY_CHANGES, "steps": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of nano-post: one step, on the first two of three episodes.

    Returns `out` (the run's folder), `three_episodes` and `store` (the two episodes it trained on),
    and `init` (the policy it began with).
    """
    root = tmp_path_factory.mktemp("finished")
    three_episodes = write_store(
        [make_episode(0), make_episode(1), make_episode(2)], root / "store"
    )
    store = three_episodes.subset([0, 1])
    init = save_policy(root / "tiny")
    run_recipe("nano-post", root / "run", store=store, init=init, **ONE_STEP)
    return SimpleNamespace(out=root / "run", three_episodes=three_episodes, store=store, init=init)


@pytest.fixture
def finished_run(finished_once: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the run of `finished_once`, which a test may change; `final` is its result."""
    out = shutil.copytree(finished_once.out, tmp_path / "run")
    return SimpleNamespace(**{**vars(finished_once), "out": out, "final": out / "final"})


def continue_finished(finished_run: SimpleNamespace, **changes: Any) -> Path:
    """Run the same recipe into the finished folder, with other inputs or settings."""
    inputs = {"store": finished_run.store, "init": finished_run.init}
    return run_recipe("nano-post", finished_run.out, **{**inputs, **ONE_STEP, **changes})


def check_refused_and_unchanged(finished_run: SimpleNamespace, words: str, **changes: Any) -> None:
    """Check that continuing with changes is refused with these words, and writes no file."""
    times = {p: p.stat().st_mtime_ns for p in finished_run.out.rglob("*") if p.is_file()}

    refuses(words, continue_finished, finished_run, **changes)

    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_checkpoint_records_what_the_run_is_made_from(finished_run: SimpleNamespace) -> None:
    """The checkpoint also records that there were no labels, so that a run with labels differs."""
    (path,) = finished_run.out.glob("checkpoints/*/state.json")

    run_settings = json.loads(path.read_text())["settings"]["about"]

    assert run_settings["--init"]
    assert run_settings["--labels"] is None
    assert run_settings["--moge"] is None


def test_other_episodes_are_refused(finished_run: SimpleNamespace) -> None:
    other_two = finished_run.three_episodes.subset([1, 2])
    check_refused_and_unchanged(finished_run, "another --episodes", store=other_two)

    first = finished_run.store.subset([0])
    words = "another --episodes .*2 episodes.* not .*1 episodes"
    check_refused_and_unchanged(finished_run, words, store=first)


def test_a_run_continues_with_a_renamed_folder_of_the_same_episodes(
    finished_run: SimpleNamespace, tmp_path: Path
) -> None:
    renamed = shutil.copytree(finished_run.three_episodes.path, tmp_path / "renamed")
    store = EpisodeStore(renamed).subset([0, 1])
    inputs = TrainingInputs(episodes=[WeightedStore("renamed", store, 1.0)], init=finished_run.init)
    recipe = get_recipe("nano-post").with_changes(**ONE_STEP)
    options = RunOptions(workers=0, log_every=1)

    final = train(recipe, finished_run.out, inputs, options, "cpu")

    assert final == finished_run.final


def test_other_instructions_of_the_same_episodes_are_refused(
    finished_run: SimpleNamespace, tmp_path: Path
) -> None:
    episodes = [make_episode(i, instruction="pull it") for i in range(2)]
    store = write_store(episodes, tmp_path / "pull")

    check_refused_and_unchanged(finished_run, "images or instructions of --episodes", store=store)


def test_an_init_with_another_tokenizer_is_refused(
    finished_run: SimpleNamespace, tmp_path: Path
) -> None:
    """The error calls the tokenizer's files, of which coordinates.json is one, the words."""
    other_words = shutil.copytree(finished_run.init, tmp_path / "words")
    coordinates = other_words / "coordinates.json"
    coordinates.write_text(coordinates.read_text() + " ")
    check_refused_and_unchanged(finished_run, "words of --init", init=other_words)


def test_an_init_with_other_weights_is_refused(
    finished_run: SimpleNamespace, tmp_path: Path
) -> None:
    """Hashes of large files cover only their ends, so the run also compares the weights.

    The tensor that differs here lies in the middle of the file.
    """
    other_weights = shutil.copytree(finished_run.init, tmp_path / "weights")
    tensors = load_file(other_weights / "model.safetensors")
    tensors["vlm.multi_modal_projector.linear.weight"] += 1
    save_file(tensors, other_weights / "model.safetensors", {"format": "pt"})
    check_refused_and_unchanged(finished_run, "weights of --init", init=other_weights)


def test_another_init_is_refused(finished_run: SimpleNamespace) -> None:
    check_refused_and_unchanged(finished_run, "another --init", init=finished_run.final)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen": ["vlm"], "steps": 2}, "another frozen"),
        ({"normalization": "minmax"}, "another normalization .quantile, not minmax"),
    ],
)
def test_other_modules_or_normalization_are_refused(
    changes: dict[str, Any], words: str, finished_run: SimpleNamespace
) -> None:
    check_refused_and_unchanged(finished_run, words, **changes)


def test_a_notice_names_the_values_before_and_after_a_change(
    finished_run: SimpleNamespace,
) -> None:
    with pytest.warns(match=r"Up to step 1 it had lr=0.0003 \(now 1e-05\)\."):
        continue_finished(finished_run, lr=1e-5)


def test_the_result_records_settings_that_changed(finished_run: SimpleNamespace) -> None:
    final = continue_finished(finished_run, lr=1e-5)
    # The recipe's own learning rate is 3e-4. Step 1 was done with it.
    assert read_origin(final)["earlier"] == [{"until_step": 1, "lr": 3e-4}]

    final = continue_finished(finished_run, lr=1e-5, steps=2, batch_size=1)
    assert read_origin(final)["earlier"] == [
        {"until_step": 1, "steps": 1, "lr": 3e-4, "batch_size": 2}
    ]


def test_a_result_with_other_weights_replaces_the_one_before(
    finished_run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old result is replaced even if `hash_files` sees no difference.

    It reads only a part of large files; here it is made to return the same hash for all folders.
    """
    original = (finished_run.final / "model.safetensors").read_bytes()
    monkeypatch.setattr("spear.train.run.hash_files", lambda folder: {"model.safetensors": ""})

    final = continue_finished(finished_run, steps=2)

    assert (final / "model.safetensors").read_bytes() != original


def test_a_result_keeps_files_that_users_added(finished_run: SimpleNamespace) -> None:
    (finished_run.final / "README.md").write_text("mine")

    # The result is replaced by another model.
    final = continue_finished(finished_run, steps=2)
    assert (final / "README.md").read_text() == "mine"

    # The result is the same model.
    continue_finished(finished_run, steps=2)
    assert (final / "README.md").read_text() == "mine"


def test_a_result_that_is_older_than_its_checkpoint_is_noted(finished_run: SimpleNamespace) -> None:
    """A run that was continued and then stopped has checkpoints of more steps than its result.

    Here the result has 1 step, and the newest checkpoint has 3.
    """
    (checkpoint,) = finished_run.out.glob("checkpoints/step-*")
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000003"))

    with pytest.warns(Notice, match="the weights of step 1,"):
        assert locate_checkpoint(finished_run.out) == finished_run.final


def test_a_result_without_checkpoints_is_not_continued(finished_run: SimpleNamespace) -> None:
    shutil.rmtree(finished_run.out / "checkpoints")

    refuses("checkpoints", continue_finished, finished_run, steps=2)


@pytest.fixture
def one_episode(tiny: Path, tmp_path: Path) -> TrainingInputs:
    """Inputs with one episode, and the tiny policy to start from."""
    store = write_store([make_episode(0)], tmp_path / "store")
    return TrainingInputs(episodes=[WeightedStore("made", store, 1.0)], init=tiny)


def test_settings_without_effect_are_noted(one_episode: TrainingInputs, tmp_path: Path) -> None:
    recipe = get_recipe("nano-post").with_changes(preset="tiny", steps=1, batch_size=1)
    options = RunOptions(workers=0, sharded=True)

    with (
        pytest.warns(Notice, match="never reached, because warmup takes 50"),
        pytest.warns(match="fsdp"),
    ):
        final = train(recipe, tmp_path / "run", one_episode, options, "cpu")

    assert not read_origin(final)["sharded"]


def test_the_result_lists_its_files_and_episodes(
    one_episode: TrainingInputs, tmp_path: Path
) -> None:
    recipe = get_recipe("nano-post").with_changes(preset="tiny", steps=1, batch_size=1)

    final = train(recipe, tmp_path / "run", one_episode, RunOptions(workers=0), "cpu")

    origin = read_origin(final)
    assert origin["files"].keys() >= {"model.safetensors", "normalizer.json", "tokenizer.json"}
    store = one_episode.episodes[0].store
    assert origin["learned"].split() == store.list_episode_fingerprints()


def test_a_continued_run_keeps_its_pieces_and_says_so(
    one_episode: TrainingInputs, tmp_path: Path
) -> None:
    """The setting `accumulate` is the number of pieces into which a batch is divided.

    The run begins with one piece. When it is continued with a recipe of two pieces, a notice says
    that the number of pieces is still 1.
    """
    recipe = get_recipe("nano-post").with_changes(preset="tiny", steps=1, batch_size=1)
    train(recipe, tmp_path / "run", one_episode, RunOptions(workers=0), "cpu")

    two_pieces = recipe.with_changes(steps=2, batch_size=2, accumulate=2)
    with pytest.warns(Notice, match="accumulate is 1"):
        train(two_pieces, tmp_path / "run", one_episode, RunOptions(workers=0), "cpu")


def test_datasets_whose_folders_have_the_same_name_are_not_mixed_up(tmp_path: Path) -> None:
    """If a folder's name is a version, as in Open X-Embodiment, its parent names the dataset.

    Both datasets are prepared in the same working folder, and each keeps its own episode.
    """
    sources = []
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / name / "1.0.0"
        folder.parent.mkdir()
        write_lerobot([make_episode(number)], folder)
        store = open_or_prepare_store(folder, tmp_path / "work").store
        sources.append(store.source(0))
        assert get_dataset_name(folder) == name

    assert sources == ["made#0", "made#1"]


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, EpisodeStore]:
    """One episode of each of two known datasets, and of "mine", which is not in the list."""
    stores = {}
    for number, name in enumerate(("bridge_dataset", "droid", "mine")):
        stores[name] = write_store(
            [make_episode(number, num_steps=2, source=f"{name}/train#0")], tmp_path / name
        )
    return stores


def get_sampling_weights(
    stores: dict[str, EpisodeStore], names: Sequence[str], requested: Sequence[float] = ()
) -> list[float]:
    """Weigh the named stores, and return their sampling weights."""
    weighed = weigh_datasets(
        [Path(name) for name in names], [stores[name] for name in names], requested
    )
    assert [name for name, _, _ in weighed] == list(names)
    return [weight for _, _, weight in weighed]


def test_known_datasets_have_the_sampling_weights_of_the_list(
    stores: dict[str, EpisodeStore], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = get_sampling_weights(stores, ["bridge_dataset", "droid"])

    assert weights == [18, 35]
    assert REGISTRY["droid"].weight == 35
    printed = capsys.readouterr().err
    assert "bridge_dataset 34.0%, droid 66.0%" in printed  # 18 and 35 of 53
    assert printed.count("\n") == 1


def test_datasets_that_are_not_all_known_have_equal_weights(
    stores: dict[str, EpisodeStore],
) -> None:
    assert get_sampling_weights(stores, ["bridge_dataset", "mine"]) == [1, 1]


def test_given_sampling_weights_are_used(
    stores: dict[str, EpisodeStore], capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_sampling_weights(stores, ["bridge_dataset", "mine"], [1, 3]) == [1, 3]

    assert "mine 75.0%" in capsys.readouterr().err


def test_a_single_dataset_is_no_mixture(
    stores: dict[str, EpisodeStore], capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_sampling_weights(stores, ["mine"]) == [1]

    assert not capsys.readouterr().err


def test_episodes_in_several_datasets_are_noted(stores: dict[str, EpisodeStore]) -> None:
    with pytest.warns(Notice, match="1 of the episodes"):
        assert get_sampling_weights(stores, ["mine", "droid", "mine"]) == [1, 1, 1]


@pytest.fixture
def learn(tiny: Path, tmp_path: Path) -> Any:
    """A function that trains on one of four stores.

    It returns the bytes of the weights and of the normalization statistics. The stores are three
    "good" episodes, two "failed" ones, one that is "blind" because policies do not know its camera,
    and "all" six. Two of the good episodes do not say whether they succeeded.
    """
    good = [make_episode(i, success=success) for i, success in ((0, True), (2, None), (3, None))]
    failed = [make_episode(i, gripper=np.zeros(6, np.float32), success=False) for i in (1, 4)]
    blind = make_episode(5, images={"side": good[0].images["external"]})
    episodes_of_store = {
        "good": good,
        "all": [good[0], failed[0], good[1], good[2], failed[1], blind],
        "failed": failed,
        "blind": [blind],
    }
    stores = {
        name: write_store(episodes, tmp_path / name) for name, episodes in episodes_of_store.items()
    }

    def learn_from(name: str, out: str = "run", steps: int = 2) -> dict[str, bytes]:
        changes = {**TINY_CHANGES, "batch_size": 4, "schedule": "constant", "steps": steps}
        final = run_recipe("nano-post", tmp_path / out, store=stores[name], init=tiny, **changes)
        files = ("model.safetensors", "normalizer.json")
        return {file: (final / file).read_bytes() for file in files}

    return learn_from


def test_failed_and_blind_episodes_are_left_out_and_noted(learn: Any) -> None:
    """Training on all episodes gives the same result as on the good ones alone."""
    expected = learn("good", out="expected")

    with (
        pytest.warns(Notice, match="2 of 6 episodes .* failed"),
        pytest.warns(Notice, match="1 of 4 .* no camera"),
        pytest.warns(Notice, match="no camera wrist, .* side"),
    ):
        assert learn("all") == expected


def test_a_training_needs_episodes_that_did_not_fail_and_have_a_camera(learn: Any) -> None:
    refuses("2 of 2 episodes .* failed", learn, "failed")
    refuses("side", learn, "blind", out="other")


def test_a_run_that_began_with_failed_episodes_goes_on_with_them(
    learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An older version of the package learned from failed episodes, too.
    with monkeypatch.context() as older_version:
        older_version.setattr(EpisodeStore, "drop_failed_episodes", lambda store: store)
        expected = learn("all", out="uninterrupted")
        learn("all", out="continued", steps=1)

    assert expected != learn("good", out="without-failures")
    assert learn("all", out="continued") == expected
