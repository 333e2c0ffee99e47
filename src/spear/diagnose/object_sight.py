"""Which objects of its instructions does the SPEAR-VLM inside a policy see in a rollout?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spear.checks.rollout.odds import PRIOR
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.picture_repair import PictureRepair
from spear.diagnose.sight import are_names_missed
from spear.errors import suppress_notices
from spear.policy import VlmBundle

# How often the model misses some object of an episode if one of them is out of view in most
# episodes: nearly always, but in some episodes it may be in view.
EXPECTED_MISSED_SHARE = 0.9


@dataclass(frozen=True)
class ObjectSight:
    """The objects of a rollout that a model sees in no picture of their episode.

    names   index of an episode → its objects.
    missed  index of an episode → those of them that the model does not see.
    missed_share  how often the model misses an object that is in view.
    """

    names: Mapping[int, Sequence[str]]
    missed: Mapping[int, Sequence[str]]
    missed_share: float

    @property
    def out_of_view_log_odds(self) -> float:
        """The log odds of an object out of view in most episodes, over none in any."""
        log_odds = float(np.log(PRIOR))
        for index, names_of_episode in self.names.items():
            # How often the model misses at least one of these objects if all of them are in view.
            usual_share = 1 - (1 - self.missed_share) ** len(names_of_episode)
            if self.missed[index]:
                log_odds += np.log(EXPECTED_MISSED_SHARE / usual_share)
            else:
                log_odds += np.log((1 - EXPECTED_MISSED_SHARE) / (1 - usual_share))
        return float(log_odds)

    @property
    def num_episodes_with_missed_objects(self) -> int:
        """The number of episodes of which the model misses at least one object."""
        return sum(map(bool, self.missed.values()))


def look_for_objects(
    model: VlmBundle,
    store: EpisodeStore,
    names: Mapping[int, Sequence[str]],
    missed_share: float,
    repair: PictureRepair,
) -> ObjectSight:
    """Ask a model for the objects of the episodes of a rollout.

    Args:
        model: the SPEAR-VLM.
        store: the rollout.
        names: index of an episode → its objects.
        missed_share: how often the model misses an object that is in view.
        repair: what is undone in the pictures first.
    """
    missed = {}
    for index, names_of_episode in names.items():
        episodes = [(store, index)] * len(names_of_episode)
        with suppress_notices():
            is_missed = are_names_missed(model, names_of_episode, episodes, repair)
        missed[index] = [
            name for name, miss in zip(names_of_episode, is_missed, strict=True) if miss
        ]
    return ObjectSight(names, missed, missed_share)
