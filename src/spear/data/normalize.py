"""Normalization of actions and states, with statistics over the whole mixture of datasets.

Each axis of translations and of positions is shifted by an offset and divided by a scale. The paper
computes both from quantiles over the whole mixture, not per dataset. The modes "minmax" and
"meanstd" are the paper's ablations; "bounds" divides translations by lengths that the user gives
(our choice, for policies of other projects). If the policy measures actions from the observed pose
(`spear.data.action_reference`), later actions of a chunk are longer than earlier ones, so each
action of the chunk has its own offset and scale. Rotations stay unit quaternions, and gripper
openings 0 … 1 become -1 … 1. Tensors may have any leading dimensions, device and floating type.

The quantiles come from sketches (`QuantileSketch`), which summarize all numbers of one axis of a
dataset. A mixture's datasets count with their sampling weights, called shares when they sum to 1.
"""

import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import ConfigDict, PositiveFloat
from torch import Tensor

from spear.data.action_reference import (
    convert_motions_to_steps,
    convert_steps_to_motions_from_observed,
)
from spear.data.actions import HORIZON, extract_chunk_up_to_unknown
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.stats import QuantileSketch, compute_weighted_quantile
from spear.errors import SpearError, check_known, suppress_notices
from spear.geometry import quat_to_6d
from spear.types import Action, ActionReference, Array
from spear.util.files import read_json_as, write_bytes, write_text

Mode = Literal["quantile", "minmax", "meanstd", "bounds"]
Triple = tuple[float, float, float]  # of the axes x, y, z
Scale = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Triples = Triple | tuple[Triple, ...]  # of all actions of a chunk, or of each of them

MIN_TRANSLATION_SCALE_M = 1e-3  # 1 mm in a step of 0.2 s (our choice)
MIN_POSITION_SCALE_M = 1e-2  # 1 cm (our choice)
MIN_SCALES = (MIN_TRANSLATION_SCALE_M,) * 3 + (MIN_POSITION_SCALE_M,) * 3
"""The smallest scale of each axis. Dividing an axis that hardly varies by its tiny scale would
amplify its noise. With this scale, predicted motions along such an axis stay small as well."""
LOW_QUANTILE = 0.01  # is normalized to -1
HIGH_QUANTILE = 0.99  # is normalized to 1
STATE_VECTOR_DIM = 10  # position 3, first two columns of the rotation matrix 6, gripper 1
NUM_AXES = 6  # translation x, y, z and position x, y, z
SKETCHES_FILE = "sketches.npz"
"""The file of a prepared dataset with the quantile sketches of its translations and positions."""


