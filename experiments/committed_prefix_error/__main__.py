"""Does a policy correct an error in the committed prefix with its next action?

    python -m experiments.committed_prefix_error POLICY EPISODES [--delay 1]

For policies trained with `--set committed=N`. Steps of recorded episodes are asked about twice with
the same noise: with the next actions as they were demonstrated, and with the last of them moved by
a few millimeters at random. Printed is the fraction of that error that the next action takes back
(1 is all of it), by least squares.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tyro.conf import Positional, arg

from spear.cli import run_reporting_errors
from spear.data.readers.formats import read_episodes
from spear.evaluate.open_loop import build_observations
from spear.policy import Spear1Policy
from spear.types import Array

ERROR_STD_M = 0.008  # of each component of the translation
BATCH_SIZE = 64  # observations that are answered together
FIRST_STEP = 2
STEP_STRIDE = 4  # every fourth step of an episode is asked about


def infer_in_batches(policy: Spear1Policy, observations: list[dict[str, Any]]) -> list[Array]:
    """The action chunk of each observation."""
    chunks = []
    for start in range(0, len(observations), BATCH_SIZE):
        for result in policy.infer_batch(observations[start : start + BATCH_SIZE]):
            chunks.append(np.asarray(result["actions"]))
    return chunks


def main(
    policy: Positional[str],
    episodes: Positional[Path],
    delay: int = 1,
    max_episodes: Annotated[int, arg(name="most")] = 24,
) -> None:
    """Measure, and print one line.

    Args:
        policy: a folder.
        episodes: recorded demonstrations.
        delay: length of the committed prefix.
        max_episodes: how many episodes are used.
    """
    torch.set_num_threads(1)
    model = Spear1Policy.load(policy)
    horizon = model.model.config.horizon
    rng = np.random.default_rng(0)
    observations: list[dict[str, Any]] = []  # right and wrong prefix in turn
    errors = []
    for episode in islice(read_episodes(episodes), max_episodes):
        assert episode.action is not None
        episode_observations = build_observations(episode, model.image_sizes)
        for step in range(FIRST_STEP, len(episode_observations) - horizon + 1, STEP_STRIDE):
            prefix = np.array(episode.action[step : step + delay], np.float32)
            error = rng.normal(0, ERROR_STD_M, 3)
            wrong_prefix = prefix.copy()
            wrong_prefix[-1, :3] += error
            errors.append(error)
            observation = {**episode_observations[step], "seed": 1}
            observations.append({**observation, "committed": prefix})
            observations.append({**observation, "committed": wrong_prefix})

    chunks = infer_in_batches(model, observations)
    next_translations = np.stack([chunk[delay, :3] for chunk in chunks])
    change = next_translations[1::2] - next_translations[::2]
    error_array = np.stack(errors)
    fraction = -(change * error_array).sum() / (error_array**2).sum()
    print(
        f"{policy}, {delay} given: the next action takes back {fraction:.2f} of the error, "
        f"n = {len(error_array)}"
    )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
