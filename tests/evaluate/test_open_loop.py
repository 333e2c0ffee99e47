"""Open-loop errors: none for the demonstrator, known for a known mistake, the mean action as reference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make_episode, write_store
from refusals import Command, refuses
from spear.data.actions import canonicalize_actions, extract_chunk
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.evaluate.open_loop import (
    build_observations,
    mean_action,
    score_last_action,
    score_mean_action,
    score_policy,
)
from spear.report.comparison import make_open_loop_page
from spear.types import Array, Episode


def episode(seed: int, steps: int = 12) -> Episode:
    """Of `data_tiny`, with steps that differ in length; the gripper closes half way."""
    moved = np.random.default_rng(seed).normal(0.01, 0.01, (steps, 3)).cumsum(0)
    return make_episode(seed, steps, position=moved, gripper=(np.arange(steps) < 6).astype(float))


def test_held_out_episodes_that_were_learned_from_are_known(
    tmp_path: Path, run_refused_command: Command
) -> None:
    """Wherever they lie, whatever they are called."""
    write_episodes([episode(i) for i in range(3)], tmp_path / "arm")
    write_lerobot([replace(episode(i), source=f"new#{i}") for i in range(2, 4)], tmp_path / "new")
    words = "evaluate", "data", "nano", str(tmp_path / "new"), "--train", str(tmp_path / "arm")
    assert "1 of the episodes are in both" in run_refused_command(*words)


class Replay:
    """Answers with the demonstrator's own chunks; with an error (m) along x, the gripper is inverted, too."""

    def __init__(self, store: EpisodeStore, error: float = 0.0) -> None:
        self.error = error
        self.chunks: dict[bytes, Array] = {}
        for e in store:
            actions, valid = canonicalize_actions(e)
            for step, seen in enumerate(build_observations(e)):
                self.chunks[seen["observation/state"].tobytes()] = extract_chunk(
                    actions, valid, step
                )[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        out = np.stack([self.chunks[o["observation/state"].tobytes()] for o in observations])
        out[..., 0] += self.error
        if self.error:
            out[..., 7] = 1 - out[..., 7]
        return [{"actions": actions} for actions in out]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[EpisodeStore, EpisodeStore]:
    store = write_store([episode(i) for i in range(8)], tmp_path)
    return store.subset(range(6)), store.subset([6, 7])


@pytest.mark.parametrize("error", [0.0, 0.002])
def test_a_known_mistake_is_measured(
    stores: tuple[EpisodeStore, EpisodeStore], error: float
) -> None:
    summary = score_policy("replay", Replay(stores[1], error), stores[1]).summarize()
    assert summary["translation_mm"].value == pytest.approx(1000 * error, rel=1e-3, abs=1e-6)
    assert summary["chunk_end_mm"].value == pytest.approx(5000 * error, rel=1e-3, abs=1e-6)
    assert summary["rotation_deg"].value == pytest.approx(0, abs=0.05)
    assert (
        summary["gripper_accuracy"].value == (0 if error else 1)
        and summary["translation_mm"].n == 2
    )


def test_the_mean_rotation_is_the_same_for_both_signs() -> None:
    turns = Rotation.from_rotvec([[0, 0, 0.2], [0, 0, 0.5]]).as_quat(scalar_first=True)
    rows = np.concatenate([np.zeros((2, 3)), turns, np.ones((2, 1))], axis=1)
    mean = mean_action(rows)
    np.testing.assert_allclose(
        mean, mean_action(rows * [[1] * 8, [1, 1, 1, -1, -1, -1, -1, 1]]), atol=1e-7
    )
    assert Rotation.from_quat(mean[3:7], scalar_first=True).magnitude() == pytest.approx(0.35)


def test_the_mean_action_is_a_reference(stores: tuple[EpisodeStore, EpisodeStore]) -> None:
    train, held_out = stores
    reference = score_mean_action(train, held_out)
    actions = np.concatenate([canonicalize_actions(e)[0][:-1] for e in train])
    np.testing.assert_allclose(reference.predicted[0][0][:3], actions[:, :3].mean(0), rtol=1e-5)
    summary = reference.summarize()
    assert summary["translation_mm"].value > 5
    assert np.isnan(summary["rotation_deg"].low)  # of two episodes there is no interval
    page = make_open_loop_page(score_policy("replay", Replay(held_out), held_out), reference)
    assert (
        page.count("<svg") == 4 * len(held_out) and f"the first of {len(held_out)} held-out" in page
    )


def test_the_last_action_is_what_was_done_a_step_before(
    stores: tuple[EpisodeStore, EpisodeStore],
) -> None:
    _, held_out = stores
    for horizon in (5, 9):  # of 11 known actions; a policy's chunks are compared with as long ones
        both = score_last_action(held_out, horizon), score_mean_action(held_out, held_out, horizon)
        assert all(len(one.episodes[0]["chunk_end_mm"]) == 12 - horizon for one in both)
    reference = score_last_action(held_out)
    for index, e in enumerate(held_out):
        actions, _ = canonicalize_actions(e)
        np.testing.assert_array_equal(
            reference.predicted[index], [[0, 0, 0, 1, 0, 0, 0, 1], *actions[:-1]]
        )
    # By hand, of the second episode: the errors of its last known step, whose chunk is one action long.
    actions, _ = canonicalize_actions(held_out[1])
    last = reference.episodes[1]
    expected = 1000 * np.linalg.norm(actions[9, :3] - actions[10, :3])
    assert last["translation_mm"][-1] == pytest.approx(expected, rel=1e-4)
    assert 0.5 < last["gripper_accuracy"].mean() < 1


@pytest.mark.parametrize("views", [("external",), ("external", "left")])
def test_a_policy_is_asked_about_its_own_cameras(tmp_path: Path, views: tuple[str, ...]) -> None:
    three = dict.fromkeys(("external", "wrist", "left"), make_episode(0, 6).images["external"])
    store, seen = write_store([make_episode(0, 6, images=three)], tmp_path), set[str]()

    class Asked(Replay):
        image_sizes = dict.fromkeys(views, (32, 32))

        def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            seen.update(
                key for observation in observations for key in observation if key.endswith("image")
            )
            return super().infer_batch(observations)

    score_policy("asked", Asked(store), store)
    assert seen == {"observation/image", *(["observation/left_image"] if "left" in views else [])}


def test_a_policy_with_a_wrist_camera_alone_sees_through_it() -> None:
    e = episode(0)
    e.images["wrist"] = e.images.pop("external")
    assert all("observation/wrist_image" in seen for seen in build_observations(e, ["wrist"]))
    refuses("external", build_observations, e, ["external"])
