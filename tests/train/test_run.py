"""The whole path at nano: scenes → labels → depth → VLM stages → demonstrations → SPEAR-1 → actions."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tiny import make, stored
from models_tiny import TINY
from refusals import refuses
from spear import embodiments
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import get_dataset_name
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import open_store
from spear.errors import Notice
from spear.labels.inputs import hash_content
from spear.labels.store import read_labels
from spear.models.presets import PRESETS
from spear.models.stage0 import MogeForDepth
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.folders import locate
from spear.policy import Spear1Policy, load_vlm
from spear.sim_data.label_scenes import label_scenes
from spear.train.loop import RunOptions
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.run import mixture, train
from train_tiny import rows, run_recipe, save_policy

pytestmark = pytest.mark.xdist_group("walk")  # what the tests share is made once
FEW = {"steps": 2, "batch_size": 2, "warmup": 1}
ACT = {**FEW, "question_images": 2, "coordinate_weight": 5.0, "coordinate_smoothing": 0.5}
ACT |= {"schedule": "constant"}
EMBEDDINGS = "language_model.embed_tokens.weight"
SHORT = {"preset": "tiny", "flow_samples": 1, "warmup": 0}
"""Of the recipe nano-post, for the policy `tiny`."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Every stage run once, for two steps; "grown" is SPEAR-VLM before its first step."""
    from spear.sim.record import record_episodes

    root, sizes = tmp_path_factory.mktemp("path"), dict(PRESETS["nano"].image_sizes)
    labels = root / "labels"
    label_scenes(labels, 3, sizes, first_seed=10_000, workers=1)
    recorded = record_episodes([("put_on", 10_000)], sizes["external"], sizes["wrist"], workers=1)
    store = stored(recorded, root / "episodes")
    made = {
        name: run_recipe(name, root / name, labels, **FEW) for name in ("nano-depth", "nano-siglip")
    }
    zero = made["nano-vlm-0"] = run_recipe(
        "nano-vlm-0", root / "0", labels, init=made["nano-siglip"], **FEW
    )
    join: dict[str, Any] = {"init": zero, "moge": made["nano-depth"]}
    made["grown"] = run_recipe("nano-vlm-1", root / "grown", labels, **join, steps=0, batch_size=2)
    made["nano-vlm-1"] = run_recipe("nano-vlm-1", root / "1", labels, **join, **FEW)
    made["nano-vlm-2"] = run_recipe(
        "nano-vlm-2", root / "2", labels, init=made["nano-vlm-1"], **FEW
    )
    made["nano-vla"] = run_recipe(
        "nano-vla", root / "vla", labels, store, made["nano-vlm-2"], **ACT
    )
    return SimpleNamespace(labels=labels, episodes=store, folders=made)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy whose preset recipes know."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return save_policy(tmp_path / "tiny")


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(weights.load(SpearVLMForConditionalGeneration, folder).named_parameters())


def test_the_result_answers_and_acts(walked: SimpleNamespace) -> None:
    image = np.full((240, 320, 3), 90, np.uint8)
    answers = load_vlm(walked.folders["nano-vlm-2"]).answer(
        [image], ["Where is the cube?"], "box_vertices"
    )
    assert len(answers[0].values) == 24
    policy = Spear1Policy.load(walked.folders["nano-vla"])
    observation = embodiments.load("generic").example()
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (5, 8) and np.isfinite(actions).all()
    np.testing.assert_allclose(np.linalg.norm(actions[:, 3:7], axis=-1), 1, atol=1e-5)
    assert (actions[:, 3] >= 0).all()
    policy.reset()
    np.testing.assert_array_equal(policy.infer(observation)["actions"], actions)
    config = policy.model.vlm.config  # also where questions are asked beside the actions
    assert (config.coordinate_loss_weight, config.coordinate_smoothing) == (5.0, 0.5)
    learned = json.loads((walked.folders["nano-vla"] / "recipe.json").read_text())[
        "learned"
    ].split()
    asked = [
        hash_content(one.image)
        for view in ("external", "wrist")
        for one in read_labels(walked.labels / view)
    ]
    assert sorted(learned) == sorted(asked + walked.episodes.episode_fingerprints())


