"""What of a scene's geometry can a policy's action expert read from its VLM, linearly?

    python -m experiments.labs.probes --models runs/labs/vlm-3d runs/labs/policies/3d-64-0

The action expert attends to the keys and values of all layers of the VLM. A linear probe reads from
them where the object is that has to be moved, in the camera's frame and in that of the robot's
base, and where the camera is. Scenes stand in laboratories that no demonstration and no label
shows, each in another one. A probe is a ridge regression; it is fitted on some scenes, its penalty
is chosen on others, and its errors are measured on scenes that are held out.

Each model has two probes: one reads the tokens of the images, all of them, and one reads those of
the instruction, namely their mean and the last one. For comparison, a probe reads the pixels of the
images, and another always answers with the median position. Printed are median errors in mm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from spear.cli import run_reporting_errors
from spear.embodiments.observations import get_camera_key
from spear.evaluate.stats import Estimate, bootstrap
from spear.policy import VlmBundle, load_vlm
from spear.sim.env import TabletopEnv
from spear.sim.render import compute_camera_pose
from spear.sim.scene import SOURCE_INDEX
from spear.types import Array, WidthAndHeight
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.progress import ProgressBar

UNSEEN_LABS = "colorful-labs:1000000"
"""So many laboratories that hardly two scenes stand in the same one, and none in one of a
demonstration."""
TASK_FAMILIES = ("put_on", "put_in_basket", "spoon_on_towel")  # those of the demonstrations
FIRST_TEST_SEED = 1000
FIRST_FITTING_SEED = FIRST_TRAIN_SEED + 500_000  # seeds that no demonstration has
BATCH_SIZE = 20
CAMERA = "external"
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 4))
"""Candidates for the penalty, in units of the mean square of a scene's features."""
TARGETS = ("object, camera frame", "object, base frame", "camera, base frame")


@dataclass(frozen=True)
class Scenes:
    """What the robot observes at the start of n scenes, and the truth.

    observations  of the policy, one per scene.
    positions     target → [n, 3], m.
    """

    observations: Sequence[dict[str, Any]]
    positions: dict[str, Array]


@dataclass(frozen=True)
class Split:
    """Which scenes a probe is fitted on, chooses its penalty on, and is measured on."""

    fitting: slice
    validation: slice
    test: slice


def render_scenes(seeds: Sequence[int], image_sizes: Mapping[str, WidthAndHeight]) -> Scenes:
    """Render the start of a scene of each seed, in laboratories without demonstrations."""
    environments = [TabletopEnv(family, image_sizes, world=UNSEEN_LABS) for family in TASK_FAMILIES]
    observations = []
    positions: dict[str, list[Array]] = {target: [] for target in TARGETS}
    with ProgressBar("scenes", len(seeds)) as bar:
        for index, seed in enumerate(seeds):
            env = environments[index % len(environments)]
            observation, _ = env.reset(seed=seed)
            observations.append(observation)

            in_base = np.asarray(env.world.get_object_position(SOURCE_INDEX))
            camera_pose = compute_camera_pose(env.world, CAMERA)
            in_camera = camera_pose[:3, :3].T @ (in_base - camera_pose[:3, 3])
            truth = (in_camera, in_base, camera_pose[:3, 3])
            for target, position in zip(TARGETS, truth, strict=True):
                positions[target].append(position)
            bar.set_num_done(index + 1)
    stacked = {target: np.stack(values) for target, values in positions.items()}
    return Scenes(observations, stacked)


