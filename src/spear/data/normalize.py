"""Normalised units: one scale for translations and one for positions, shared by the whole mixture.

The paper normalises translations by global quantiles over the whole mixture (not per dataset); "minmax" and
"meanstd" are its ablations. Rotations stay unit quaternions; gripper openings 0 … 1 become -1 … 1.
Works on torch tensors of any leading shape, on any device and in any floating type.
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

from spear.data.store.episode_store import EpisodeStore
from spear.data.store.stats import QuantileSketch, weighted_quantile
from spear.errors import SpearError, check_known, suppress_notices
from spear.geometry import quat_to_6d
from spear.types import Action, Array
from spear.util.files import read_json_as, write_bytes, write_text

Mode = Literal["quantile", "minmax", "meanstd"]
Triple = tuple[float, float, float]
Scale = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
MIN_SCALES = (1e-3,) * 3 + (1e-2,) * 3
"""Metres, of translations (in a step of 0.2 s) and positions. An axis that varies less is scaled as if it
varied by so much: its noise is not blown up, and what is predicted for it stays small (our choice)."""
STATE_VECTOR_DIM = 10
SKETCHES_FILE = "sketches.npz"
"""Of a prepared dataset: the quantiles of its translations and positions, taken when it was prepared."""


@dataclass(frozen=True)
class Normalizer:
    """normalised = (metres - offset) / scale, per axis (x, y, z; base frame).

    Values outside the fitted range are not clipped, so that the inverse is exact.
    `samples` is the number of steps it was fitted on. `datasets` is empty, or, for the ablation, has a
    normalizer of its own for each dataset, by name and in the order of the mixture (see `for_dataset`).
    """

    mode: Mode
    translation_offset: Triple
    translation_scale: Scale
    position_offset: Triple
    position_scale: Scale
    samples: int
    datasets: "Mapping[str, Normalizer]" = field(default_factory=dict)
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @staticmethod
    def fit_per_dataset(
        stores: Sequence[tuple[str, EpisodeStore, float]], mode: Mode = "quantile"
    ) -> "Normalizer":
        """Statistics over a mixture, and those of each dataset: (name, store, weight) as in `Mixture`."""
        names = [name for name, _, _ in stores]
        if len(set(names)) < len(names):
            raise SpearError(
                f"datasets of the same name: {', '.join(names)}: give each folder its own name"
            )
        whole = Normalizer.fit([(store, weight) for _, store, weight in stores], mode)
        return replace(whole, datasets={n: Normalizer.fit([(s, 1.0)], mode) for n, s, _ in stores})

    def for_dataset(self, dataset: str | None) -> "Normalizer":
        """The one to use for a dataset: this one, unless datasets have their own.

        Raises SpearError when they have and `dataset` is None (with more than one) or not among them.
        """
        if not self.datasets or (dataset is None and len(self.datasets) == 1):
            return next(iter(self.datasets.values()), self)
        if dataset is None:
            known = ", ".join(self.datasets)
            raise SpearError(
                f"normalised per dataset: say which one the robot is like (--dataset): {known}"
            )
        check_known("dataset", self.datasets, dataset)
        return self.datasets[dataset]

    @staticmethod
    def fit(stores: Iterable[tuple[EpisodeStore, float]], mode: Mode = "quantile") -> "Normalizer":
        """Statistics over a mixture: (store, weight) pairs, weights as in `Mixture`.

        "quantile": the 1st and 99th percentile become -1 and 1 · "minmax": the extremes do · "meanstd": zero
        mean, unit deviation. Every dataset counts with its weight, whatever its size (our choice); masked
        steps do not. One pass over each store in bounded memory: percentiles are exact for up to 16,384 steps
        per dataset, and within 0.1 % in rank beyond (`QuantileSketch`).
        """
        check_known("normalisation", get_args(Mode), mode)
        seen = [
            (columns, weight) for store, weight in stores if (columns := _sketch(store))[0].count
        ]
        if not seen:
            raise SpearError(
                "nothing to fit: no valid action in the stores; check their masks and lengths"
            )
        weights = [weight for _, weight in seen]
        share = np.array(weights) / sum(weights)
        axes = (_fit_axis([columns[i] for columns, _ in seen], share, mode) for i in range(6))
        offset, scale = zip(*axes, strict=True)
        scale = tuple(map(max, scale, MIN_SCALES))
        samples = sum(columns[0].count for columns, _ in seen)
        return Normalizer(mode, offset[:3], scale[:3], offset[3:], scale[3:], samples)

    def normalize_action(self, action: Action) -> Action:
        """Translation and gripper in -1 … 1; rotation as it is."""
        translation = _normalize(
            action.translation, self.translation_offset, self.translation_scale
        )
        return Action(translation, action.rotation, action.gripper * 2 - 1)

    def unnormalize_action(self, action: Action) -> Action:
        """The inverse of `normalize_action`: metres, opening 0 … 1."""
        like, offset, scale = action.translation, self.translation_offset, self.translation_scale
        metres = like * like.new_tensor(scale) + like.new_tensor(offset)
        return Action(metres, action.rotation, (action.gripper + 1) / 2)

    def state_vector(self, position: Tensor, rotation: Tensor, gripper: Tensor) -> Tensor:
        """What the policy sees of its own state, [..., 10].

        position [..., 3] m, rotation [..., 4], gripper [..., 1] opening -> normalised position 3, rotation 6
        (the first two columns of its matrix), gripper 1 in -1 … 1. Six numbers because they follow every
        rotation without the jump that a quaternion's sign makes somewhere: our choice.
        """
        where = _normalize(position, self.position_offset, self.position_scale)
        return torch.cat([where, quat_to_6d(rotation), gripper * 2 - 1], dim=-1)

    def save(self, path: str | Path) -> None:
        """Write as JSON; complete or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=2))

    @staticmethod
    def load(path: str | Path) -> "Normalizer":
        """Read what `save` wrote. Raises SpearError when the file is missing or is something else."""
        advice = "take the file beside the weights"
        return read_json_as(Normalizer, Path(path), advice, "cannot read normalisation statistics")


