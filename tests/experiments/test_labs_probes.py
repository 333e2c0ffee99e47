"""The probes of the experiment with laboratories: what they read, and that they read it."""

import numpy as np
import pytest
import torch

from experiments.labs import probes
from spear.policy import Spear1Policy, load_vlm
from spear.types import Array

NUM_SCENES = 300
SPLIT = probes.Split(slice(0, 200), slice(200, 250), slice(250, NUM_SCENES))


def measure_probe_errors_m(features: Array, positions: Array, split: probes.Split) -> Array:
    """The errors of a probe that reads these features."""
    similarities = probes.compute_similarities(features, split)
    return probes.measure_probe_errors_m(similarities, positions, split)


@pytest.fixture
def features() -> Array:
    """More features than scenes, as keys and values are."""
    return np.random.default_rng(0).normal(size=(NUM_SCENES, 1000)).astype(np.float32)


class TestProbe:
    def test_it_finds_a_position_that_a_few_features_contain(self, features: Array) -> None:
        rng = np.random.default_rng(1)
        positions = rng.normal(size=(NUM_SCENES, 3))
        features[:, :300] += 2 * positions @ rng.normal(size=(3, 300))

        errors = measure_probe_errors_m(features, positions, SPLIT)

        constant_errors = probes.measure_constant_errors_m(positions, SPLIT)
        assert np.median(errors) < 0.2 * np.median(constant_errors)

    def test_it_finds_nothing_in_noise(self, features: Array) -> None:
        positions = np.random.default_rng(1).normal(size=(NUM_SCENES, 3))

        errors = measure_probe_errors_m(features, positions, SPLIT)

        constant_errors = probes.measure_constant_errors_m(positions, SPLIT)
        assert np.median(errors) > 0.9 * np.median(constant_errors)

    def test_the_positions_of_test_scenes_have_no_part_in_the_fit(self, features: Array) -> None:
        positions = features[:, :3].astype(np.float64)
        shift_m = np.array([1000.0, 0.0, 0.0])
        shifted = positions.copy()
        shifted[SPLIT.test] += shift_m

        errors = measure_probe_errors_m(features, positions, SPLIT)
        shifted_errors = measure_probe_errors_m(features, shifted, SPLIT)

        # The prediction stays where it was, so the error changes by about the shift.
        assert (np.abs(shifted_errors - 1000.0) <= errors + 1e-6).all()

    def test_the_error_of_a_test_scene_does_not_depend_on_the_others(self, features: Array) -> None:
        positions = features[:, :3].astype(np.float64)
        with_fewer = probes.Split(SPLIT.fitting, SPLIT.validation, slice(250, 260))

        errors = measure_probe_errors_m(features, positions, SPLIT)
        errors_of_fewer = measure_probe_errors_m(features, positions, with_fewer)

        np.testing.assert_allclose(errors_of_fewer, errors[:10], rtol=1e-4)

    def test_a_feature_that_never_changes_is_ignored(self, features: Array) -> None:
        positions = np.random.default_rng(1).normal(size=(NUM_SCENES, 3))
        with_constant = np.concatenate([features, np.full((NUM_SCENES, 5), 7.0)], axis=1)

        errors = measure_probe_errors_m(features, positions, SPLIT)
        same_errors = measure_probe_errors_m(with_constant.astype(np.float32), positions, SPLIT)

        np.testing.assert_allclose(same_errors, errors, rtol=1e-4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_no_word_of_an_instruction(padding_side: str) -> None:
    words = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    padding = torch.full((2, 2), 99.0)
    is_left = padding_side == "left"
    parts = [padding, words] if is_left else [words, padding]
    is_word = torch.tensor([[False, False, True, True] if is_left else [True, True, False, False]])

    pooled = probes.pool_words(torch.cat(parts)[None], is_word)

    assert pooled.tolist() == [[2.0, 15.0, 3.0, 20.0]]


@pytest.fixture(scope="module")
def scenes() -> probes.Scenes:
    return probes.render_scenes(range(1000, 1003), load_vlm("nano").processor.image_sizes)


class TestScenes:
    def test_both_frames_have_the_object_at_the_same_distance_from_the_camera(
        self, scenes: probes.Scenes
    ) -> None:
        in_camera, in_base, camera = (scenes.positions[target] for target in probes.TARGETS)

        np.testing.assert_allclose(
            np.linalg.norm(in_camera, axis=1), np.linalg.norm(in_base - camera, axis=1), atol=1e-9
        )
        assert (in_camera[:, 2] > 0).all()  # in front of the camera

    def test_each_scene_has_a_camera_of_its_own(self, scenes: probes.Scenes) -> None:
        cameras = scenes.positions["camera, base frame"]

        assert len(np.unique(cameras, axis=0)) == len(cameras)


def test_image_features_are_the_keys_and_values_that_the_action_expert_reads(
    scenes: probes.Scenes,
) -> None:
    policy = Spear1Policy.load("nano")
    one_scene = probes.Scenes(scenes.observations[:1], {})

    features = probes.read_keys_and_values(load_vlm("nano"), one_scene)

    inputs = policy.prepare_inputs(one_scene.observations)
    with torch.no_grad():
        prefix = policy.model.encode_prefix(
            inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
        )
    num_image_tokens = prefix.valid.shape[1] - inputs["input_ids"].shape[1]
    expected = []
    for layer in (*prefix.cache.keys, *prefix.cache.values):
        expected.append(layer[:, :, :num_image_tokens].numpy().ravel())
    # Their order is of no importance to a probe.
    np.testing.assert_allclose(
        np.sort(features["image tokens"].ravel()), np.sort(np.concatenate(expected)), atol=1e-4
    )