@torch.no_grad()
def read_keys_and_values(vlm: VlmBundle, scenes: Scenes) -> dict[str, Array]:
    """Compute what the action expert attends to, as the features of each scene.

    Returns:
        "image tokens" → [n, ·], the keys and values of all layers at all tokens of the images;
        "instruction" → [n, ·], those at the instruction's tokens: their mean, and the last token.
    """
    image_batches = []
    text_batches = []
    with ProgressBar("forward passes", len(scenes.observations)) as bar:
        for start in range(0, len(scenes.observations), BATCH_SIZE):
            batch = scenes.observations[start : start + BATCH_SIZE]
            pixels = {}
            for view in vlm.processor.image_sizes:
                images = [
                    vlm.processor.prepare_image(observation[get_camera_key(view)], view)
                    for observation in batch
                ]
                pixels[view] = torch.stack(images)
            text = vlm.processor.encode_instructions([o["prompt"] for o in batch])
            is_word = text["attention_mask"].bool()  # [B, L]
            visual_tokens, is_visible = vlm.model.encode_images(pixels)
            prefix = vlm.model.run_language_model(
                visual_tokens, is_visible, text["input_ids"], text["attention_mask"]
            )

            # [B, tokens, features]: keys and values of all layers and heads side by side
            by_layer = [*prefix.cache.keys, *prefix.cache.values]
            features = torch.cat([layer.transpose(1, 2).flatten(2) for layer in by_layer], dim=2)
            num_visual_tokens = visual_tokens.shape[1]
            image_batches.append(features[:, :num_visual_tokens].flatten(1))
            text_batches.append(pool_words(features[:, num_visual_tokens:], is_word))
            bar.set_num_done(start + len(batch))
    return {
        "image tokens": torch.cat(image_batches).numpy(),
        "instruction": torch.cat(text_batches).numpy(),
    }


