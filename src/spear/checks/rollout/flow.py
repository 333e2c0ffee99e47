"""Are a camera's pictures mirrored or turned? How they move is compared with how the arm moves.

A wrist camera that sees two equal fingers on a plain table shows the same picture if it is
mirrored. But when the gripper moves to its left, the table moves through the picture in a direction
that mirroring reverses. The *flow* of two pictures in a row is the shift, scaling and turn that
turns one into the other (Lucas and Kanade's method on the whole picture). Training pictures say
how the flow follows the motion of the arm, linearly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spear.checks.rollout.episode import MIN_PICTURE_EPISODES, RecordedEpisode, average_cells
from spear.checks.rollout.odds import VersionOdds, compute_odds
from spear.geometry import quat_canonical, quat_conjugate, quat_log, quat_multiply, quat_rotate
from spear.types import Array

NOISE_GRADIENT = 5.0  # added to the squared gradient of each cell: below it there is only noise
MOTION_RIDGE = 0.01  # of the regression from motions to flows
MAX_SQUARED_ERROR = 9.0  # of a flow parameter, in squared deviations; more is an outlier
METERS_PER_UNIT = 0.02  # a usual move, and rotation, of one step, so that all columns are near 1
RADIANS_PER_UNIT = 0.1

FLOW_SIGNS: Mapping[str, tuple[int, int, int, int]] = {
    "mirrored left to right": (-1, 1, 1, -1),
    "mirrored upside down": (1, -1, 1, -1),
    "turned by 180°": (-1, -1, 1, 1),
}
"""Version → the signs that it gives the shift to the right, the shift down, the scaling and the
turn of a flow."""


@dataclass(frozen=True)
class FlowReference:
    """What training pictures of one camera say about flows.

    model           how flows follow the motion, by one half of the training episodes.
    plain_scores    scores of each episode of the other half.
    changed_scores  version → scores of the same episodes, changed to this version.
    """

    model: "_FlowModel"
    plain_scores: Sequence[Mapping[str, float]]
    changed_scores: Mapping[str, Sequence[Mapping[str, float]]]

    @staticmethod
    def fit(demonstrations: Sequence[RecordedEpisode], camera: str) -> "FlowReference | None":
        """Fit the model, and score the other half; None with too few episodes."""
        training = [
            _measure_flow_and_motion(episode, camera)
            for episode in demonstrations
            if _can_measure_flow(episode, camera)
        ]
        if len(training) < MIN_PICTURE_EPISODES:
            return None
        model = _FlowModel.fit(training[::2])
        plain_scores = [model.compute_mean_log_likelihoods(measured) for measured in training[1::2]]
        changed_scores = {}
        for version, signs in FLOW_SIGNS.items():
            scores = []
            for measured in training[1::2]:
                changed = MeasuredFlow(measured.flows * np.array(signs), measured.motions)
                scores.append(model.compute_mean_log_likelihoods(changed))
            changed_scores[version] = scores
        return FlowReference(model, plain_scores, changed_scores)


def compute_mirror_and_turn_odds(
    rollout: Sequence[RecordedEpisode], reference: FlowReference, camera: str
) -> list[VersionOdds] | None:
    """Return the odds of mirrored and turned pictures, the best first.

    None if no episode has two observations with a picture of the camera, and so a move.
    """
    scores = []
    for episode in rollout:
        if _can_measure_flow(episode, camera):
            scores.append(
                reference.model.compute_mean_log_likelihoods(
                    _measure_flow_and_motion(episode, camera)
                )
            )
    if not scores:
        return None
    return compute_odds(scores, reference.plain_scores, reference.changed_scores)


@dataclass(frozen=True)
class MeasuredFlow:
    """Flow and motion during the M moves of an episode. A move lies between two observations.

    flows    [M, 4] shift to the right, shift down, scaling and turn of the picture. All four are in
             cells of `average_cells`: for scaling and turn, it is the shift at the border.
    motions  [M, 7] translation (3) and rotation (3) of the tool in its own frame, in
             `METERS_PER_UNIT` and `RADIANS_PER_UNIT`, and change of the gripper opening (1).
    """

    flows: Array
    motions: Array


@dataclass(frozen=True)
class _FlowModel:
    """Predicts flows from motions.

    weights    [7, 4] linear function of the motion.
    deviation  [4] standard deviation of its errors.
    """

    weights: Array
    deviation: Array

    @staticmethod
    def fit(episodes: Sequence[MeasuredFlow]) -> "_FlowModel":
        motions = np.concatenate([episode.motions for episode in episodes])
        flows = np.concatenate([episode.flows for episode in episodes])
        gram = motions.T @ motions + MOTION_RIDGE * np.eye(motions.shape[1])
        weights = np.linalg.solve(gram, motions.T @ flows)
        deviation = (flows - motions @ weights).std(0)
        return _FlowModel(weights, np.maximum(deviation, 1e-6))

    def compute_mean_log_likelihoods(self, measured: MeasuredFlow) -> dict[str, float]:
        """Return version of the pictures → mean log likelihood of an episode's flows.

        The versions are "plain" and those of `FLOW_SIGNS`.
        """
        predicted = measured.motions @ self.weights
        scores = {}
        for version, signs in {"plain": (1, 1, 1, 1), **FLOW_SIGNS}.items():
            errors = (measured.flows - predicted * np.array(signs)) / self.deviation
            squares = np.minimum(errors**2, MAX_SQUARED_ERROR)
            scores[version] = float(-0.5 * squares.sum(1).mean())
        return scores


def _can_measure_flow(episode: RecordedEpisode, camera: str) -> bool:
    return len(episode) > 1 and camera in episode.pictures


def _measure_flow_and_motion(episode: RecordedEpisode, camera: str) -> MeasuredFlow:
    """Measure flows and motions of an episode of at least two steps."""
    orientation = torch.as_tensor(np.asarray(episode.rotation, np.float64))
    to_tool = quat_conjugate(orientation[:-1])
    displacement = torch.as_tensor(np.diff(np.asarray(episode.position, np.float64), axis=0))
    translation = quat_rotate(to_tool, displacement).numpy()
    turn = quat_log(quat_canonical(quat_multiply(to_tool, orientation[1:]))).numpy()
    opening_change = np.diff(np.asarray(episode.opening, np.float64))[:, None]
    motions = [translation / METERS_PER_UNIT, turn / RADIANS_PER_UNIT, opening_change]
    flows = measure_similarity_flows(episode.pictures[camera].small)
    return MeasuredFlow(flows, np.concatenate(motions, axis=1))


def measure_similarity_flows(pictures: Array) -> Array:
    """Measure how the whole picture moves from each picture to the next.

    Args:
        pictures: [T, h, w, 3].

    Returns:
        [T - 1, 4] shift to the right, shift down, scaling and turn, as in `MeasuredFlow`.
    """
    brightness = _blur_and_cut_border(average_cells(pictures.astype(np.float64).mean(-1)))
    gradient_y, gradient_x = np.gradient(brightness, axis=(1, 2))
    gradient_x = (gradient_x[:-1] + gradient_x[1:]) / 2
    gradient_y = (gradient_y[:-1] + gradient_y[1:]) / 2
    num, height, width = gradient_x.shape
    # Coordinates of the cells, from -1 at one border to 1 at the other. NumPy takes the imaginary
    # numbers for how many there are.
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    # What a small shift to the right, shift down, scaling and turn each add to the later picture.
    effects = np.stack(
        [
            gradient_x,
            gradient_y,
            gradient_x * x + gradient_y * y,
            gradient_y * x - gradient_x * y,
        ],
        axis=-1,
    ).reshape(num, -1, 4)
    changes = -np.diff(brightness, axis=0).reshape(num, -1)
    gram = effects.transpose(0, 2, 1) @ effects + NOISE_GRADIENT * height * width * np.eye(4)
    moments = effects.transpose(0, 2, 1) @ changes[..., None]
    return np.linalg.solve(gram, moments)[..., 0]


def _blur_and_cut_border(brightness: Array) -> Array:
    """Blur pictures [T, h, w] with the weights 1, 2, 1 along both axes.

    Returns:
        [T, h - 2, w - 2]: the pixels at the border are left out, because they lack neighbors.
    """
    rows = (brightness[:, :-2] + 2 * brightness[:, 1:-1] + brightness[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
