"""What a set of labels holds, in numbers: pure data, ready for JSON, for a page or a dataset card."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.quality import BAR, QualityBar
from spear.labels.questions.generate import FAMILIES, Rounding, generate, why_not_asked
from spear.types import Array, LabeledImage, Question, Unit

SCORES = ("detection", "points", "visible", "edge", "planarity", "stability")
TOKEN_PAIRS = (4, 4)
"""Questions per image whose numbers show how 3D tokens are used, as when the tokens are fitted."""


class Bins(Rounding, Protocol):
    """3D tokens with their bins: `edges` [bins + 1]."""

    edges: Array

    @property
    def bins(self) -> int:
        """How many."""
        ...


@dataclass(frozen=True)
class Histogram:
    """How `n` numbers are spread: `counts` [k] of those within `edges` [k + 1], and their quantiles."""

    n: int
    edges: Sequence[float]
    counts: Sequence[int]
    p5: float
    median: float
    p95: float


@dataclass(frozen=True)
class Balance:
    """How questions spread over families and objects.

    questions  in all; images, of which `silent` gave none.
    families   family -> questions of it.
    objects    name -> questions about it.
    pairs      questions per image -> images with as many.
    """

    questions: int
    images: int
    silent: int
    families: Mapping[str, int]
    objects: Mapping[str, int]
    pairs: Mapping[str, int]


@dataclass(frozen=True)
class TokenUse:
    """How often each 3D token occurs in the answers.

    counts    per bin.
    unused    bins that never occur.
    outside   numbers beyond the first or last bin's edge.
    evenness  1 where all are used alike, 1 / bins where only one is: exp(entropy) / bins.
    """

    counts: Sequence[int]
    unused: int
    outside: int
    evenness: float


@dataclass(frozen=True)
class Statistics:
    """Of a set of labels, all in one unit.

    images, objects    how many; `boxed`, objects with a 3D box; `asked`, objects that 3D questions may be
                       about.
    unit               of distances and sizes.
    provenance         what made the labels ("detector: …") -> images.
    per_image          objects in an image -> images.
    names              name -> objects, most frequent first.
    distance           from the camera to the box's centre; size, the box's longest side; both of boxed
                       objects.
    scores             score -> its histogram, of objects that have it.
    reasons            why objects are not asked about -> objects (one may have several reasons).
    balance            of the questions that a pass over the labels asks.
    tokens             None without a tokenizer.
    """

    images: int
    objects: int
    boxed: int
    asked: int
    unit: Unit | None
    provenance: Mapping[str, int]
    per_image: Mapping[str, int]
    names: Mapping[str, int]
    distance: Histogram | None
    size: Histogram | None
    scores: Mapping[str, Histogram]
    reasons: Mapping[str, int]
    balance: Balance
    tokens: TokenUse | None

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists, numbers and strings."""
        return asdict(self)


