"""Does a policy that goes on from given actions make up for what is wrong in them?

    python -m experiments.committed_prefix_error POLICY EPISODES [--delay 1]

For policies trained with `--set committed=N`. Steps of recorded episodes are asked about twice, with the same
noise: given the next actions as they were demonstrated, and given the last of them with its translation off
by a few millimetres at random. Printed is how much of that the next action takes back (1 is all of it), by
least squares.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from spear.cli import run_reporting_errors
from spear.data.readers.formats import read_episodes
from spear.evaluate.open_loop import build_observations
from spear.policy import Spear1Policy

OFF, BATCH = 0.008, 64
"""Standard deviation of each component, m; observations that are answered together."""


def main(
    policy: Positional[str], episodes: Positional[Path], delay: int = 1, most: int = 24
) -> None:
    """Measure, and print one line.

    Args:
        policy: a folder. episodes: recorded demonstrations. delay: actions that are given.
        most: episodes looked at.
    """
    torch.set_num_threads(1)
    model = Spear1Policy.load(policy)
    rng = np.random.default_rng(0)
    asked: list[dict[str, Any]] = []
    errors = []
    for episode in islice(read_episodes(episodes), most):
        assert episode.action is not None
        looks = list(enumerate(build_observations(episode, model.image_sizes)))
        for step, seen in looks[2 : -model.model.config.horizon + 1 : 4]:
            given = np.array(episode.action[step : step + delay], np.float32)
            errors.append(rng.normal(0, OFF, 3))
            wrong = given.copy()
            wrong[-1, :3] += errors[-1]
            asked += [{**seen, "seed": 1, "committed": rows} for rows in (given, wrong)]
    answers = [
        a for i in range(0, len(asked), BATCH) for a in model.infer_batch(asked[i : i + BATCH])
    ]
    following = np.stack([np.asarray(answer["actions"])[delay, :3] for answer in answers])
    change, error = following[1::2] - following[::2], np.stack(errors)
    share = -(change * error).sum() / (error**2).sum()
    print(
        f"{policy}, {delay} given: the next action takes back {share:.2f} of the error, n = {len(error)}"
    )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
