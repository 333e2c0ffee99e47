"""The pictures of a rollout, compared with those of the training episodes.

A *version* is what may have happened to a camera's pictures on their way: mirrored, turned, cropped
and so on, or taken by the other camera. For each version, the mean picture is learned from the
training pictures as a linear function of the arm's state, with one covariance for all versions
(linear discriminant analysis). The *score* of a version is the log likelihood of a picture by it,
averaged over an episode.

Half of the training episodes fit this model. The other half, changed in the same ways, say how far
the scores of two versions differ if the pictures are, or are not, of this version. So a version
that the training pictures cannot tell from the plain one is never accused: a wrist camera that
sees two equal fingers on a plain table, for example, cannot say whether it is mirrored.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from spear.checks.rollout.episode import RecordedEpisode
from spear.types import Array

PICTURE_WIDTH_PX = 32  # width to which pictures are reduced
FEATURE_WIDTH = 16  # columns of cells that the model sees; as many rows as the aspect makes
MIN_EPISODES = 8  # training episodes with a camera; with fewer its pictures are not compared
STATE_QUANTILES = (0.02, 0.98)  # of the state features of training, to which others are clipped
TIE_SHARE = 0.1  # versions whose scores differ by less, as a share of what they should, are tied
RIDGE = 0.1  # added to the covariance, as a share of its mean diagonal
PRIOR = 0.02  # probability of each version before the pictures are seen
SHIFT_SHARE = 0.2  # standard deviation, as a share of the difference between two versions, by
# which all scores of a rollout may differ from those of training, because the scene is another one
DELAY_STEPS = (0, 1, 2, 3, 5)  # delays that are compared
MAX_DELAY = DELAY_STEPS[-1]
MIN_DELAY_STEPS = 12  # shorter episodes do not show a delay
POSITION_RIDGE = 0.3  # of the regression from pictures to positions, as a share of the mean square
MAX_LOG_RATIO = 30.0  # so that odds stay finite

Transform = Callable[[Array], Array]
"""A change of pictures [N, h, w, 3] float32."""


def _zoom(pictures: Array, share_x: float, share_y: float) -> Array:
    """Show the middle of pictures [N, h, w, 3] only, in the same size."""
    height, width = pictures.shape[1:3]
    crop_width = max(1, round(width * share_x))
    crop_height = max(1, round(height * share_y))
    left_px = (width - crop_width) // 2
    top = (height - crop_height) // 2
    cropped = pictures[:, top : top + crop_height, left_px : left_px + crop_width]
    return _resize(cropped, width, height)


def _resize(pictures: Array, width: int, height: int) -> Array:
    """Resize pictures [N, h, w, 3] by linear interpolation."""
    rows = _interpolation_matrix(pictures.shape[1], height)
    columns = _interpolation_matrix(pictures.shape[2], width)
    num, _, old_width, _ = pictures.shape
    # Two matrix products are many times faster than Pillow for thousands of small pictures.
    tall = rows @ pictures.reshape(num, pictures.shape[1], -1)  # [N, height, w · 3]
    wide = columns @ tall.reshape(num * height, old_width, 3)  # [N · height, width, 3]
    return wide.reshape(num, height, width, 3)


@functools.cache
def _interpolation_matrix(old_size: int, new_size: int) -> Array:
    """Return the matrix [new_size, old_size] that interpolates a row of pixels linearly."""
    positions = (np.arange(new_size) + 0.5) * old_size / new_size - 0.5
    positions = np.clip(positions, 0, old_size - 1)
    lower = np.floor(positions).astype(int)
    upper = np.minimum(lower + 1, old_size - 1)
    fraction = positions - lower
    matrix = np.zeros((new_size, old_size), np.float32)
    matrix[np.arange(new_size), lower] += 1 - fraction
    matrix[np.arange(new_size), upper] += fraction
    return matrix


def _turn_quarter(pictures: Array, num_quarters: int) -> Array:
    """Turn pictures [N, h, w, 3] by quarters of a turn, fitted into their size without bars."""
    height, width = pictures.shape[1:3]
    return _resize(np.rot90(pictures, num_quarters, axes=(1, 2)), width, height)


def _turn_quarter_with_bars(pictures: Array, num_quarters: int) -> Array:
    """Turn pictures by quarters of a turn, and fit them into their size with black bars."""
    num, height, width, _ = pictures.shape
    turned_width = max(1, round(height * height / width))
    turned = _resize(np.rot90(pictures, num_quarters, axes=(1, 2)), turned_width, height)
    left_px = (width - turned_width) // 2
    barred = np.zeros((num, height, width, 3), np.float32)
    barred[:, :, left_px : left_px + turned_width] = turned
    return barred


def _scale_light(pictures: Array, factor: float) -> Array:
    """Brighten or darken pictures, as another exposure does."""
    return np.clip(pictures * factor, 0, 255)


SHAPE_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "mirrored left to right": lambda pictures: pictures[:, :, ::-1],
    "mirrored upside down": lambda pictures: pictures[:, ::-1],
    "turned by 180°": lambda pictures: pictures[:, ::-1, ::-1],
    "turned by 90° to the left": lambda pictures: _turn_quarter(pictures, 1),
    "turned by 90° to the right": lambda pictures: _turn_quarter(pictures, 3),
    "turned by 90° to the left, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 1),
    "turned by 90° to the right, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 3),
    "cropped to 80 %": lambda pictures: _zoom(pictures, 0.8, 0.8),
    "cropped to 60 %": lambda pictures: _zoom(pictures, 0.6, 0.6),
    "stretched in width": lambda pictures: _zoom(pictures, 0.7, 1.0),
    "stretched in height": lambda pictures: _zoom(pictures, 1.0, 0.7),
}
"""Changes that move the content of a picture; they are compared without colors and brightness."""

EXCHANGED = "exchanged with "
"""The version of pictures that are another camera's; the camera's name follows."""

COLOR_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "with red and blue exchanged": lambda pictures: pictures[..., ::-1],
    "exposed for half as long": lambda pictures: _scale_light(pictures, 0.5),
    "exposed for 70 % as long": lambda pictures: _scale_light(pictures, 0.7),
    "exposed for half as long again": lambda pictures: _scale_light(pictures, 1.5),
    "exposed for twice as long": lambda pictures: _scale_light(pictures, 2.0),
}
"""Changes of the colors; they are compared with colors and brightness."""


class VersionOdds(NamedTuple):
    """How likely a version of a camera's pictures is, compared with the plain one.

    version    the version.
    log_odds   logarithm of its probability over that of the plain version.
    log_ratio  the same, before the small prior probability of any version is counted.
    margin     mean difference of the scores, over the episodes of the rollout.
    expected   the same for training pictures that were changed to this version.
    plain      the same for training pictures that were not changed (negative).
    """

    version: str
    log_odds: float
    log_ratio: float
    margin: float
    expected: float
    plain: float


@dataclass(frozen=True)
class _VersionModel:
    """Linear discriminant analysis of the versions of one camera's pictures.

    coefficients  version → [S, D] maps the state to the mean features.
    precision     [D, D] inverse of the common covariance.
    low           [S] smallest state features of training, to which others are raised.
    high          [S] largest state features of training, to which others are lowered.
    """

    coefficients: Mapping[str, Array]
    precision: Array
    low: Array
    high: Array

    @staticmethod
    def fit(states: Array, features: Mapping[str, Array]) -> "_VersionModel":
        """Fit a model.

        Args:
            states: [N, S] features of the arm's state.
            features: version → [N, D] features of the pictures.
        """
        gram = states.T @ states + 1e-3 * np.eye(states.shape[1])
        coefficients = {}
        covariances = []
        for version, values in features.items():
            coefficients[version] = np.linalg.solve(gram, states.T @ values)
            residual = values - states @ coefficients[version]
            covariances.append(residual.T @ residual / len(residual))
        covariance = np.mean(covariances, axis=0)
        size = len(covariance)
        ridge = RIDGE * np.trace(covariance) / size
        precision = np.linalg.inv(covariance + ridge * np.eye(size))
        low, high = np.quantile(states, STATE_QUANTILES, axis=0)
        return _VersionModel(coefficients, precision, low, high)

    def score(self, states: Array, features: Array, versions: Iterable[str]) -> dict[str, float]:
        """Return the mean log likelihood of an episode's pictures by some versions."""
        # Outside of training, the linear function would lead to impossible pictures.
        states = np.clip(states, self.low, self.high)
        scores = {}
        for version in versions:
            residual = features - states @ self.coefficients[version]
            scores[version] = float(-0.5 * ((residual @ self.precision) * residual).sum(1).mean())
        return scores


