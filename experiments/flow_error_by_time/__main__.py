"""Where on the way from noise to data a policy's flow is wrong: its error at each time τ.

    spear record --episodes 20 --first-seed 90000 --out runs/unseen
    python -m experiments.flow_error_by_time runs/a/final runs/b/final --episodes runs/unseen

At a state between noise and a demonstrated chunk, the network says a velocity or a clean action; either names
the end of the way. The table has how far that end is from the demonstrated action: translation, mm, and
rotation, mrad, in the mean of actions (those with turns above 50 mrad apart), and how often the gripper is on
the wrong side, %. The last lines: where so many Euler steps from pure noise end, and how far one noise's end
is from another's ("spread", mm). The same steps and noise for all policies.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from spear import flow
from spear.cli import run_reporting_errors
from spear.data.mixture import Mixture, TrainingSamples
from spear.data.store.episode_store import EpisodeStore
from spear.geometry import quat_distance, quat_log, sphere_exp
from spear.policy import Spear1Policy
from spear.train.tasks import encode_robot_batch
from spear.types import Action

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
TURN = 0.05
"""Least angle of a turn, rad."""
EULER = (1, 3, 5, 10, 20)
BATCH = 64


def end_of(said: Action, state: Action, time: Tensor, config: flow.FlowConfig) -> Action:
    """Where a prediction at a state leads to: one step over all of 1 - τ."""
    left = (1 - time)[:, None, None]
    v = flow.prediction_to_velocity(said, state, time, config)
    turned = sphere_exp(state.rotation, left * v.rotation) if config.rotation == "s3" else None
    straight = Action.from_vector(state.to_vector() + left * v.to_vector())
    rotation = straight.rotation if turned is None else turned
    return Action(
        straight.translation, rotation / rotation.norm(dim=-1, keepdim=True), straight.gripper
    )


def errors(policy: Spear1Policy, found: Action, data: Action, mask: Tensor) -> Tensor:
    """[N, 4] of the valid actions: mm, mrad, angle of the true turn in rad, gripper on the wrong side."""
    metric, true = (
        policy.normalizer.unnormalize_action(found),
        policy.normalizer.unnormalize_action(data),
    )
    columns = (
        1000 * (metric.translation - true.translation).norm(dim=-1),
        1000 * quat_distance(metric.rotation, true.rotation).squeeze(-1),
        quat_log(true.rotation).norm(dim=-1),
        ((metric.gripper > 0.5) != (true.gripper > 0.5)).float().squeeze(-1),
    )
    return torch.stack(columns, -1)[mask]


@torch.no_grad()
def measure(policy: Spear1Policy, store: EpisodeStore, count: int) -> dict[str, Tensor]:
    """`errors` by time, and of the whole flow, over so many steps of the episodes."""
    model, sizes = policy.model, policy.processor.image_sizes
    views = {view: (height, width) for view, (width, height) in sizes.items()}
    samples = TrainingSamples(Mixture([("unseen", store, 1.0)]), views, model.config.horizon)
    found: dict[str, list[Tensor]] = {}
    for batch in range(-(-count // BATCH)):
        inputs = encode_robot_batch(
            policy.processor, policy.normalizer, samples.batch(batch, BATCH)
        )
        data, mask = Action.from_vector(inputs.pop("actions")), inputs.pop("action_mask")
        state = inputs.pop("state")
        prefix = model.encode_prefix(**inputs)
        generator = torch.Generator().manual_seed(batch)
        noise = flow.sample_noise(mask.shape, model.flow, generator)
        predict = lambda s, t, p=prefix, x=state: model.predict(p, x, s, t)  # noqa: E731
        for tau in TIMES:
            time = torch.full((BATCH,), tau)
            at, _ = flow.interpolate(noise, data, time, model.flow)
            end = end_of(predict(at, time), at, time, model.flow)
            found.setdefault(f"{tau:g}", []).append(errors(policy, end, data, mask))
        other = flow.sample_noise(mask.shape, model.flow, generator)
        for steps in EULER:
            one, two = (
                flow.integrate(predict, start, steps, model.flow) for start in (noise, other)
            )
            found.setdefault(f"{steps} steps", []).append(errors(policy, one, data, mask))
            found.setdefault(f"{steps} steps, spread", []).append(errors(policy, one, two, mask))
    return {name: torch.cat(parts) for name, parts in found.items()}


def main(
    policies: tyro.conf.Positional[tuple[Path, ...]], episodes: Path, steps: int = 512
) -> None:
    """Print the table.

    Args:
        policies: folders of trained policies.
        episodes: demonstrations that none of them learned from.
        steps: of them, drawn at random.
    """
    store = EpisodeStore(episodes)
    for folder in policies:
        print(f"\n{folder}: {steps} steps\n")
        print("| τ | translation, mm | rotation, mrad | of turns | gripper, % |")
        print("|---" * 5 + "|")
        for tau, values in measure(Spear1Policy.load(folder), store, steps).items():
            mm, mrad, angle, wrong = values.numpy().T
            cells = mm.mean(), mrad.mean(), np.mean(mrad[angle > TURN]), 100 * wrong.mean()
            print(f"| {tau} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
