"""The pictures of a rollout, compared with those of the training episodes.

A *version* is what may have happened to a camera's pictures on their way: mirrored, turned, cropped
and so on, or taken by the other camera. For each version, the mean picture is learned from the
training pictures as a linear function of the arm's state, with one covariance for all versions
(linear discriminant analysis). The *score* of a version is the log likelihood of a picture by it,
averaged over an episode.

Half of the training episodes fit this model. The other half, changed in the same ways, say how far
the scores of two versions differ if the pictures are, or are not, of this version. So a version
that the training pictures cannot tell from the plain one is never accused. How pictures move with
the arm (`flow`) decides between a picture and its mirror images.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from spear.checks.rollout.delays import DelayReference, compute_delay_odds
from spear.checks.rollout.episode import (
    MIN_PICTURE_EPISODES,
    RecordedEpisode,
    average_cells,
)
from spear.checks.rollout.flow import FLOW_SIGNS, FlowReference, compute_mirror_and_turn_odds
from spear.checks.rollout.odds import (
    VersionOdds,
    combine_odds_of_cameras,
    compute_odds,
    find_likely_version,
)
from spear.types import Array

# A version that all cameras have must be ten times as likely as plain pictures for each of them.
MIN_COMMON_LOG_RATIO = float(np.log(10))
PICTURE_WIDTH_PX = 32  # width to which pictures are reduced
FEATURE_WIDTH = 16  # columns of cells that the model sees; as many rows as the aspect makes
STATE_QUANTILES = (0.02, 0.98)  # of the state features of training, to which others are clipped
RIDGE = 0.1  # added to the covariance, as a share of its mean diagonal

Transform = Callable[[Array], Array]
"""A change of pictures [N, h, w, 3] float32."""


def _zoom(pictures: Array, share_x: float, share_y: float) -> Array:
    """Show the middle of pictures [N, h, w, 3] only, in the same size."""
    height, width = pictures.shape[1:3]
    crop_width = max(1, round(width * share_x))
    crop_height = max(1, round(height * share_y))
    left_px = (width - crop_width) // 2
    top_px = (height - crop_height) // 2
    cropped = pictures[:, top_px : top_px + crop_height, left_px : left_px + crop_width]
    return _resize(cropped, width, height)


def _resize(pictures: Array, width: int, height: int) -> Array:
    """Resize pictures [N, h, w, 3] by linear interpolation."""
    rows = _make_interpolation_matrix(pictures.shape[1], height)
    columns = _make_interpolation_matrix(pictures.shape[2], width)
    num, _, old_width, _ = pictures.shape
    # Two matrix products are many times faster than Pillow for thousands of small pictures.
    tall = rows @ pictures.reshape(num, pictures.shape[1], -1)  # [N, height, w · 3]
    wide = columns @ tall.reshape(num * height, old_width, 3)  # [N · height, width, 3]
    return wide.reshape(num, height, width, 3)


@functools.cache
def _make_interpolation_matrix(old_size: int, new_size: int) -> Array:
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


def _squeeze(pictures: Array, share_x: float, share_y: float) -> Array:
    """Squeeze pictures [N, h, w, 3] into their middle, as a wider view shows them.

    What the wider view adds at the sides is taken to be like the border of the pictures.
    """
    height, width = pictures.shape[1:3]
    inner_width = max(1, round(width * share_x))
    inner_height = max(1, round(height * share_y))
    squeezed = _resize(pictures, inner_width, inner_height)
    left_px = (width - inner_width) // 2
    top_px = (height - inner_height) // 2
    rows = (top_px, height - inner_height - top_px)
    columns = (left_px, width - inner_width - left_px)
    return np.pad(squeezed, ((0, 0), rows, columns, (0, 0)), mode="edge")


def _turn_quarter_and_stretch(pictures: Array, num_quarters: int) -> Array:
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


def scale_brightness(pictures: Array, factor: float) -> Array:
    """Brighten or darken pictures, as another exposure does."""
    return np.clip(pictures * factor, 0, 255)


SHAPE_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "mirrored left to right": lambda pictures: pictures[:, :, ::-1],
    "mirrored upside down": lambda pictures: pictures[:, ::-1],
    "turned by 180°": lambda pictures: pictures[:, ::-1, ::-1],
    "turned by 90° to the left": lambda pictures: _turn_quarter_and_stretch(pictures, 1),
    "turned by 90° to the right": lambda pictures: _turn_quarter_and_stretch(pictures, 3),
    "turned by 90° to the left, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 1),
    "turned by 90° to the right, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 3),
    "cropped to 80 %": lambda pictures: _zoom(pictures, 0.8, 0.8),
    "cropped to 60 %": lambda pictures: _zoom(pictures, 0.6, 0.6),
    "stretched in width": lambda pictures: _zoom(pictures, 0.7, 1.0),
    "stretched in width, slightly": lambda pictures: _zoom(pictures, 0.87, 1.0),
    "stretched in height": lambda pictures: _zoom(pictures, 1.0, 0.7),
    "stretched in height, slightly": lambda pictures: _zoom(pictures, 1.0, 0.87),
    "squeezed in width": lambda pictures: _squeeze(pictures, 0.75, 1.0),
    "squeezed in height": lambda pictures: _squeeze(pictures, 1.0, 0.75),
}
"""Changes that move the content of a picture; they are compared without colors and brightness."""

EXCHANGED = "exchanged with "
"""The version of pictures that are another camera's; the camera's name follows."""

EXPOSURE_FACTORS = {
    "exposed for half as long": 0.5,
    "exposed for 70 % as long": 0.7,
    "exposed for half as long again": 1.5,
    "exposed for twice as long": 2.0,
}
"""Version of pictures with another exposure → how much brighter they are."""

COLOR_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "with red and blue exchanged": lambda pictures: pictures[..., ::-1],
}
"""Changes of the colors; they are compared with colors and brightness."""
for _version, _factor in EXPOSURE_FACTORS.items():
    COLOR_VERSIONS[_version] = partial(scale_brightness, factor=_factor)


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

    def compute_mean_log_likelihoods(
        self, states: Array, features: Array, versions: Iterable[str]
    ) -> dict[str, float]:
        """Return version → mean log likelihood of an episode's pictures by it."""
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
        if len(training) < MIN_PICTURE_EPISODES:
            return None
        height = training[0].pictures[camera].small.shape[1]
        transforms = SHAPE_VERSIONS if kind == "shape" else COLOR_VERSIONS

        def read(episode: RecordedEpisode, version: str) -> Array:
            """Return the features of an episode's pictures, changed to a version."""
            exchanged_camera = version.removeprefix(EXCHANGED)
            if exchanged_camera != version:
                pictures = _get_resized_pictures(episode, exchanged_camera, height)
            else:
                pictures = transforms[version](_get_resized_pictures(episode, camera, height))
            return _extract_features(kind, pictures)

        # Fit the model to every second episode.
        fitted = training[::2]
        versions = [*transforms, *(f"{EXCHANGED}{name}" for name in other_cameras)]
        features = {}
        for version in versions:
            features[version] = np.concatenate([read(episode, version) for episode in fitted])
        states = np.concatenate([_extract_state_features(episode) for episode in fitted])
        model = _VersionModel.fit(states, features)

        # Score the other episodes, as they are and changed to each version but the first, "plain".
        plain_scores: list[dict[str, float]] = []  # of each episode: version → log likelihood
        changed_scores: dict[str, list[dict[str, float]]] = {name: [] for name in versions[1:]}
        for episode in training[1::2]:
            episode_states = _extract_state_features(episode)
            plain_scores.append(
                model.compute_mean_log_likelihoods(episode_states, read(episode, "plain"), versions)
            )
            for version, scores in changed_scores.items():
                changed_features = read(episode, version)
                pair = ("plain", version)
                scores.append(
                    model.compute_mean_log_likelihoods(episode_states, changed_features, pair)
                )
        return VersionReference(camera, kind, height, model, plain_scores, changed_scores)

    def compute_mean_log_likelihoods(self, episode: RecordedEpisode) -> dict[str, float]:
        """Return version → mean log likelihood of an episode's pictures by it, of all versions."""
        pictures = _get_resized_pictures(episode, self.camera, self.height)
        features = _extract_features(self.kind, pictures)
        states = _extract_state_features(episode)
        return self.model.compute_mean_log_likelihoods(states, features, self.model.coefficients)

    def compute_odds(self, rollout: Sequence[RecordedEpisode]) -> list[VersionOdds]:
        """Return the odds of each version of a rollout's pictures, the best one first."""
        scores = [self.compute_mean_log_likelihoods(episode) for episode in rollout]
        return compute_odds(scores, self.plain_scores, self.changed_scores)