@dataclass(frozen=True)
class VersionReference:
    """What training pictures of one camera say about its versions.

    camera          the camera.
    kind            "shape" or "color".
    height          rows of its small pictures.
    model           the model, fitted to half of the training episodes.
    plain_scores    scores of each other training episode.
    changed_scores  version → scores of each other training episode, changed to this version.
    """

    camera: str
    kind: str
    height: int
    model: _VersionModel
    plain_scores: Sequence[Mapping[str, float]]
    changed_scores: Mapping[str, Sequence[Mapping[str, float]]]

    @staticmethod
    def fit(
        demonstrations: Sequence[RecordedEpisode],
        camera: str,
        kind: str,
        other_cameras: Sequence[str],
    ) -> "VersionReference | None":
        """Fit the model, and score the other half; None with too few pictures.

        Args:
            demonstrations: the training episodes.
            camera: the camera.
            kind: "shape" or "color".
            other_cameras: cameras with which this one may be exchanged.
        """
        cameras = {camera, *other_cameras}
        training = [episode for episode in demonstrations if cameras <= set(episode.pictures)]
        if len(training) < MIN_EPISODES:
            return None
        height = training[0].pictures[camera].small.shape[1]

        def read(episode: RecordedEpisode, version: str) -> Array:
            """Return the features of an episode's pictures, changed to a version."""
            exchanged_camera = version.removeprefix(EXCHANGED)
            if exchanged_camera != version:
                pictures = _read_pictures(episode, exchanged_camera, height)
            else:
                pictures = transforms[version](_read_pictures(episode, camera, height))
            return _extract_features(kind, pictures)

        transforms = SHAPE_VERSIONS if kind == "shape" else COLOR_VERSIONS
        versions = [*transforms, *(f"{EXCHANGED}{name}" for name in other_cameras)]
        features = {}
        for version in versions:
            features[version] = np.concatenate([read(e, version) for e in training[::2]])
        states = np.concatenate([_state_features(episode) for episode in training[::2]])
        model = _VersionModel.fit(states, features)

        held_out = [(episode, _state_features(episode)) for episode in training[1::2]]
        plain_scores = [model.score(s, read(e, "plain"), versions) for e, s in held_out]
        changed_scores = {}
        for version in versions[1:]:
            pair = ("plain", version)
            changed_scores[version] = [model.score(s, read(e, version), pair) for e, s in held_out]
        return VersionReference(camera, kind, height, model, plain_scores, changed_scores)

    def score(self, episode: RecordedEpisode) -> dict[str, float]:
        """Return the mean log likelihood of an episode's pictures by each version."""
        pictures = _read_pictures(episode, self.camera, self.height)
        features = _extract_features(self.kind, pictures)
        states = _state_features(episode)
        return self.model.score(states, features, self.model.coefficients)


