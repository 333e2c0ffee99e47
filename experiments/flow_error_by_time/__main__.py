"""At which flow time τ is the predicted action wrong, and by how much?

    spear record --num-episodes 20 --first-seed 90000 --out runs/unseen
    python -m experiments.flow_error_by_time runs/a/final runs/b/final --episodes runs/unseen

At a state between noise and a demonstrated chunk, the network predicts a velocity or a clean
action; either leads to an end of the path. The table has the error of that end: translation, mm,
and rotation, mrad, in the mean over actions (those with turns above 50 mrad separately), and how
often the gripper is on the wrong side, %. The last lines tell where some numbers of Euler steps
from pure noise end, and how far the ends of two noises are from each other ("spread", mm). All
policies get the same steps and noise.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from spear import flow
from spear.cli import run_reporting_errors
from spear.data.mixture import Mixture, TrainingSamples
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.geometry import quat_distance, quat_log, sphere_exp
from spear.policy import Spear1Policy
from spear.train.tasks import encode_robot_batch
from spear.types import Action

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
NUM_EULER_STEPS = (1, 3, 5, 10, 20)
MIN_TURN_RAD = 0.05  # actions that turn by more have a column of their own
GRIPPER_HALF_OPEN = 0.5
BATCH_SIZE = 64


def find_end(prediction: Action, state: Action, time: Tensor, config: flow.FlowConfig) -> Action:
    """Where a prediction at a state leads: one step over all of 1 - τ."""
    remaining_time = (1 - time)[:, None, None]
    velocity = flow.prediction_to_velocity(prediction, state, time, config)
    end = Action.from_vector(state.to_vector() + remaining_time * velocity.to_vector())
    rotation = end.rotation
    if config.rotation == "s3":
        rotation = sphere_exp(state.rotation, remaining_time * velocity.rotation)
    return Action(end.translation, rotation / rotation.norm(dim=-1, keepdim=True), end.gripper)


def compute_errors(policy: Spear1Policy, predicted: Action, data: Action, mask: Tensor) -> Tensor:
    """Errors [N, 4] of the valid actions.

    The columns are translation, mm; rotation, mrad; the angle of the true turn, rad; and whether
    the gripper is on the wrong side.
    """
    metric = policy.normalizer.unnormalize_action(predicted)
    truth = policy.normalizer.unnormalize_action(data)
    opens = metric.gripper > GRIPPER_HALF_OPEN
    should_open = truth.gripper > GRIPPER_HALF_OPEN
    columns = [
        1000 * (metric.translation - truth.translation).norm(dim=-1),
        1000 * quat_distance(metric.rotation, truth.rotation).squeeze(-1),
        quat_log(truth.rotation).norm(dim=-1),
        (opens != should_open).float().squeeze(-1),
    ]
    return torch.stack(columns, -1)[mask]


@torch.no_grad()
def measure_batch(
    policy: Spear1Policy, samples: TrainingSamples, number: int, errors: dict[str, list[Tensor]]
) -> None:
    """Add the errors of one batch of steps, by time and number of Euler steps."""
    model = policy.model
    inputs = encode_robot_batch(
        policy.processor, policy.normalizer, samples.batch(number, BATCH_SIZE)
    )
    data = Action.from_vector(inputs.pop("actions"))
    mask = inputs.pop("action_mask")
    robot_state = inputs.pop("state")
    prefix = model.encode_prefix(**inputs)
    generator = torch.Generator().manual_seed(number)
    noise = flow.sample_noise(mask.shape, model.flow_config, generator)

    def predict(state: Action, time: Tensor) -> Action:
        return model.predict(prefix, robot_state, state, time)

    def add(name: str, predicted: Action, target: Action) -> None:
        errors.setdefault(name, []).append(compute_errors(policy, predicted, target, mask))

    for tau in TIMES:
        time = torch.full((BATCH_SIZE,), tau)
        state, _ = flow.interpolate(noise, data, time, model.flow_config)
        end = find_end(predict(state, time), state, time, model.flow_config)
        add(f"{tau:g}", end, data)

    other_noise = flow.sample_noise(mask.shape, model.flow_config, generator)
    for num_steps in NUM_EULER_STEPS:
        end = flow.integrate(predict, noise, num_steps, model.flow_config)
        other_end = flow.integrate(predict, other_noise, num_steps, model.flow_config)
        add(f"{num_steps} steps", end, data)
        add(f"{num_steps} steps, spread", end, other_end)


def measure(policy: Spear1Policy, store: EpisodeStore, num_steps: int) -> dict[str, Tensor]:
    """The errors [N, 4] of some steps of the episodes, by time and number of Euler steps."""
    image_shapes = {}
    for view, (width, height) in policy.processor.image_sizes.items():
        image_shapes[view] = (height, width)
    mixture = Mixture([WeightedStore("unseen", store, 1.0)])
    samples = TrainingSamples(mixture, image_shapes, policy.model.config.horizon)
    errors: dict[str, list[Tensor]] = {}
    num_batches = math.ceil(num_steps / BATCH_SIZE)
    for number in range(num_batches):
        measure_batch(policy, samples, number, errors)
    return {name: torch.cat(batches) for name, batches in errors.items()}


def main(policies: Positional[tuple[Path, ...]], episodes: Path, steps: int = 512) -> None:
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
        for name, errors in measure(Spear1Policy.load(folder), store, steps).items():
            translation_mm, rotation_mrad, turn_rad, is_wrong = errors.numpy().T
            cells = [
                translation_mm.mean(),
                rotation_mrad.mean(),
                np.mean(rotation_mrad[turn_rad > MIN_TURN_RAD]),
                100 * is_wrong.mean(),
            ]
            print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