def pool_words(features: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
    """Return the mean over the words of an instruction, and the last word: [B, 2 D].

    Args:
        features: [B, L, D], of each token.
        is_word: [B, L], False for padding.
    """
    weights = is_word.float()[..., None]  # [B, L, 1]
    mean = (features * weights).sum(dim=1) / weights.sum(dim=1)
    positions = torch.arange(is_word.shape[1]).expand_as(is_word)
    last_position = torch.where(is_word, positions, -1).max(dim=1).values
    last = features[torch.arange(len(features)), last_position]
    return torch.cat([mean, last], dim=1)


def read_pixels(scenes: Scenes) -> Array:
    """Return all pixels of the images of each scene, [n, ·]."""
    rows = []
    for observation in scenes.observations:
        images = [observation[key] for key in sorted(observation) if "image" in key]
        rows.append(np.concatenate([image.ravel() for image in images]))
    return np.stack(rows).astype(np.float32)


@dataclass(frozen=True)
class Similarities:
    """How similar scenes are to the m scenes that probes are fitted on.

    The similarity of two scenes is the inner product of their normalized features, per feature.

    eigenvalues   [m] of the matrix of similarities of the fitting scenes.
    eigenvectors  [m, m] of that matrix, one per column.
    validation    [v, m] similarities of the validation scenes to the fitting scenes.
    test          [t, m] similarities of the test scenes to the fitting scenes.
    """

    eigenvalues: Array
    eigenvectors: Array
    validation: Array
    test: Array


def compute_similarities(features: Array, split: Split) -> Similarities:
    """Compare scenes by their features [n, D]. Features that never change do not count."""
    mean = features[split.fitting].mean(axis=0)
    scale = features[split.fitting].std(axis=0)
    is_constant = scale < 1e-6
    normalized = np.where(is_constant, 0, (features - mean) / np.where(is_constant, 1, scale))
    num_features = max(1, int((~is_constant).sum()))

    def compare_with_fitting_scenes(scenes: slice) -> Array:
        products = normalized[scenes] @ normalized[split.fitting].T
        return products.astype(np.float64) / num_features

    eigenvalues, eigenvectors = np.linalg.eigh(compare_with_fitting_scenes(split.fitting))
    return Similarities(
        eigenvalues,
        eigenvectors,
        validation=compare_with_fitting_scenes(split.validation),
        test=compare_with_fitting_scenes(split.test),
    )


def measure_probe_errors_m(similarities: Similarities, positions: Array, split: Split) -> Array:
    """Fit a linear probe and measure its errors [test scenes], m.

    The regression is solved for one weight per fitting scene rather than per feature, because there
    are far more features than scenes. Both have the same solution.

    Args:
        similarities: of the scenes, by the features that the probe reads.
        positions: [n, 3], which the probe learns to read, m.
        split: which scenes are for what.
    """
    mean_position = positions[split.fitting].mean(axis=0)
    offsets = positions[split.fitting] - mean_position  # [m, 3]
    eigenvectors = similarities.eigenvectors
    projected = eigenvectors.T @ offsets

    def measure_errors_m(penalty: float, to_fitting_scenes: Array, truth: Array) -> Array:
        weights = eigenvectors @ (projected / (similarities.eigenvalues[:, None] + penalty))
        predicted = mean_position + to_fitting_scenes @ weights  # weights are [m, 3]
        return np.linalg.norm(predicted - truth, axis=1)

    def measure_median_error_m(penalty: float) -> float:
        truth = positions[split.validation]
        return float(np.median(measure_errors_m(penalty, similarities.validation, truth)))

    best_penalty = min(PENALTIES, key=measure_median_error_m)
    return measure_errors_m(best_penalty, similarities.test, positions[split.test])


def measure_constant_errors_m(positions: Array, split: Split) -> Array:
    """Measure the errors [test scenes] of the median of the fitting scenes as the answer, m."""
    median = np.median(positions[split.fitting], axis=0)
    return np.linalg.norm(positions[split.test] - median, axis=1)


def measure_rows(
    vlms: Mapping[str, VlmBundle], scenes: Scenes, split: Split
) -> dict[str, dict[str, Estimate]]:
    """Measure what can be read from models, from pixels and from nothing.

    Args:
        vlms: name → model.
        scenes: the scenes of all parts of the split.
        split: which scenes are for what.

    Returns:
        Name of a row → target → median error with its interval, mm.
    """
    rows = {
        "best constant answer": {
            target: _estimate_mm(measure_constant_errors_m(positions, split))
            for target, positions in scenes.positions.items()
        },
        "pixels": _measure_all_targets(read_pixels(scenes), scenes, split),
    }
    for name, vlm in vlms.items():
        for tokens, features in read_keys_and_values(vlm, scenes).items():
            rows[f"{name}, {tokens}"] = _measure_all_targets(features, scenes, split)
    return rows


def _measure_all_targets(features: Array, scenes: Scenes, split: Split) -> dict[str, Estimate]:
    """Fit a probe for each target: target → median error with its interval, mm."""
    similarities = compute_similarities(features, split)
    return {
        target: _estimate_mm(measure_probe_errors_m(similarities, positions, split))
        for target, positions in scenes.positions.items()
    }


def _estimate_mm(errors_m: Array) -> Estimate:
    """Return the median of errors with its 95 % interval, mm."""
    return bootstrap([np.array([1000 * error]) for error in errors_m])


def format_table(rows: dict[str, dict[str, Estimate]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| read from | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for row, estimates in rows.items():
        cells = [estimates[target].to_text(".0f") for target in TARGETS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    models: tuple[str, ...],
    num_fitting: int = 800,
    num_validation: int = 200,
    num_test: int = 200,
    out: Path | None = None,
) -> None:
    """Fit the probes, measure them, and print a table.

    Args:
        models: folders of SPEAR-VLMs, or of policies, whose VLM is used.
        num_fitting: scenes that probes are fitted on.
        num_validation: scenes that their penalty is chosen on.
        num_test: scenes that they are measured on.
        out: a JSON file for the numbers.
    """
    torch.set_num_threads(1)
    num_others = num_fitting + num_validation
    seeds = [
        *range(FIRST_FITTING_SEED, FIRST_FITTING_SEED + num_others),
        *range(FIRST_TEST_SEED, FIRST_TEST_SEED + num_test),
    ]
    vlms = {Path(model).name: load_vlm(model) for model in models}
    scenes = render_scenes(seeds, next(iter(vlms.values())).processor.image_sizes)
    split = Split(
        fitting=slice(0, num_fitting),
        validation=slice(num_fitting, num_others),
        test=slice(num_others, num_others + num_test),
    )
    rows = measure_rows(vlms, scenes, split)
    print(f"{num_test} scenes, probes fitted on {num_fitting}; median errors, mm [95 %]")
    print(format_table(rows))
    if out is not None:
        numbers = {
            row: {target: [e.value, e.low, e.high] for target, e in estimates.items()}
            for row, estimates in rows.items()
        }
        out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