@dataclass(frozen=True)
class Normalizer:
    """Normalization statistics: normalized = (meters - offset) / scale, per axis (base frame).

    Values outside the fitted range are not clipped, so that the inverse is exact.

    Attributes:
        mode: How offset and scale were fitted (see `fit`).
        translation_offset: Offset of the translations of steps, m.
        translation_scale: Scale of the translations of steps, m.
        position_offset: Offset of end-effector positions, m.
        position_scale: Scale of end-effector positions, m.
        samples: The number of steps whose numbers were used.
        frames: The name of a dataset or robot → the version of the frames (`spear.data.frames`) of
            the data to which the statistics belong. None if they were made before versions were
            recorded.
        datasets: The name of each dataset → its own normalizer, in the order of the mixture, for
            the ablation in which datasets are normalized separately (see `resolve_for_dataset`).
            Otherwise empty.
        action_reference: From which pose normalized actions are measured. Actions in meters are
            always steps, measured from the pose before.
        chunk_offset: Offset of the translations of a chunk's H actions, m, if these are measured
            from the observed pose; otherwise empty.
        chunk_scale: Their scale, m.
    """

    mode: Mode
    translation_offset: Triple
    translation_scale: Scale
    position_offset: Triple
    position_scale: Scale
    samples: int
    datasets: "Mapping[str, Normalizer]" = field(default_factory=dict)
    frames: Mapping[str, int] | None = None
    action_reference: ActionReference = "previous"
    chunk_offset: tuple[Triple, ...] = ()
    chunk_scale: tuple[Scale, ...] = ()
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @staticmethod
    def fit_per_dataset(
        stores: Sequence[WeightedStore],
        mode: Mode = "quantile",
        bounds_m: Triple | None = None,
        action_reference: ActionReference = "previous",
        horizon: int = HORIZON,
    ) -> "Normalizer":
        """Fit statistics over a mixture, and separate statistics of each dataset.

        Args:
            stores: The datasets, as in `Mixture`.
            mode: See `fit`, also for the other arguments.
            bounds_m: See `fit`.
            action_reference: See `fit`.
            horizon: See `fit`.
        """
        names = [dataset.name for dataset in stores]
        if len(set(names)) < len(names):
            raise SpearError(
                f"several datasets have the same name ({', '.join(names)}). Give each folder "
                "another name."
            )

        def fit(weighted_stores: Sequence[tuple[EpisodeStore, float]]) -> Normalizer:
            return Normalizer.fit(weighted_stores, mode, bounds_m, action_reference, horizon)

        over_mixture = fit([(dataset.store, dataset.weight) for dataset in stores])
        # The weight of a single dataset has no effect, so any weight will do.
        per_dataset = {dataset.name: fit([(dataset.store, 1.0)]) for dataset in stores}
        return replace(over_mixture, datasets=per_dataset)

    def resolve_for_dataset(self, dataset: str | None) -> "Normalizer":
        """Get the normalizer of a dataset.

        That is this normalizer, unless datasets have their own ones.

        Args:
            dataset: The dataset's name. It may be None if there is only one normalizer to choose.

        Raises:
            SpearError: If datasets have their own normalizers, and `dataset` is none of them, or is
                None although there are several.
        """
        if not self.datasets:
            return self
        if dataset is None and len(self.datasets) == 1:
            return next(iter(self.datasets.values()))
        if dataset is None:
            raise SpearError(
                "the policy has normalization statistics of each dataset. Say with --norm-stats "
                f"which one the robot is like ({', '.join(self.datasets)})."
            )
        check_known("dataset", self.datasets, dataset)
        return self.datasets[dataset]

    @staticmethod
    def fit(
        stores: Iterable[tuple[EpisodeStore, float]],
        mode: Mode = "quantile",
        bounds_m: Triple | None = None,
        action_reference: ActionReference = "previous",
        horizon: int = HORIZON,
    ) -> "Normalizer":
        """Fit statistics over a mixture.

        Every dataset counts with its weight, whatever its size. Masked steps do not count. Each
        store is read once, in bounded memory. Percentiles are exact for up to 16,384 steps per
        dataset. Beyond, their error in rank is at most 0.1 % (`QuantileSketch`).

        Args:
            stores: (store, sampling weight) of each dataset, as in `Mixture`.
            mode: "quantile" maps the 1st and 99th percentile to -1 and 1. "minmax" maps the
                smallest and the largest value to -1 and 1. "meanstd" gives zero mean and unit
                deviation. "bounds" maps translations of ±`bounds_m` to ±1; positions are
                normalized as in "quantile".
            bounds_m: The length of a step that becomes 1, per axis, m; only for the mode "bounds".
                Action k of a chunk may be k times as long if it is measured from the observed pose.
            action_reference: From which pose normalized actions are measured.
            horizon: H, the number of actions of a chunk.

        Raises:
            SpearError: If no store has a valid action, or if `bounds_m` is missing.
        """
        check_known("normalization", get_args(Mode), mode)
        if mode == "bounds" and bounds_m is None:
            raise SpearError(
                "normalization bounds needs the length of a step that becomes 1. Add "
                "bounds_m=[0.05,0.05,0.05], in meters per axis."
            )
        step_sketches = _WeightedSketches()  # of single steps
        chunk_sketches = _WeightedSketches()  # of chunks, measured from the observed pose
        for store, weight in stores:
            step_sketches.add(_load_or_make_sketches(store), weight)
            if action_reference == "observed" and mode != "bounds":
                chunk_sketches.add(_make_chunk_sketches(store, horizon), weight)
        if not step_sketches.sketches:
            raise SpearError(
                "the stores contain no valid action, so no normalization statistics can be "
                "fitted. Check their masks and lengths."
            )

        offsets, scales = step_sketches.fit_offsets_and_scales(mode, MIN_SCALES)
        if bounds_m is not None:
            offsets[:3] = (0.0, 0.0, 0.0)
            scales[:3] = bounds_m
        normalizer = Normalizer(
            mode=mode,
            translation_offset=_to_triple(offsets[:3]),
            translation_scale=_to_triple(scales[:3]),
            position_offset=_to_triple(offsets[3:]),
            position_scale=_to_triple(scales[3:]),
            samples=step_sketches.num_steps,
        )
        if action_reference == "previous":
            return normalizer

        chunk_offset: list[Triple] = []
        chunk_scale: list[Triple] = []
        if bounds_m is not None:
            for num_steps in range(1, horizon + 1):  # from the observed pose to each action's end
                chunk_offset.append((0.0, 0.0, 0.0))
                chunk_scale.append(_to_triple([num_steps * bound for bound in bounds_m]))
        else:
            min_scales = (MIN_TRANSLATION_SCALE_M,) * (3 * horizon)
            motion_offsets, motion_scales = chunk_sketches.fit_offsets_and_scales(mode, min_scales)
            for first_axis in range(0, 3 * horizon, 3):
                axes = slice(first_axis, first_axis + 3)  # x, y and z of one action of the chunk
                chunk_offset.append(_to_triple(motion_offsets[axes]))
                chunk_scale.append(_to_triple(motion_scales[axes]))
        return replace(
            normalizer,
            action_reference=action_reference,
            chunk_offset=tuple(chunk_offset),
            chunk_scale=tuple(chunk_scale),
        )

    def normalize_action(self, chunk: Action) -> Action:
        """Normalize a chunk: translation and gripper opening to about -1 … 1, but no rotation.

        Args:
            chunk: Chunks [..., H, ·] of steps, in meters.

        Returns:
            Chunks [..., H, ·], measured from the pose that `action_reference` says.
        """
        if self.action_reference == "observed":
            chunk = convert_steps_to_motions_from_observed(chunk)
        offset, scale = self._get_translation_offset_and_scale()
        translation = _normalize(chunk.translation, offset, scale)
        return Action(translation, chunk.rotation, chunk.gripper * 2 - 1)

    def unnormalize_action(self, chunk: Action) -> Action:
        """Invert `normalize_action`: steps in meters, gripper opening in 0 … 1."""
        offset, scale = self._get_translation_offset_and_scale()
        normalized = chunk.translation
        translation_m = normalized * normalized.new_tensor(scale) + normalized.new_tensor(offset)
        chunk = Action(translation_m, chunk.rotation, (chunk.gripper + 1) / 2)
        if self.action_reference == "observed":
            chunk = convert_motions_to_steps(chunk)
        return chunk

    def _get_translation_offset_and_scale(self) -> tuple[Triples, Triples]:
        """Return offset and scale of normalized translations: of all actions, or of each one."""
        if self.action_reference == "observed":
            return self.chunk_offset, self.chunk_scale
        return self.translation_offset, self.translation_scale

    def encode_state(self, position: Tensor, rotation: Tensor, gripper: Tensor) -> Tensor:
        """Encode the state as the policy sees it.

        The rotation becomes the first two columns of its matrix. These six numbers follow every
        rotation without a jump, whereas the sign of a quaternion jumps somewhere.

        Args:
            position: [..., 3] end-effector position, m, base frame.
            rotation: [..., 4] end-effector orientation, unit quaternion.
            gripper: [..., 1] opening in 0 … 1.

        Returns:
            [..., 10]: normalized position 3, rotation 6, gripper 1 in -1 … 1.
        """
        normalized_position = _normalize(position, self.position_offset, self.position_scale)
        return torch.cat([normalized_position, quat_to_6d(rotation), gripper * 2 - 1], dim=-1)

    def save(self, path: str | Path) -> None:
        """Write the statistics as JSON. The file is complete or not there at all."""
        fields = asdict(self)
        # The fields of this normalizer, then those of each dataset's own one
        for normalizer_fields in (fields, *fields["datasets"].values()):
            # Unknown versions of frames are written by leaving the key out.
            if normalizer_fields["frames"] is None:
                del normalizer_fields["frames"]
            # Statistics of steps are written without the keys about chunks, which earlier versions
            # of this program did not have. So the file has the same bytes as theirs.
            if normalizer_fields["action_reference"] == "previous":
                for key in ("action_reference", "chunk_offset", "chunk_scale"):
                    del normalizer_fields[key]
        write_text(Path(path), json.dumps(fields, indent=2))

    @staticmethod
    def load(path: str | Path) -> "Normalizer":
        """Read statistics that `save` wrote. Raises SpearError if the file is missing or bad."""
        advice = "take the file beside the weights"
        return read_json_as(Normalizer, Path(path), advice, "contains no normalization statistics")


