"""The pictures of a rollout, compared with those of the training episodes.

A *version* is what may have happened to a camera's pictures on their way: mirrored, turned, cropped
and so on, or taken by the other camera. For each version, the mean picture is learned from the
training pictures as a linear function of the arm's state, with one covariance for all versions
(linear discriminant analysis). The *score* of a version is the log likelihood of a picture by it,
averaged over an episode.

Half of the training episodes fit this model. The other half, changed in the same ways, say how far
the scores of two versions differ if the pictures are, or are not, of this version. So a version
that the training pictures cannot tell from the plain one is never accused. If there are few
training episodes, a half of them would show too few scenes. Then all of them fit the model of
shapes, and cross-validation says how far the scores differ. How pictures move with
the arm (`flow`) decides between a picture and its mirror images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

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
from spear.checks.rollout.picture_versions import (
    COLOR_VERSIONS,
    EXCHANGED,
    SHAPE_VERSIONS,
    change_content,
    resize,
)
from spear.types import Array

# A version that all cameras have must be ten times as likely as plain pictures for each of them.
MIN_COMMON_LOG_RATIO = float(np.log(10))
PICTURE_WIDTH_PX = 32  # width to which pictures are reduced
FEATURE_WIDTH = 16  # columns of cells that the model sees; as many rows as the aspect makes
STATE_QUANTILES = (0.02, 0.98)  # of the state features of training, to which others are clipped
FEW_EPISODES = 40  # with fewer training episodes, shapes are scored by cross-validation
NUM_FOLDS = 10  # of the cross-validation
RIDGE = 0.1  # added to the covariance, as a share of its mean diagonal


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


class _VersionSample(NamedTuple):
    """What a training episode of T steps says about versions.

    states    [T, S] features of the arm's state.
    features  version → [T, D] features of the pictures, changed to this version.
    """

    states: Array
    features: Mapping[str, Array]


@dataclass(frozen=True)
class VersionReference:
    """What training pictures of one camera say about its versions.

    camera          the camera.
    kind            "shape" or "color".
    height          rows of its small pictures.
    model           the model.
    plain_scores    scores of training episodes that did not fit the model that scores them.
    changed_scores  version → scores of the same training episodes, changed to this version.
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
        """Fit the model, and score training episodes; None with too few pictures.

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
        samples = [
            _read_version_sample(episode, camera, kind, other_cameras, height)
            for episode in training
        ]
        # A half of few episodes shows colors well enough, but not each scene.
        if kind == "color" or len(samples) >= FEW_EPISODES:
            model = _fit_version_model(samples[::2])
            plain_scores, changed_scores = _score_samples(model, samples[1::2])
            return VersionReference(camera, kind, height, model, plain_scores, changed_scores)

        # Score each fold by a model of the other folds.
        num_folds = min(NUM_FOLDS, len(samples))
        plain_scores = []
        changed_scores = {version: [] for version in list(samples[0].features)[1:]}
        for fold in range(num_folds):
            others = [sample for n, sample in enumerate(samples) if n % num_folds != fold]
            plain, changed = _score_samples(_fit_version_model(others), samples[fold::num_folds])
            plain_scores += plain
            for version, scores in changed.items():
                changed_scores[version] += scores
        model = _fit_version_model(samples)
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


def _read_version_sample(
    episode: RecordedEpisode, camera: str, kind: str, other_cameras: Sequence[str], height: int
) -> _VersionSample:
    """Read a training episode, its pictures changed to every version; "plain" is the first one."""
    transforms = SHAPE_VERSIONS if kind == "shape" else COLOR_VERSIONS
    plain_pictures = _get_resized_pictures(episode, camera, height)
    features = {}
    for version, transform in transforms.items():
        pictures = change_content(plain_pictures, episode.pictures[camera], transform)
        features[version] = _extract_features(kind, pictures)
    for other_camera in other_cameras:
        pictures = _get_resized_pictures(episode, other_camera, height)
        features[f"{EXCHANGED}{other_camera}"] = _extract_features(kind, pictures)
    return _VersionSample(_extract_state_features(episode), features)


def _fit_version_model(samples: Sequence[_VersionSample]) -> _VersionModel:
    """Fit a model to training episodes."""
    states = np.concatenate([sample.states for sample in samples])
    features = {}
    for version in samples[0].features:
        features[version] = np.concatenate([sample.features[version] for sample in samples])
    return _VersionModel.fit(states, features)


def _score_samples(
    model: _VersionModel, samples: Sequence[_VersionSample]
) -> tuple[list[dict[str, float]], dict[str, list[dict[str, float]]]]:
    """Score training episodes, as they are and changed to each version but the first, "plain".

    Returns:
        The scores of each episode (version → log likelihood); and version → the scores of each
        episode that is changed to this version, which are those of "plain" and of the version.
    """
    versions = list(samples[0].features)
    plain_scores = []
    changed_scores: dict[str, list[dict[str, float]]] = {name: [] for name in versions[1:]}
    for states, features in samples:
        plain_scores.append(model.compute_mean_log_likelihoods(states, features["plain"], versions))
        for version, scores in changed_scores.items():
            pair = ("plain", version)
            scores.append(model.compute_mean_log_likelihoods(states, features[version], pair))
    return plain_scores, changed_scores


def _get_resized_pictures(episode: RecordedEpisode, camera: str, height: int) -> Array:
    """Return the small pictures [T, height, w, 3] of a camera as float32."""
    pictures = episode.pictures[camera].small.astype(np.float32)
    if pictures.shape[1] == height:
        return pictures
    return resize(pictures, PICTURE_WIDTH_PX, height)


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
