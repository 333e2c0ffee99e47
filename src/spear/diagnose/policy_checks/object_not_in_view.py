"""An object of the instruction is not in view."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import show_pictures
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.odds import PRIOR
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.picture_repair import CAMERA, choose_picture_repair
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.sight import are_names_missed, list_object_names
from spear.errors import suppress_notices
from spear.evaluate.vqa.calibration import Trust
from spear.policy import VlmBundle

# How often the model misses some object of an episode if one of them is out of view in most
# episodes: nearly always, but in some episodes it may be in view.
EXPECTED_MISSED_SHARE = 0.9
MAX_LISTED_EPISODES = 4  # in the evidence


class ObjectNotInViewCheck(RolloutCheck):
    """Asks the policy's SPEAR-VLM where the objects of the instructions are."""

    fault = "object-not-in-view"
    title = "an object of the instruction is not in view"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations", "policy"})

    def examine(self, case: Case) -> Result:
        assert isinstance(case, PolicyCase)
        reason = _explain_unable(case)
        if reason is not None:
            return Doubt(reason)
        names_by_episode = _list_judged_names_by_episode(case)
        if not names_by_episode:
            return Doubt("the policy's SPEAR-VLM knows no object of the instructions")

        # Which objects of each episode does the model see in no picture?
        store = _get_rollout(case)
        # A fault of the camera is named by its own check. It must not hide what is in view.
        repair = choose_picture_repair(case)
        missed_by_episode = {}
        for index, names in names_by_episode.items():
            episodes = [(store, index)] * len(names)
            with suppress_notices():
                is_missed = are_names_missed(_get_vlm(case), names, episodes, repair)
            missed_by_episode[index] = [
                name for name, missed in zip(names, is_missed, strict=True) if missed
            ]
        log_odds = _compute_log_odds(case, names_by_episode, missed_by_episode)
        num_missed = sum(map(bool, missed_by_episode.values()))
        if log_odds <= 0:
            return None
        descriptions = []
        for index, missed_names in missed_by_episode.items():
            if missed_names:
                descriptions.append(f"{' and '.join(missed_names)} (episode {index})")
        return Finding(
            confidence=round(float(min(1 / (1 + np.exp(-log_odds)), 0.95)), 3),
            evidence=(
                f"in {num_missed} of {len(missed_by_episode)} episodes, the policy's SPEAR-VLM "
                f"sees no {', no '.join(descriptions[:MAX_LISTED_EPISODES])}; in training it "
                f"misses {case.sight.missed_share:.0%} of the objects"
            ),
            cure="put the objects of the instruction where the camera sees them",
            file="the scene in front of the robot, and the direction of its camera",
            figure=show_pictures(case, CAMERA),
            camera=CAMERA,
        )


def _explain_unable(case: PolicyCase) -> str | None:
    """Return why the policy cannot say what is in view; None if it can."""
    folder = case.get_policy().folder
    trust = Trust.load(folder) if folder else None
    if trust is None or not trust.tells_absent:
        return (
            "nothing shows that the policy's SPEAR-VLM tells absent objects "
            "(spear evaluate vqa --calibrate)"
        )
    if all(CAMERA not in episode.pictures for episode in case.rollout):
        return f"the rollout has no camera {CAMERA}"
    return None


def _get_rollout(case: PolicyCase) -> EpisodeStore:
    assert case.rollout_store is not None
    return case.rollout_store


def _get_vlm(case: PolicyCase) -> VlmBundle:
    """Return the SPEAR-VLM inside the policy."""
    policy = case.get_policy()
    return VlmBundle(policy.model.vlm, policy.processor)


def _list_judged_names_by_episode(case: PolicyCase) -> dict[int, list[str]]:
    """List each episode's names of objects that the model sees in training, by its index."""
    store = _get_rollout(case)
    first_index = len(store) - len(case.rollout)  # the newest episodes are looked at
    names_by_episode = {}
    all_names = []
    for number, episode in enumerate(case.rollout):
        if CAMERA in episode.pictures:
            names = list_object_names(episode.instruction)
            names_by_episode[first_index + number] = names
            all_names += names
    with suppress_notices():
        case.sight.measure(_get_vlm(case), case.get_training(), all_names)
    judged = {}
    for index, names in names_by_episode.items():
        judged_names = [name for name in names if case.sight.can_judge(name)]
        if judged_names:
            judged[index] = judged_names
    return judged


def _compute_log_odds(
    case: PolicyCase,
    names_by_episode: dict[int, list[str]],
    missed_by_episode: dict[int, list[str]],
) -> float:
    """Compute the log odds of an object out of view in most episodes, over none in any."""
    log_odds = float(np.log(PRIOR))
    for index, names_of_episode in names_by_episode.items():
        # How often the model misses at least one of these objects if all of them are in view.
        usual_share = 1 - (1 - case.sight.missed_share) ** len(names_of_episode)
        if missed_by_episode[index]:
            log_odds += np.log(EXPECTED_MISSED_SHARE / usual_share)
        else:
            log_odds += np.log((1 - EXPECTED_MISSED_SHARE) / (1 - usual_share))
    return float(log_odds)