def statistics(
    labels: Iterable[LabeledImage],
    coordinates: Bins | None = None,
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = FAMILIES,
    bar: QualityBar = BAR,
    seed: int = 0,
) -> Statistics:
    """Count what labels hold, in one pass that keeps no image.

    Args:
        labels: all in one unit.
        coordinates: 3D tokens (`spear.tokens.CoordinateTokenizer`) whose use is counted.
        pairs, families, bar: of the questions asked, see `questions.generate`.
        seed: of the questions; image i is asked with `numpy.random.default_rng((seed, i))`.

    Raises:
        SpearError: a label in another unit than the others, or than the 3D tokens.
    """
    totals: Counter[str] = Counter()
    per_image: Counter[str] = Counter()
    names: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    provenance: Counter[str] = Counter()
    distances, sizes, values = (array("d") for _ in range(3))  # a list would take four times the memory
    scores = {name: array("d") for name in SCORES}
    asked = _Asked(families)
    unit: Unit | None = None
    for index, label in enumerate(labels):
        unit = label.unit if unit is None else unit
        wanted = unit if coordinates is None else coordinates.unit
        if label.unit != wanted:
            raise SpearError(
                f"{label.source or 'label'}: in unit {label.unit!r}, not {wanted!r} as the others or the 3D tokens: "
                "give labels of one unit"
            )
        totals["images"] += 1
        per_image[str(len(label.objects))] += 1
        provenance.update(f"{role}: {name}" for role, name in label.provenance.items())
        why = why_not_asked(label, bar)
        for o, reason in zip(label.objects, why, strict=True):
            totals["objects"] += 1
            names[o.name] += 1
            reasons.update(reason)
            totals["asked"] += not reason
            for name in scores.keys() & o.scores.keys():
                scores[name].append(float(o.scores[name]))
            if o.box3d is not None:
                distances.append(float(np.linalg.norm(o.box3d.center)))
                sizes.append(float(o.box3d.size.max()))
        asked.add(generate(label, np.random.default_rng((seed, index)), pairs, families, bar))
        if coordinates is not None:
            rng = np.random.default_rng((seed, 1, index))
            values.extend(v for q in generate(label, rng, TOKEN_PAIRS, families, bar) for v in q.values)
    return Statistics(
        images=totals["images"],
        objects=totals["objects"],
        boxed=len(distances),
        asked=totals["asked"],
        unit=unit,
        provenance=dict(sorted(provenance.items())),
        per_image=dict(sorted(per_image.items(), key=lambda item: int(item[0]))),
        names=dict(names.most_common()),
        distance=histogram(distances),
        size=histogram(sizes),
        scores={name: h for name, values in scores.items() if (h := histogram(values)) is not None},
        reasons=dict(reasons.most_common()),
        balance=asked.balance(),
        tokens=None if coordinates is None else token_use(values, coordinates),
    )


def balance(
    labels: Iterable[LabeledImage],
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = FAMILIES,
    bar: QualityBar = BAR,
    seed: int = 0,
) -> Balance:
    """How the questions of one pass over labels spread; see `statistics` for the arguments."""
    asked = _Asked(families)
    for index, label in enumerate(labels):
        asked.add(generate(label, np.random.default_rng((seed, index)), pairs, families, bar))
    return asked.balance()


class _Asked:
    """Counts questions, image by image."""

    def __init__(self, families: Sequence[str]) -> None:
        self.families = Counter(dict.fromkeys(families, 0))
        self.objects: Counter[str] = Counter()
        self.pairs: Counter[int] = Counter()

    def add(self, questions: Sequence[Question]) -> None:
        """The questions of one image."""
        self.pairs[len(questions)] += 1
        for question in questions:
            self.families[question.family] += 1
            self.objects.update(question.objects)

    def balance(self) -> Balance:
        """The counts so far."""
        return Balance(
            questions=self.families.total(),
            images=self.pairs.total(),
            silent=self.pairs[0],
            families=dict(self.families),
            objects=dict(self.objects.most_common()),
            pairs={str(n): self.pairs[n] for n in sorted(self.pairs)},
        )


def histogram(values: Sequence[float], bins: int = 40) -> Histogram | None:
    """Of finite numbers, between the least and the largest; None of no numbers."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=bins)
    p5, median, p95 = np.percentile(values, [5, 50, 95]).tolist()
    return Histogram(len(values), edges.tolist(), counts.tolist(), p5, median, p95)


def token_use(values: Sequence[float], coordinates: Bins) -> TokenUse:
    """How often each bin holds one of `values`; those outside count for the first or the last."""
    low, high = float(coordinates.edges[0]), float(coordinates.edges[-1])
    ids = coordinates.encode(np.clip(np.asarray(values, np.float64), low, high))
    counts = np.bincount(np.asarray(ids), minlength=coordinates.bins)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return TokenUse(
        counts=counts.tolist(),
        unused=int((counts == 0).sum()),
        outside=sum(not low <= v <= high for v in values),
        evenness=float(np.exp(-(share * np.log(share)).sum()) / coordinates.bins) if len(share) else 0.0,
    )