def test_moge_changes_no_visual_token_before_it_has_learned(walked: SimpleNamespace) -> None:
    """The average of both projections is at first what the language model knows; after a step no longer."""
    pixels = torch.randint(
        0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(0)
    ).byte()
    tokens = []
    for name in ("nano-vlm-0", "grown", "nano-vlm-1"):
        vlm = weights.load(SpearVLMForConditionalGeneration, walked.folders[name]).eval()
        assert (vlm.moge is None) == (name == "nano-vlm-0")
        with torch.no_grad():
            tokens.append(vlm.encode_views(pixels)[0])
    before, start, after = tokens
    torch.testing.assert_close(start, before, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-4


def test_stage_one_learns_what_the_paper_says_and_nothing_else(walked: SimpleNamespace) -> None:
    before, after = parameters(walked.folders["grown"]), parameters(walked.folders["nano-vlm-1"])
    first = load_vlm(walked.folders["nano-vlm-1"]).processor.coordinate_ids.start
    changed = {n for n in before if n != EMBEDDINGS and not torch.equal(before[n], after[n])}
    assert changed == {
        n for n in before if n.startswith(("multi_modal_projector.", "moge_projector."))
    }
    assert torch.equal(before[EMBEDDINGS][:first], after[EMBEDDINGS][:first])
    assert not torch.equal(before[EMBEDDINGS][first:], after[EMBEDDINGS][first:])
    encoder = {n for n in after if n.startswith("moge.")}
    trained = dict(weights.load(MogeForDepth, walked.folders["nano-depth"]).named_parameters())
    assert encoder and all(torch.equal(trained[n], after[n]) for n in encoder)


def test_a_policy_run_repeats_and_continues_bit_for_bit(
    walked: SimpleNamespace, tmp_path: Path
) -> None:
    given = (tmp_path, walked.labels, walked.episodes, walked.folders["nano-vlm-2"])
    whole = walked.folders["nano-vla"]
    parts = [run_recipe("nano-vla", *given, **{**ACT, "steps": steps}) for steps in (1, 2)][-1]
    logs = [[row["loss"] for row in rows(folder.parent)] for folder in (whole, parts)]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    first, second = (
        dict(Spear1Policy.load(folder).model.named_parameters()) for folder in (whole, parts)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_finished_folder_is_not_given_to_others(
    tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Other episodes, weights or settings in the same --out are refused, and nothing changes."""
    whole, out = stored([make(0), make(1), make(2)], tmp_path / "store"), tmp_path / "run"
    store = whole.subset([0, 1])
    few = {**SHORT, "steps": 1, "batch_size": 2}
    final = run_recipe("nano-post", out, store=store, init=tiny, **few)
    (state,) = out.glob("checkpoints/*/state.json")
    about = json.loads(state.read_text())["settings"]["about"]
    assert (
        about["--init"] and about["--labels"] is about["--moge"] is None
    )  # none is told from some, too
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    pull = stored([make(i, instruction="pull it") for i in range(2)], tmp_path / "pull")
    other_words = shutil.copytree(tiny, tmp_path / "words")
    (other_words / "coordinates.json").write_text((tiny / "coordinates.json").read_text() + " ")
    other_weights = shutil.copytree(tiny, tmp_path / "weights")
    made = load_file(other_weights / "model.safetensors")
    made["vlm.multi_modal_projector.linear.weight"] += (
        1  # as stage 1 does, and ends as the file did
    )
    save_file(made, other_weights / "model.safetensors", {"format": "pt"})
    for given, words in (
        ({"store": pull}, "images or instructions of --episodes"),
        ({"init": other_words}, "words of --init"),
        ({"init": other_weights}, "weights of --init"),
        ({"store": whole.subset([1, 2])}, "another --episodes"),  # as many, but others
        ({"store": store.subset([0])}, "another --episodes .*2 episodes.* not .*1 episodes"),
        ({"init": final}, "another --init"),
        ({"frozen": ["vlm"], "steps": 2}, "another frozen"),
        ({"normalization": "minmax"}, "another normalization .quantile, not minmax"),
    ):
        refuses(
            words, run_recipe, "nano-post", out, **{"store": store, "init": tiny, **few, **given}
        )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    finished = run_recipe("nano-post", out, store=store, init=tiny, **{**few, "lr": 1e-5})
    assert json.loads((finished / "recipe.json").read_text())["earlier"] == [
        {"until_step": 1, "lr": 3e-4}
    ]
    other = {**few, "steps": 2, "lr": 1e-5, "batch_size": 1}
    (final / "README.md").write_text("mine")
    was = (final / "model.safetensors").read_bytes()
    with (
        monkeypatch.context() as patch
    ):  # what `hash_files` reads of large files may be what does not learn
        patch.setattr("spear.train.run.hash_files", lambda folder: {"model.safetensors": ""})
        changed = run_recipe("nano-post", out, store=store, init=tiny, **other)
    assert (changed / "model.safetensors").read_bytes() != was
    earlier = json.loads((changed / "recipe.json").read_text())["earlier"]
    assert earlier == [{"until_step": 1, "steps": 1, "lr": 3e-4, "batch_size": 2}]
    run_recipe("nano-post", out, store=store, init=tiny, **other)
    assert (changed / "README.md").read_text() == "mine"
    shutil.copytree(
        state.parent, state.parent.with_name("step-00000003")
    )  # as stopped after more steps
    with pytest.warns(Notice, match="step 2"):
        assert locate(out) == changed
    shutil.rmtree(out / "checkpoints")
    refuses("checkpoints", run_recipe, "nano-post", out, store=store, init=tiny, **other)


def test_what_a_run_cannot_have_is_said(tiny: Path, tmp_path: Path) -> None:
    inputs = TrainingInputs((), [("made", stored([make(0)], tmp_path / "store"), 1.0)], tiny)
    stage = get_recipe("nano-post").with_changes(preset="tiny", steps=1, batch_size=1)
    with (
        pytest.warns(Notice, match="lr is not reached: warmup takes 50"),
        pytest.warns(match="fsdp"),
    ):
        final = train(stage, tmp_path / "run", inputs, RunOptions(workers=0, sharded=True), "cpu")
    said = json.loads((final / "recipe.json").read_text())
    assert said["files"].keys() >= {"model.safetensors", "normalizer.json", "tokenizer.json"}
    assert (
        not said["sharded"]
        and said["learned"].split() == inputs.episodes[0][1].episode_fingerprints()
    )
    more = stage.with_changes(steps=2, batch_size=2, accumulate=2)
    with pytest.warns(Notice, match="accumulate is 1"):
        train(more, tmp_path / "run", inputs, RunOptions(workers=0), "cpu")


def test_datasets_whose_folders_have_the_same_name_are_not_mixed_up(tmp_path: Path) -> None:
    """As of Open X-Embodiment, where the folder is a version."""
    stores = []
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / name / "1.0.0"
        folder.parent.mkdir()
        write_lerobot([make(number)], folder)
        stores.append(open_store(folder, tmp_path / "work")[0])
        assert get_dataset_name(folder) == name
    assert [s.source(0) for s in stores] == ["made#0", "made#1"]


def test_shares_are_those_of_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = {}
    for number, name in enumerate(("bridge_dataset", "droid", "mine")):
        stores[name] = stored([make(number, 2, source=f"{name}/train#0")], tmp_path / name)

    def shares(names: tuple[str, ...], given: tuple[float, ...] = ()) -> list[float]:
        made = mixture([tmp_path / name for name in names], [stores[name] for name in names], given)
        assert [name for name, _, _ in made] == list(names)
        return [share for _, _, share in made]

    assert shares(("bridge_dataset", "droid")) == [18, 35] and REGISTRY["droid"].weight == 35
    said = capsys.readouterr().err
    assert "bridge_dataset 34.0%, droid 66.0%" in said and said.count("\n") == 1
    assert shares(("bridge_dataset", "mine")) == [1, 1]
    assert (
        shares(("bridge_dataset", "mine"), (1, 3)) == [1, 3]
        and "mine 75.0%" in capsys.readouterr().err
    )
    assert shares(("mine",)) == [1] and not capsys.readouterr().err
    with pytest.warns(Notice, match="1 of the episodes"):
        assert shares(("mine", "droid", "mine")) == [1, 1, 1]


def test_failed_and_unseen_episodes_are_not_learned(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and statistics as without them, and a line says so. Where nothing is known of an
    episode's end it stays; a run that began with failures goes on with them."""
    good = [make(i, success=success) for i, success in ((0, True), (2, None), (3, None))]
    bad = [make(i, gripper=np.zeros(6, np.float32), success=False) for i in (1, 4)]
    blind = [make(5, images={"side": good[0].images["external"]})]
    some = {
        "good": good,
        "every": [good[0], bad[0], *good[1:], bad[1], *blind],
        "bad": bad,
        "blind": blind,
    }
    stores = {name: stored(episodes, tmp_path / name) for name, episodes in some.items()}

    def learned(out: str, store: str, steps: int = 2) -> dict[str, bytes]:
        few = {**SHORT, "batch_size": 4, "schedule": "constant", "steps": steps}
        final = run_recipe("nano-post", tmp_path / out, store=stores[store], init=tiny, **few)
        return {
            name: (final / name).read_bytes() for name in ("model.safetensors", "normalizer.json")
        }

    expected = learned("1", "good")
    blind, side = (
        pytest.warns(Notice, match=m) for m in ("1 of 4 .* no camera", "no camera wrist, .* side")
    )
    with pytest.warns(Notice, match="2 of 6 episodes failed"), blind, side:
        assert learned("2", "every") == expected
    refuses("2 of 2 episodes failed", learned, "3", "bad")
    refuses("side", learned, "4", "blind")
    with monkeypatch.context() as earlier:  # versions that learned from them
        earlier.setattr(EpisodeStore, "select_demonstrations", lambda store: store)
        with_failures = learned("5", "every")
        assert with_failures != expected
        learned("6", "every", steps=1)
    assert learned("6", "every") == with_failures