@dataclass(frozen=True)
class _WeightedSketches:
    """The sketches of a mixture's datasets, with the sampling weights of these datasets.

    Attributes:
        sketches: The sketches of each dataset, one per axis.
        weights: The sampling weight of each dataset.
    """

    sketches: list[list[QuantileSketch]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, sketches: list[QuantileSketch], weight: float) -> None:
        """Add a dataset, unless it has no valid action."""
        if sketches[0].count:
            self.sketches.append(sketches)
            self.weights.append(weight)

    @property
    def num_steps(self) -> int:
        """The number of valid steps of all datasets."""
        return sum(sketches[0].count for sketches in self.sketches)

    def fit_offsets_and_scales(
        self, mode: Mode, min_scales: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """Fit offset and scale of each axis, m.

        Args:
            mode: See `Normalizer.fit`.
            min_scales: The smallest scale of each axis, m.

        Returns:
            The offsets of all axes, and their scales.
        """
        offsets: list[float] = []
        scales: list[float] = []
        for axis, min_scale in enumerate(min_scales):
            sketches: list[QuantileSketch] = []
            weights: list[float] = []
            for dataset_sketches, weight in zip(self.sketches, self.weights, strict=True):
                if dataset_sketches[axis].count:
                    sketches.append(dataset_sketches[axis])
                    weights.append(weight)
            if not sketches:  # all episodes are shorter than a chunk
                offsets.append(0.0)
                scales.append(min_scale)
                continue
            shares = np.array(weights) / sum(weights)
            offset, scale = _fit_offset_and_scale(sketches, shares, mode)
            offsets.append(offset)
            scales.append(max(scale, min_scale))
        return offsets, scales


def _to_triple(values: Sequence[float]) -> Triple:
    x, y, z = values
    return x, y, z


def make_and_write_sketches(store: EpisodeStore) -> None:
    """Make the sketches of a prepared dataset's demonstrations, and write them into its folder.

    Training reads this file instead of making the sketches from all episodes.
    """
    with suppress_notices():
        demonstrations = store.drop_failed_episodes()
    write_sketches(demonstrations, _make_sketches(demonstrations))


def write_sketches(store: EpisodeStore, sketches: Sequence[QuantileSketch]) -> None:
    """Write the six sketches of a store into its folder, with the fingerprint of its episodes.

    Args:
        store: The store.
        sketches: The sketches of translation x, y, z and position x, y, z.
    """
    # The key "of" has the fingerprint. The arrays of axis 0 have the keys "0 moments" and so on.
    arrays: dict[str, Any] = {"of": np.array(store.fingerprint_states_and_actions())}
    for axis, sketch in enumerate(sketches):
        for name, values in sketch.to_arrays().items():
            arrays[f"{axis} {name}"] = values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(store.path / SKETCHES_FILE, buffer.getvalue())


def _load_or_make_sketches(store: EpisodeStore) -> list[QuantileSketch]:
    """Get the six sketches of a store: from its file, or else by reading all its episodes."""
    file = store.path / SKETCHES_FILE
    # The file is about all demonstrations of the folder. It does not fit a selection of them.
    if store.is_complete and file.is_file():
        try:
            sketches = _load_sketches(file, store)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise SpearError(
                f"{file} cannot be read ({error}). Remove it; spear works without it."
            ) from error
        if sketches is not None:
            return sketches
    return _make_sketches(store)


def _load_sketches(file: Path, store: EpisodeStore) -> list[QuantileSketch] | None:
    """Load the sketches of a store from its file.

    Returns None if the file is of other episodes, because shards were added or removed since.
    """
    with np.load(file, allow_pickle=False) as arrays:
        # "of" is the fingerprint of the episodes (see `write_sketches`).
        if "of" not in arrays.files or str(arrays["of"]) != store.fingerprint_states_and_actions():
            return None

        sketches: list[QuantileSketch] = []
        for axis in range(NUM_AXES):
            prefix = f"{axis} "  # of the keys of the axis's arrays
            sketch_arrays = {
                name.removeprefix(prefix): arrays[name]
                for name in arrays.files
                if name.startswith(prefix)
            }
            sketches.append(QuantileSketch.from_arrays(sketch_arrays))
        return sketches


def _make_sketches(store: EpisodeStore) -> list[QuantileSketch]:
    """Make the six sketches of a store, of the steps whose action is known.

    They are of translation x, y, z and position x, y, z.
    """
    sketches = [QuantileSketch() for _ in range(NUM_AXES)]
    for index in range(len(store)):
        episode = store.without_images(index)
        assert episode.action is not None
        assert episode.action_mask is not None
        rows = np.concatenate([episode.action[:, :3], episode.position], axis=1)  # [T, 6]
        known_rows = rows[episode.action_mask]  # [num_known, 6]
        for sketch, axis_values in zip(sketches, known_rows.T, strict=True):
            sketch.add(axis_values)
    return sketches


def _make_chunk_sketches(store: EpisodeStore, horizon: int) -> list[QuantileSketch]:
    """Make sketches of the translations of chunks, measured from the observed pose.

    Returns:
        3 H sketches: x, y, z of the first action of each chunk, then of the second and so on.
        Actions that are unknown, or lie after an unknown one, do not count.
    """
    sketches = [QuantileSketch() for _ in range(3 * horizon)]
    for index in range(len(store)):
        episode = store.without_images(index)
        assert episode.action is not None
        assert episode.action_mask is not None
        chunks = []
        masks = []
        for step in range(len(episode)):
            chunk, is_target = extract_chunk_up_to_unknown(
                episode.action, episode.action_mask, step, horizon
            )
            chunks.append(chunk[:, :3].cumsum(axis=0))
            masks.append(is_target)
        motions = np.stack(chunks)  # [T, H, 3]
        is_target_of_step = np.stack(masks)  # [T, H]
        for action_index in range(horizon):  # of an action in its chunk
            is_target = is_target_of_step[:, action_index]  # [T]
            target_motions = motions[is_target, action_index]  # [num_targets, 3]
            for axis in range(3):
                sketches[3 * action_index + axis].add(target_motions[:, axis])
    return sketches


def _fit_offset_and_scale(
    sketches: Sequence[QuantileSketch], shares: Array, mode: Mode
) -> tuple[float, float]:
    """Fit offset and scale of one axis over the mixture.

    Args:
        sketches: The axis's sketch of each dataset.
        shares: [D] the share of each dataset, summing to 1.
        mode: See `Normalizer.fit`.

    Returns:
        Offset and scale, m.
    """
    if mode == "meanstd":
        return _compute_mean_and_deviation(sketches, shares)
    if mode == "minmax":
        low = min(sketch.low for sketch in sketches)
        high = max(sketch.high for sketch in sketches)
    else:
        low, high = _compute_low_and_high_quantile(sketches, shares)
    return (high + low) / 2, (high - low) / 2


def _compute_mean_and_deviation(
    sketches: Sequence[QuantileSketch], shares: Array
) -> tuple[float, float]:
    """Compute mean and standard deviation of one axis; see `_fit_offset_and_scale`."""
    weighted_means = [share * sketch.mean for sketch, share in zip(sketches, shares, strict=True)]
    mean = float(sum(weighted_means))
    # The variance within each dataset, and that of the datasets' means about the common mean.
    variance = 0.0
    for sketch, share in zip(sketches, shares, strict=True):
        variance += share * (sketch.variance + (sketch.mean - mean) ** 2)
    return mean, float(np.sqrt(variance))


def _compute_low_and_high_quantile(
    sketches: Sequence[QuantileSketch], shares: Array
) -> tuple[float, float]:
    """Compute the 1st and the 99th percentile of one axis; see `_fit_offset_and_scale`."""
    all_values: list[Array] = []
    all_weights: list[Array] = []
    for sketch, share in zip(sketches, shares, strict=True):
        values, counts = sketch.get_values_and_weights()
        all_values.append(values)
        all_weights.append(counts * share / sketch.count)  # sum to `share`
    values = np.concatenate(all_values)
    weights = np.concatenate(all_weights)
    low = compute_weighted_quantile(values, weights, LOW_QUANTILE)
    high = compute_weighted_quantile(values, weights, HIGH_QUANTILE)
    return low, high


def _normalize(meters: Tensor, offset: Triples, scale: Triples) -> Tensor:
    """Normalize translations or positions [..., 3], or chunks [..., H, 3] with H offsets."""
    return (meters - meters.new_tensor(offset)) / meters.new_tensor(scale)