def _read_pictures(episode: RecordedEpisode, camera: str, height: int) -> Array:
    """Return the small pictures [T, height, w, 3] of a camera as float32."""
    pictures = episode.pictures[camera].small.astype(np.float32)
    if pictures.shape[1] == height:
        return pictures
    return _resize(pictures, PICTURE_WIDTH_PX, height)


def _extract_features(kind: str, pictures: Array) -> Array:
    """Return the features [N, D] of pictures: their "shape" or their "color"."""
    return _shape_features(pictures) if kind == "shape" else _color_features(pictures)


@dataclass(frozen=True)
class _PositionModel:
    """Predicts the arm's position from a picture.

    weights    [D + 1, 3] linear function of the features.
    precision  [3, 3] inverse covariance of its errors.
    """

    weights: Array
    precision: Array

    @staticmethod
    def fit(episodes: Sequence[RecordedEpisode], camera: str) -> "_PositionModel":
        """Fit a model by ridge regression."""
        features = np.concatenate([_position_features(episode, camera) for episode in episodes])
        positions = np.concatenate([_centered_position(episode) for episode in episodes])
        gram = features.T @ features
        ridge = POSITION_RIDGE * np.trace(gram) / len(gram)
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), features.T @ positions)
        errors = positions - features @ weights
        covariance = errors.T @ errors / len(errors) + 1e-8 * np.eye(3)
        return _PositionModel(weights, np.linalg.inv(covariance))

    def score(
        self, episode: RecordedEpisode, camera: str, height: int, delay: int = 0
    ) -> dict[str, float]:
        """Return the mean log likelihood of the positions, if the pictures are so late.

        Args:
            episode: the episode.
            camera: the camera.
            height: rows of the pictures that the model was fitted to.
            delay: by how many steps to delay the pictures first.
        """
        features = _position_features(episode, camera, height)
        steps = np.arange(len(episode))
        features = features[np.maximum(steps - delay, 0)]
        predicted = features @ self.weights
        positions = np.asarray(episode.position, np.float64)
        scores = {}
        for tested_delay in DELAY_STEPS:
            # The first steps of an episode have no earlier position.
            errors = (
                predicted[MAX_DELAY:] - positions[np.maximum(steps - tested_delay, 0)][MAX_DELAY:]
            )
            # Scenes differ, so only the motion within an episode counts.
            errors = errors - errors.mean(0)
            name = "plain" if tested_delay == 0 else _name_delay(tested_delay)
            scores[name] = float(-0.5 * ((errors @ self.precision) * errors).sum(1).mean())
        return scores