def _get_resized_pictures(episode: RecordedEpisode, camera: str, height: int) -> Array:
    """Return the small pictures [T, height, w, 3] of a camera as float32."""
    pictures = episode.pictures[camera].small.astype(np.float32)
    if pictures.shape[1] == height:
        return pictures
    return _resize(pictures, PICTURE_WIDTH_PX, height)


def _extract_features(kind: str, pictures: Array) -> Array:
    """Return the features [N, D] of pictures: their "shape" or their "color"."""
    return (
        _extract_shape_features(pictures) if kind == "shape" else _extract_color_features(pictures)
    )


@dataclass(frozen=True)
class PictureReferences:
    """What the pictures of demonstrations say. Each is computed once, when it is asked for.

    Several rollouts of a policy may share it.

    demonstrations  the training episodes.
    """

    demonstrations: Sequence[RecordedEpisode]
    _versions: dict[tuple[str, str], VersionReference | None] = field(default_factory=dict)
    _delays: dict[str, DelayReference | None] = field(default_factory=dict)
    _flows: dict[str, FlowReference | None] = field(default_factory=dict)

    @cached_property
    def training_cameras(self) -> list[str]:
        """The cameras that nearly all demonstrations have."""
        num_episodes: dict[str, int] = {}  # camera → number of episodes that have it
        for episode in self.demonstrations:
            for camera in episode.pictures:
                num_episodes[camera] = num_episodes.get(camera, 0) + 1
        min_episodes = 0.95 * len(self.demonstrations)
        return [camera for camera, number in num_episodes.items() if number > min_episodes]

    def get_version_reference(self, camera: str, kind: str) -> VersionReference | None:
        """Return a model of a camera's pictures and their versions, fitted to the demonstrations.

        Args:
            camera: the camera.
            kind: "shape" for `SHAPE_VERSIONS` and an exchange with another camera; "color" for
                `COLOR_VERSIONS`.

        Returns:
            The model and its scores; None with too few pictures.
        """
        key = (camera, kind)
        if key not in self._versions:
            other_cameras = []
            if kind == "shape":
                other_cameras = [name for name in self.training_cameras if name != camera]
            self._versions[key] = VersionReference.fit(
                self.demonstrations, camera, kind, other_cameras
            )
        return self._versions[key]

    def get_delay_reference(self, camera: str) -> DelayReference | None:
        """Return what the demonstrations say about late pictures; None with too few of them."""
        if camera not in self._delays:
            self._delays[camera] = DelayReference.fit(self.demonstrations, camera)
        return self._delays[camera]

    def get_flow_reference(self, camera: str) -> FlowReference | None:
        """Return how the demonstrations' pictures move with the arm; None with too few of them."""
        if camera not in self._flows:
            self._flows[camera] = FlowReference.fit(self.demonstrations, camera)
        return self._flows[camera]


