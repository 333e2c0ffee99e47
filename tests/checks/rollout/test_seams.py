"""Chunks that do not continue the ones before them jump."""

from dataclasses import replace

import numpy as np

from made_rollouts import MadeRobot, make_case
from spear.checks.rollout.case import Finding
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.seam_jumps import SeamJumpsCheck


def shift_chunks(episode: RecordedEpisode) -> RecordedEpisode:
    """Shift every chunk as a whole by a random displacement."""
    assert episode.served is not None
    chunks = episode.served.chunks.copy()
    chunks[:, :, :3] += np.random.default_rng(0).normal(0, 0.1, (len(chunks), 1, 3))
    return replace(episode, served=replace(episode.served, chunks=chunks))


def test_chunks_that_begin_elsewhere_jump() -> None:
    result = SeamJumpsCheck().examine(make_case(change=shift_chunks))

    assert isinstance(result, Finding)


def test_chunks_that_continue_each_other_do_not_jump() -> None:
    assert SeamJumpsCheck().examine(make_case(MadeRobot(num_executed=3))) is None


def go_back(episode: RecordedEpisode) -> RecordedEpisode:
    """Begin each chunk at the pose of two actions before its observation."""
    assert episode.served is not None
    chunks = episode.served.chunks[:, :, :3].astype(np.float64)
    position = [episode.position[0]]
    for step in range(len(episode) - 1):
        move = chunks[step, :4].sum(0)
        if step > 0:
            move = move - chunks[step - 1, 2:4].sum(0)
        position.append(position[-1] + move)
    return replace(episode, position=np.array(position))


def test_an_arm_that_goes_back_at_each_chunk_jumps() -> None:
    case = make_case(MadeRobot(num_executed=4), change=go_back)

    result = SeamJumpsCheck().examine(case)

    assert isinstance(result, Finding)
    assert "last 2 actions" in result.evidence