def _name_delay(delay: int) -> str:
    """Name pictures that are some steps late."""
    return f"late by {delay} steps" if delay > 1 else "late by 1 step"


def _centered_position(episode: RecordedEpisode) -> Array:
    """Return positions [T, 3], relative to their mean."""
    position = np.asarray(episode.position, np.float64)
    return position - position.mean(0)


def _position_features(episode: RecordedEpisode, camera: str, height: int | None = None) -> Array:
    """Return features [T, D] of pictures, relative to their mean in the episode."""
    rows = episode.pictures[camera].small.shape[1] if height is None else height
    pictures = _read_pictures(episode, camera, rows)
    features = np.concatenate([_shape_features(pictures), _color_features(pictures)], axis=1)
    return features - features.mean(0)


@dataclass(frozen=True)
class PictureComparison:
    """The pictures of a rollout and of demonstrations, camera by camera.

    rollout         the episodes of the rollout.
    demonstrations  the training episodes.
    references      (camera, "shape" or "color") → what the demonstrations say, once computed.
    """

    rollout: Sequence[RecordedEpisode]
    demonstrations: Sequence[RecordedEpisode]
    references: dict[tuple[str, str], VersionReference | None] = field(default_factory=dict)
    _odds: dict[tuple[str, str], list[VersionOdds] | None] = field(default_factory=dict)

    @staticmethod
    def from_episodes(
        rollout: Sequence[RecordedEpisode], demonstrations: Sequence[RecordedEpisode]
    ) -> "PictureComparison":
        """Compare two groups of episodes."""
        return PictureComparison(rollout, demonstrations)

    def best_shape(self, camera: str) -> VersionOdds | None:
        """Return the version of `shape_odds` that fits best, if it is likelier than plain."""
        return _select_likely(self.shape_odds(camera))

    def best_color(self, camera: str) -> VersionOdds | None:
        """Return the version of `color_odds` that fits best, if it is likelier than plain."""
        return _select_likely(self.color_odds(camera))

    def shape_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of `SHAPE_VERSIONS` and of an exchange; None without enough pictures."""
        return self._find_odds(camera, "shape")

    def color_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of `COLOR_VERSIONS`; None without enough pictures."""
        return self._find_odds(camera, "color")

    def delay_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of pictures that are some steps late; None without enough pictures.

        The arm's position is learned as a linear function of a picture. If the pictures are late,
        what they show are the positions of earlier steps.
        """
        key = (camera, "delay")
        if key not in self._odds:
            self._odds[key] = self._compute_delay_odds(camera)
        return self._odds[key]

    def best_delay(self, camera: str) -> VersionOdds | None:
        """Return the delay that fits best, if it is likelier than none."""
        return _select_likely(self.delay_odds(camera))

    def _compute_delay_odds(self, camera: str) -> list[VersionOdds] | None:
        training = [episode for episode in self.demonstrations if camera in episode.pictures]
        rollout = [
            episode
            for episode in self.rollout
            if camera in episode.pictures and len(episode) >= MIN_DELAY_STEPS
        ]
        if len(training) < MIN_EPISODES or not rollout:
            return None
        height = training[0].pictures[camera].small.shape[1]
        model = _PositionModel.fit(training[::2], camera)
        held_out = [episode for episode in training[1::2] if len(episode) >= MIN_DELAY_STEPS]
        if not held_out:
            return None
        rollout_scores = [model.score(episode, camera, height) for episode in rollout]
        plain_scores = [model.score(episode, camera, height) for episode in held_out]
        odds = []
        for delay in DELAY_STEPS[1:]:
            late_scores = [model.score(episode, camera, height, delay) for episode in held_out]
            version = _name_delay(delay)
            odds.append(_compute_version_odds(version, rollout_scores, plain_scores, late_scores))
        return sorted(odds, key=lambda entry: -entry.margin)

    @cached_property
    def training_cameras(self) -> list[str]:
        """The cameras that nearly all demonstrations have."""
        names: dict[str, int] = {}
        for episode in self.demonstrations:
            for camera in episode.pictures:
                names[camera] = names.get(camera, 0) + 1
        return [name for name, count in names.items() if count > 0.95 * len(self.demonstrations)]

    def _find_odds(self, camera: str, kind: str) -> list[VersionOdds] | None:
        """Compute the odds of the versions of a camera once; `kind` is "shape" or "color"."""
        key = (camera, kind)
        if key not in self._odds:
            self._odds[key] = self._compute_odds(camera, kind)
        return self._odds[key]

    def _compute_odds(self, camera: str, kind: str) -> list[VersionOdds] | None:
        rollout = [episode for episode in self.rollout if camera in episode.pictures]
        reference_key = (camera, kind)
        if reference_key not in self.references:
            other_cameras = []
            if kind == "shape":
                other_cameras = [name for name in self.training_cameras if name != camera]
            self.references[reference_key] = VersionReference.fit(
                self.demonstrations, camera, kind, other_cameras
            )
        reference = self.references[reference_key]
        if reference is None or not rollout:
            return None
        scores = [reference.score(episode) for episode in rollout]
        odds = []
        for version, changed_scores in reference.changed_scores.items():
            plain_scores = reference.plain_scores
            odds.append(_compute_version_odds(version, scores, plain_scores, changed_scores))
        return sorted(odds, key=lambda entry: -entry.margin)


def _select_likely(odds: list[VersionOdds] | None) -> VersionOdds | None:
    """Return the version with the highest score, if its log odds are positive."""
    if not odds or odds[0].log_odds <= 0:
        return None
    best = odds[0]
    # A view that is nearly symmetric does not tell a turn from a mirror image. A turned camera is
    # the more frequent mistake.
    for entry in odds[1:]:
        is_tied = best.margin - entry.margin < TIE_SHARE * (best.expected - best.plain)
        if is_tied and entry.version == "turned by 180°":
            return entry
    return best


def _compute_version_odds(
    version: str,
    rollout: Sequence[Mapping[str, float]],
    plain: Sequence[Mapping[str, float]],
    changed: Sequence[Mapping[str, float]],
) -> VersionOdds:
    """Compare the scores of the rollout with those of plain and of changed training pictures.

    The mean margin of a rollout's episodes is taken to be normally distributed around that of
    the training episodes. Its variance has two parts: the variance between episodes, which more
    episodes make smaller, and a shift of the whole rollout (`SHIFT_SHARE`).
    """
    margins = np.array([scores[version] - scores["plain"] for scores in rollout])
    plain_margins = np.array([scores[version] - scores["plain"] for scores in plain])
    changed_margins = np.array([scores[version] - scores["plain"] for scores in changed])
    plain_mean = float(plain_margins.mean())
    changed_mean = float(changed_margins.mean())
    shift = SHIFT_SHARE * abs(changed_mean - plain_mean)
    spread = max(float(plain_margins.std()), float(changed_margins.std()), 1e-6)
    variance = spread**2 / len(margins) + shift**2
    # Beyond the two means, a margin speaks for the nearer version, and not more and more.
    margin = float(margins.mean())
    low, high = sorted((plain_mean, changed_mean))
    bounded = float(np.clip(margin, low, high))
    log_ratio = ((bounded - plain_mean) ** 2 - (bounded - changed_mean) ** 2) / (2 * variance)
    log_ratio = float(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    log_odds = log_ratio + float(np.log(PRIOR))
    return VersionOdds(version, log_odds, log_ratio, margin, changed_mean, plain_mean)


def _state_features(episode: RecordedEpisode) -> Array:
    """Return what pictures may depend on linearly, [T, S]: position, orientation and opening."""
    w, x, y, z = np.asarray(episode.rotation, np.float64).T
    columns = [
        np.ones(len(episode)),
        *(np.asarray(episode.position, np.float64).T * 10),
        1 - 2 * (y**2 + z**2),
        2 * (x * y + w * z),
        2 * (x * z - w * y),
        np.asarray(episode.opening, np.float64),
    ]
    return np.stack(columns, 1)


def _reduce(pictures: Array) -> Array:
    """Average pictures [N, h, w, 3] over cells of 2 x 2 pixels."""
    num, height, width, _ = pictures.shape
    rows = height // 2
    columns = width // 2
    cells = pictures[:, : 2 * rows, : 2 * columns].reshape(num, rows, 2, columns, 2, 3)
    return cells.mean((2, 4))


def _shape_features(pictures: Array) -> Array:
    """Return the brightness of each cell, with mean 0 and deviation 1 in each picture: [N, D]."""
    brightness = _reduce(pictures).mean(-1).reshape(len(pictures), -1)
    centered = brightness - brightness.mean(1, keepdims=True)
    return centered / np.maximum(centered.std(1, keepdims=True), 1.0)


def _color_features(pictures: Array) -> Array:
    """Return the colors of cells of 4 x 4 pixels, around the middle gray: [N, D]."""
    cells = _reduce(_reduce(pictures))
    return (cells.reshape(len(pictures), -1) - 127.5) / 64.0
