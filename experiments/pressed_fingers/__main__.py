"""Why grasps fail low over the table: failed episodes are run again, and steps are counted at which the
policy says "close", but the fingers, pressed on the table, stay open.

    spear evaluate --policy nano --scenes 200 --out runs/a
    python -m experiments.pressed_fingers runs/a --policy nano --family spoon_on_towel

Each episode is run alone, so rounding lets some of them succeed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from spear.cli import run_reporting_errors
from spear.evaluate import results
from spear.evaluate.agents import Agent, load_agent
from spear.sim.env import MAX_STEPS, TabletopEnv

LOW = 0.0105
"""Height of the middle of the finger tips below which they press on the table, m (the expert: 12 mm)."""
MANY = 10
"""Steps."""


def pressed(agent: Agent, family: str, seed: int) -> tuple[bool, int]:
    """Whether an episode succeeds, and at how many of its steps the fingers were held open."""
    sizes = agent.image_sizes
    env = TabletopEnv(family, sizes["external"], sizes["wrist"])
    seen, info = env.reset(seed=seed)
    count = 0
    while env.steps < MAX_STEPS and not info["success"]:
        action = agent.act([env], [seen])[0][0]
        low = env.world.servo.measure_pose()[0][2] < LOW
        seen, *_, info = env.step(action)
        count += bool(low and action[7] < 0.5 and env.world.servo.measure_opening() > 0.9)
    return bool(info["success"]), count


def main(
    folders: Positional[tuple[Path, ...]], policy: str = "nano", family: str = "spoon_on_towel"
) -> None:
    """Prints each failed episode of these evaluations, and how many were held open for long."""
    agent = load_agent(policy)
    outcomes = [o for folder in folders for o in results.load_results(folder).outcomes]
    failed = [o.seed for o in outcomes if o.family == family and not o.success]
    again = [pressed(agent, family, seed) for seed in failed]
    for seed, (success, count) in zip(failed, again, strict=True):
        print(f"scene {seed}: {'succeeds' if success else 'fails'}, held open at {count} steps")
    lost = [count for success, count in again if not success]
    stuck = sum(count >= MANY for count in lost)
    print(
        f"{len(failed)} failed, {len(lost)} fail again, {stuck} held open for {MANY} steps or more"
    )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
