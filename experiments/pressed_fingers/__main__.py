"""Why grasps of low objects fail: the fingers, pressed on the table, cannot close.

    spear evaluate --policy nano --num-scenes 200 --out runs/a
    python -m experiments.pressed_fingers runs/a --policy nano --family spoon_on_towel

Failed episodes are run again. In each, the steps are counted at which the policy says "close", but
the fingers, pressed on the table, stay open. Each episode is run alone, so rounding lets some of
them succeed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from spear.cli import run_reporting_errors
from spear.evaluate.agents import Agent, load_agent
from spear.evaluate.results import load_results
from spear.sim.env import MAX_STEPS, TabletopEnv

PRESSED_HEIGHT_M = 0.0105  # below this finger tips press on the table (the expert stays at 12 mm)
MAX_CLOSE_COMMAND = 0.5  # of the gripper
MIN_OPEN_OPENING = 0.9
MIN_BLOCKED_STEPS = 10  # an episode counts as blocked for long


def count_blocked_steps(agent: Agent, family: str, seed: int) -> tuple[bool, int]:
    """Run an episode; returns whether it succeeds, and at how many steps the fingers stay open."""
    sizes = agent.image_sizes
    env = TabletopEnv(family, sizes)
    observation, info = env.reset(seed=seed)
    num_blocked = 0
    while env.steps < MAX_STEPS and not info["success"]:
        action = agent.choose_action_chunks([env], [observation])[0][0]
        position, *_ = env.world.servo.measure_pose()
        is_pressed = position[2] < PRESSED_HEIGHT_M
        observation, *_, info = env.step(action)
        should_close = action[7] < MAX_CLOSE_COMMAND
        is_open = env.world.servo.measure_opening() > MIN_OPEN_OPENING
        num_blocked += bool(is_pressed and should_close and is_open)
    return bool(info["success"]), num_blocked


def main(
    folders: Positional[tuple[Path, ...]], policy: str = "nano", family: str = "spoon_on_towel"
) -> None:
    """Print each failed episode of these evaluations, and how many were blocked for long."""
    agent = load_agent(policy)
    failed_seeds = []
    for folder in folders:
        for outcome in load_results(folder).outcomes:
            if outcome.family == family and not outcome.success:
                failed_seeds.append(outcome.seed)

    num_failed_again = 0
    num_blocked_for_long = 0
    for seed in failed_seeds:
        success, num_blocked = count_blocked_steps(agent, family, seed)
        result = "succeeds" if success else "fails"
        print(f"scene {seed}: {result}, held open at {num_blocked} steps")
        if not success:
            num_failed_again += 1
            num_blocked_for_long += num_blocked >= MIN_BLOCKED_STEPS
    print(
        f"{len(failed_seeds)} failed, {num_failed_again} fail again, "
        f"{num_blocked_for_long} held open for {MIN_BLOCKED_STEPS} steps or more"
    )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
