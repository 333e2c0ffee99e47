"""Does the SPEAR-VLM inside a policy see the objects of an instruction?

The model points at each object, and then names what is at that point. If it gives another name in
every picture of an episode that is tried, the object is *missed*. How often the model misses an
object that is in view is measured on training episodes, because their tasks were done.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.picture_repair import CAMERA, NO_REPAIR, PictureRepair
from spear.evaluate.vqa.ask import point_at_objects_and_name_them
from spear.labels.questions.templates import can_be_called
from spear.policy import VlmBundle
from spear.types import Array
from spear.util.images import decode_image

PICTURE_TIMES = (0.0, 0.25, 0.5)  # of the pictures of an episode that are tried, as shares of it
EPISODES_PER_NAME = 6  # training episodes whose instruction has the name
MIN_EPISODES_PER_NAME = 3  # with fewer, nothing is known about the name
MAX_MISSED_SHARE = 0.2  # names that the model misses more often in training are not judged

_DETERMINERS = {"a", "an", "another", "his", "its", "my", "some", "that", "the", "this", "your"}
# Words after which the name of an object has ended.
_ENDS = {
    *("above", "across", "against", "and", "around", "at", "away", "before", "behind", "belongs"),
    *("below", "beside", "between", "by", "carefully", "down", "for", "from", "gently", "goes"),
    *("in", "inside", "into", "is", "it", "left", "near", "next", "of", "off", "on", "onto", "or"),
    *("out", "over", "please", "right", "should", "then", "through", "to", "toward", "towards"),
    *("under", "up", "upside", "using", "which", "with", "within"),
}


def list_object_names(instruction: str) -> list[str]:
    """List the objects that an instruction names: what follows its articles.

    >>> list_object_names("Pick up the red block and put it on top of the green block.")
    ['red block', 'green block']
    """
    names: list[str] = []
    name: list[str] | None = None  # the words of the present name; None outside of a name
    for word in [*re.findall(r"[\w'-]+", instruction.lower()), "."]:
        is_end = word == "." or word in _DETERMINERS or word in _ENDS
        if is_end and name:
            names.append(" ".join(name))
        if word in _DETERMINERS:
            name = []
        elif is_end:
            name = None
        elif name is not None:
            name.append(word)
    return list(dict.fromkeys(names))


def are_names_missed(
    model: VlmBundle,
    names: Sequence[str],
    episode_of_each: Sequence[tuple[EpisodeStore, int]],
    repair: PictureRepair = NO_REPAIR,
) -> list[bool]:
    """Return whether each name is that of an object that a model sees in no picture of its episode.

    Args:
        model: the SPEAR-VLM.
        names: names of objects.
        episode_of_each: store and index of the episode of each name.
        repair: what is undone in the pictures first.
    """
    is_missed = [True] * len(names)
    for time_share in PICTURE_TIMES:
        rows = [row for row, missed in enumerate(is_missed) if missed]
        images = [_read_picture(*episode_of_each[row], time_share, repair) for row in rows]
        tried_names = [names[row] for row in rows]
        seen_names = point_at_objects_and_name_them(model, images, tried_names, CAMERA)
        for row, seen_name in zip(rows, seen_names, strict=True):
            name = names[row]
            is_missed[row] = not can_be_called(seen_name, name) and not can_be_called(
                name, seen_name
            )
    return is_missed


def _read_picture(
    store: EpisodeStore, index: int, time_share: float, repair: PictureRepair
) -> Array:
    """Read the picture at a time of an episode, given as a share of its length."""
    step = int(time_share * (int(store.lengths[index]) - 1))
    encoded = store.image(index, step, repair.camera)
    assert encoded is not None  # the callers choose episodes with this camera
    return repair.apply(decode_image(encoded, f"{store.source(index)} step {step}"))


@dataclass
class TrainingSight:
    """How often a model misses objects in training episodes; each name is tried once.

    missed  name → whether the model misses it in each of some training episodes.
    """

    missed: dict[str, list[bool]] = field(default_factory=dict)

    def record_misses(self, model: VlmBundle, training: EpisodeStore, names: Sequence[str]) -> None:
        """Try those of some names that were not tried yet, and add where the model misses them."""
        new_names = [name for name in dict.fromkeys(names) if name not in self.missed]
        if not new_names:
            return
        episodes_by_name = _find_episodes(training, new_names)
        episodes = []
        tried_names = []
        for name, indices in episodes_by_name.items():
            episodes += [(training, index) for index in indices]
            tried_names += [name] * len(indices)
            self.missed[name] = []
        if not episodes:
            return
        is_missed = are_names_missed(model, tried_names, episodes)
        for name, missed in zip(tried_names, is_missed, strict=True):
            self.missed[name].append(missed)

    def is_mostly_seen(self, object_name: str) -> bool:
        """Return whether the model mostly sees the objects of a tried name in training."""
        missed = self.missed[object_name]
        is_known = len(missed) >= MIN_EPISODES_PER_NAME
        return is_known and float(np.mean(missed)) <= MAX_MISSED_SHARE

    @property
    def missed_share(self) -> float:
        """How often the model misses an object in view whose name it knows.

        One missed and one seen object are added to the measured ones, so that the share is neither
        0 nor 1.
        """
        is_missed: list[bool] = []
        for name, results in self.missed.items():
            if self.is_mostly_seen(name):
                is_missed += results
        return (sum(is_missed) + 1) / (len(is_missed) + 2)


def _find_episodes(training: EpisodeStore, names: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Find training episodes for each name, spread over the store."""
    indices_by_name: dict[str, list[int]] = {name: [] for name in names}
    for index in range(len(training)):
        if training.image(index, 0, CAMERA) is None:
            continue
        for name in list_object_names(training.without_images(index).instruction):
            if name in indices_by_name:
                indices_by_name[name].append(index)
    chosen = {}
    for name, indices in indices_by_name.items():
        count = min(len(indices), EPISODES_PER_NAME)
        chosen[name] = [indices[int(i)] for i in np.linspace(0, len(indices) - 1, count)]
    return chosen