def save_sketches(store: EpisodeStore) -> None:
    """Write the sketches of a prepared dataset's demonstrations beside its index: none reads it all again."""
    with suppress_notices():
        learned = store.select_demonstrations()
    write_sketches(learned, _sketch(learned))


def write_sketches(store: EpisodeStore, sketches: Sequence[QuantileSketch]) -> None:
    """Write the six sketches of a store, and of which episodes they are."""
    arrays: dict[str, Any] = {"of": np.array(store.fingerprint())}
    for axis, sketch in enumerate(sketches):
        arrays |= {f"{axis} {name}": values for name, values in sketch.to_arrays().items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(store.path / SKETCHES_FILE, buffer.getvalue())


def _sketch(store: EpisodeStore) -> list[QuantileSketch]:
    """Six sketches of the known steps of a store, in one pass: translation x, y, z, position x, y, z."""
    file = store.path / SKETCHES_FILE
    if store.is_complete and file.is_file():
        try:
            with np.load(file, allow_pickle=False) as arrays:
                names = arrays.files
                if (
                    "of" in names and str(arrays["of"]) == store.fingerprint()
                ):  # no shards came, went or changed
                    parts = [
                        {n[2:]: arrays[n] for n in names if n.startswith(f"{i} ")} for i in range(6)
                    ]
                    return [QuantileSketch.from_arrays(part) for part in parts]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise SpearError(
                f"unreadable: {file}: {error}; remove it, and it is not needed"
            ) from error
    sketches = [QuantileSketch() for _ in range(6)]
    for index in range(len(store)):
        episode = store.without_images(index)
        assert episode.action is not None and episode.action_mask is not None  # a store has them
        rows = np.concatenate([episode.action[:, :3], episode.position], axis=1)
        for sketch, column in zip(sketches, rows[episode.action_mask].T, strict=True):
            sketch.add(column)
    return sketches


def _fit_axis(sketches: Sequence[QuantileSketch], share: Array, mode: Mode) -> tuple[float, float]:
    """Offset and scale of an axis, of which each dataset has a sketch and a share."""
    parts = list(zip(sketches, share, strict=True))
    if mode == "meanstd":
        offset = float(sum(w * s.mean for s, w in parts))
        scale = float(
            np.sqrt(sum(w * (s.squares / s.count + (s.mean - offset) ** 2) for s, w in parts))
        )
        return offset, scale
    if mode == "minmax":
        low, high = min(s.low for s in sketches), max(s.high for s in sketches)
    else:
        pairs = [s.weighted() for s in sketches]
        values = np.concatenate([v for v, _ in pairs])
        weights = [n * w / s.count for (_, n), (s, w) in zip(pairs, parts, strict=True)]
        low, high = (weighted_quantile(values, np.concatenate(weights), q) for q in (0.01, 0.99))
    return (high + low) / 2, (high - low) / 2


def _normalize(metres: Tensor, offset: Triple, scale: Triple) -> Tensor:
    return (metres - metres.new_tensor(offset)) / metres.new_tensor(scale)