@dataclass(frozen=True)
class PictureComparison:
    """The pictures of a rollout and of demonstrations, camera by camera.

    rollout     the episodes of the rollout.
    references  what the demonstrations say.
    """

    rollout: Sequence[RecordedEpisode]
    references: PictureReferences
    _odds: dict[tuple[str, str], list[VersionOdds] | None] = field(default_factory=dict)

    @property
    def training_cameras(self) -> list[str]:
        """The cameras that nearly all demonstrations have."""
        return self.references.training_cameras

    def find_best_shape_version(self, camera: str) -> VersionOdds | None:
        """Return the version that fits best by single pictures and their motion, if one is likely.

        The motion tells mirrored pictures from turned ones, because single pictures may be nearly
        symmetric. But an arm that is blocked, or goes astray, moves otherwise than in training, and
        then single pictures may show that nothing is turned.
        """
        by_content = find_likely_version(self.get_shape_odds(camera))
        by_both = self._find_best_mirror_or_turn(camera)
        if by_both is None:
            return by_content
        if by_content is not None and by_content.version not in FLOW_SIGNS:
            # The motion cannot tell such a version, but another one may be likelier by it.
            is_flow_surer = by_both.log_odds > by_content.log_odds
            return by_both if is_flow_surer else by_content
        return by_both if by_both.log_odds > 0 else None

    def _find_best_mirror_or_turn(self, camera: str) -> VersionOdds | None:
        """Return the likeliest version of `FLOW_SIGNS`; None if nothing is known about the motion.

        The evidence of single pictures and of their motion adds up. A camera of which only the
        motion is known is judged by that.
        """
        flow_odds = self.get_mirror_and_turn_odds_by_flow(camera)
        if flow_odds is None:
            return None
        content_ratios = {
            odds.version: odds.log_ratio for odds in self.get_shape_odds(camera) or ()
        }
        by_both = []
        for odds in flow_odds:
            content_ratio = content_ratios.get(odds.version, 0.0)
            by_both.append(odds._replace(log_odds=odds.log_odds + content_ratio))
        return max(by_both, key=lambda odds: odds.log_odds)

    def find_best_color_version(self, camera: str) -> VersionOdds | None:
        """Return the version of the colors that fits best, if it is likelier than plain.

        A program mostly converts the pictures of all its cameras in the same way. So a version that
        each camera speaks for may be likely although one camera alone does not show it surely.
        """
        best = find_likely_version(self.get_color_odds(camera))
        common = self.common_color_version
        if common is not None and (best is None or common.log_odds > best.log_odds):
            return common
        return best

    @cached_property
    def common_color_version(self) -> VersionOdds | None:
        """The likeliest version of the colors of all cameras together, if it is likely.

        The evidence of the cameras adds up, and the small prior probability of a version counts
        once. Margins are means over the cameras. It is None if there is one camera only.
        """
        odds_by_camera: list[dict[str, VersionOdds]] = []
        for camera in self.references.training_cameras:
            all_odds = self.get_color_odds(camera)
            if all_odds is not None:
                odds_by_camera.append({odds.version: odds for odds in all_odds})
        if len(odds_by_camera) < 2:
            return None
        common = []
        for version in odds_by_camera[0]:
            odds = [of_camera[version] for of_camera in odds_by_camera]
            if all(entry.log_ratio >= MIN_COMMON_LOG_RATIO for entry in odds):
                common.append(combine_odds_of_cameras(odds))
        return find_likely_version(sorted(common, key=lambda entry: -entry.log_odds))

    def get_shape_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of `SHAPE_VERSIONS` and of an exchange; None without enough pictures."""
        return self._get_or_compute_odds(camera, "shape")

    def get_color_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of `COLOR_VERSIONS`; None without enough pictures."""
        return self._get_or_compute_odds(camera, "color")

    def get_delay_odds(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of pictures that are some steps late; None without enough pictures."""
        return self._get_or_compute_odds(camera, "delay")

    def get_mirror_and_turn_odds_by_flow(self, camera: str) -> list[VersionOdds] | None:
        """Return the odds of mirrored and turned pictures, by how they move with the arm."""
        return self._get_or_compute_odds(camera, "flow")

    def find_best_delay(self, camera: str) -> VersionOdds | None:
        """Return the delay in `get_delay_odds` that fits best, if it is likelier than no delay."""
        return find_likely_version(self.get_delay_odds(camera))

    def _get_or_compute_odds(self, camera: str, kind: str) -> list[VersionOdds] | None:
        """Compute the odds of a kind ("shape", "color", "delay" or "flow") of a camera once."""
        key = (camera, kind)
        if key not in self._odds:
            self._odds[key] = self._compute_odds(camera, kind)
        return self._odds[key]

    def _compute_odds(self, camera: str, kind: str) -> list[VersionOdds] | None:
        """Compute the odds of a kind; None without enough pictures."""
        rollout = [episode for episode in self.rollout if camera in episode.pictures]
        if not rollout:
            return None
        if kind == "delay":
            delays = self.references.get_delay_reference(camera)
            return None if delays is None else compute_delay_odds(rollout, delays, camera)
        if kind == "flow":
            flows = self.references.get_flow_reference(camera)
            return None if flows is None else compute_mirror_and_turn_odds(rollout, flows, camera)
        versions = self.references.get_version_reference(camera, kind)
        return None if versions is None else versions.compute_odds(rollout)


def _extract_state_features(episode: RecordedEpisode) -> Array:
    """Return what pictures may depend on linearly, [T, S]: position, orientation and opening.

    The position is in decimeters, so that all features have about the same size. The orientation is
    the direction of the end-effector's x axis.
    """
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


def _extract_shape_features(pictures: Array) -> Array:
    """Return the brightness of each cell, with mean 0 and deviation 1 in each picture: [N, D]."""
    brightness = average_cells(pictures).mean(-1).reshape(len(pictures), -1)
    centered = brightness - brightness.mean(1, keepdims=True)
    return centered / np.maximum(centered.std(1, keepdims=True), 1.0)


def _extract_color_features(pictures: Array) -> Array:
    """Return the colors of cells of 4 x 4 pixels, around the middle gray: [N, D]."""
    cells = average_cells(average_cells(pictures))
    return (cells.reshape(len(pictures), -1) - 127.5) / 64.0
