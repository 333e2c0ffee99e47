"""Which loss teaches the flow of rotations best: the paper's cosine, the cosine of directions, or
squared errors; and with which δ?

    python -m experiments.flow_losses --out runs/flow-losses
    python -m experiments.flow_losses --out runs/flow-losses --steps 12000 --losses cosine-0.1 mse

The command prints the table; run again, it resumes.

A small conditional problem: three numbers decide where a translation, a rotation and a gripper are
(smooth random functions, other ones for every seed), and an MLP learns the flow there, by
`spear.flow` from the noise to the ten Euler steps. Rotations are small (about 0.1 rad, a robot's at
5 Hz) or large (about 1.5 rad); what is asked has one answer or two, of which one is given three
times in ten.

A number is the median over draws of the angle to the nearest answer, mrad; its mean over the seeds
with the 95 % interval of Student's t. "rarer": the share of draws that end at the rarer answer, in
per cent (30 is right). "speed": the median of the predicted velocity's length over the true one's
(one answer, large turns). "translation": the median distance to the answer, in thousandths of its
standard deviation. All problems and seeds train at once; a loss whose file is in OUT is not trained
again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy import stats
from torch import Tensor

from spear import flow
from spear.cli import run_reporting_errors
from spear.errors import make_unknown_name_error
from spear.flow import FlowConfig
from spear.geometry import quat_canonical, quat_distance, quat_exp
from spear.types import Action

PROBLEMS = {
    "one, small": (0.08, 0.0),
    "one, large": (1.2, 0.0),
    "two, small": (0.08, 0.3),
    "two, large": (1.2, 0.3),
}
"""Name → the largest turn about an axis, rad, and how often the second answer is given."""
NUM_EULER_STEPS = 10
INITIAL_VELOCITY_FACTORS = {"slow": 0.2, "fast": 5.0}
"""The end of a loss's name → how long the untrained network's velocities are."""

TRAINING_BATCH_SIZE = 128
EVALUATION_BATCH_SIZE = 4096
LEARNING_RATE = 2e-3
NUM_INPUTS = 12  # three numbers that are asked, eight of the state, and the time
NUM_OUTPUTS = 8
HIDDEN_WIDTH = 64
NUM_HIDDEN_LAYERS = 3


def make_cosine_config(
    step: float | None, geodesic: float = 1.0, weight: float = 1.0
) -> FlowConfig:
    return FlowConfig(geodesic_step=step, geodesic_weight=geodesic, rotation_weight=weight)


def make_mse_config(weight: float, prediction: Any = "velocity") -> FlowConfig:
    return FlowConfig(
        prediction=prediction, rotation_loss="mse", geodesic_weight=0, rotation_weight=weight
    )


LOSSES: Mapping[str, FlowConfig] = {
    "as-written-0.1": make_cosine_config(0.1),  # 1 - v·u in place of 1 - cos(v, u)
    "cosine": make_cosine_config(0.1, 0),
    "cosine-0.003": make_cosine_config(0.003),
    "cosine-0.03": make_cosine_config(0.03),
    "cosine-0.1": make_cosine_config(0.1),
    "cosine-0.3": make_cosine_config(0.3),
    "cosine-rest": make_cosine_config(None),
    "cosine-0.003-slow": make_cosine_config(0.003),
    "cosine-0.003-fast": make_cosine_config(0.003),
    "cosine-0.1-slow": make_cosine_config(0.1),
    "cosine-0.1-fast": make_cosine_config(0.1),
    "cosine-0.003-x33": make_cosine_config(0.003, 100 / 3),
    "cosine-0.1-x10": make_cosine_config(0.1, 10),
    "cosine-0.1-all-x10": make_cosine_config(0.1, weight=10),
    "cosine-0.1-all-x66": make_cosine_config(0.1, weight=66),
    "mse": make_mse_config(1),
    "mse-x20": make_mse_config(20),
    "mse-x560": make_mse_config(560),
    "clean-mse-x50": make_mse_config(50, "clean"),
    "clean-cosine-x200": FlowConfig(prediction="clean", geodesic_weight=0, rotation_weight=200),
    "clean-chord": FlowConfig(prediction="clean"),
}
"""Name → configuration. A name has the kind; δ ("rest": all of 1 - τ; none: no geodesic term); and
weights other than 1, of the geodesic term or of all rotation terms. With the largest weights a
missed turn of 0.1 rad costs the same in all kinds."""


@dataclass(frozen=True)
class Problems:
    """Smooth functions of what is asked, for M members: a wave per number of an answer.

    frequencies      [M, 2, 3, 7], for both answers.
    phases           [M, 2, 1, 7].
    max_turn         [M, 1, 1, 1, 1], the largest turn about an axis, rad.
    second_fraction  [M, 1, 1, 1], how often the second answer is given; where it is 0, both answers
                     are the same.
    """

    frequencies: Tensor
    phases: Tensor
    max_turn: Tensor
    second_fraction: Tensor

    @classmethod
    def draw(cls, seeds: int, generator: torch.Generator) -> Problems:
        """All of `PROBLEMS`, one after the other, with a member of each per seed."""
        num_members = len(PROBLEMS) * seeds
        settings = torch.tensor(list(PROBLEMS.values())).repeat_interleave(seeds, 0)
        max_turn, second_fraction = settings.unbind(-1)
        frequencies = torch.randn(num_members, 2, 3, 7, generator=generator)
        phases = 2 * math.pi * torch.rand(num_members, 2, 1, 7, generator=generator)
        has_one_answer = second_fraction == 0
        for wave_numbers in (frequencies, phases):
            wave_numbers[has_one_answer, 1] = wave_numbers[has_one_answer, 0]
        return cls(
            frequencies,
            phases,
            max_turn.view(-1, 1, 1, 1, 1),
            second_fraction.view(-1, 1, 1, 1),
        )

    def answer(self, question: Tensor) -> Action:
        """Both answers [M, 2, B, 1, ·] to what is asked, [M, B, 3]."""
        wave = torch.sin(question[:, None] @ self.frequencies + self.phases)[..., None, :]
        rotation = quat_canonical(quat_exp(self.max_turn * wave[..., 3:6]))
        gripper = torch.where(wave[..., 6:] > 0, 1.0, -1.0)
        return Action(math.sqrt(2) * wave[..., :3], rotation, gripper)


class Networks(torch.nn.Module):
    """One MLP per member, all at once.

    Its inputs are what is asked [M, B, 3], the state [M, B, 1, ·] and τ [M, B].
    """

    def __init__(
        self, num_members: int, generator: torch.Generator, initial_velocity_factor: float
    ) -> None:
        super().__init__()
        widths = [NUM_INPUTS, *[HIDDEN_WIDTH] * NUM_HIDDEN_LAYERS, NUM_OUTPUTS]
        weights = []
        biases = []
        for in_width, out_width in pairwise(widths):
            weight = torch.randn(num_members, in_width, out_width, generator=generator)
            weights.append(weight / math.sqrt(in_width))
            biases.append(torch.zeros(num_members, 1, out_width))
        self.weights = torch.nn.ParameterList(weights)
        self.biases = torch.nn.ParameterList(biases)
        self.weights[-1].data *= initial_velocity_factor

    def forward(self, question: Tensor, state: Action, time: Tensor) -> Action:
        x = torch.cat([question, state.to_vector().squeeze(-2), time[..., None]], -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer > 0:
                x = torch.nn.functional.silu(x)
            x = torch.baddbmm(bias, x, weight)
        return Action.from_vector(x[..., None, :])


def compute_total_loss(
    name: str, prediction: Action, noise: Action, data: Action, time: Tensor, config: FlowConfig
) -> Tensor:
    """The loss of `spear.flow`; or the paper's cosine as it is written, from the same
    velocities.
    """
    loss, loss_terms = flow.compute_loss(prediction, noise, data, time, config)
    if not name.startswith("as-written"):
        return loss
    state, truth = flow.interpolate(noise, data, time, config)
    velocity = flow.prediction_to_velocity(prediction, state, time, config).rotation
    return loss - loss_terms["rotation"] + 1 - (velocity * truth.rotation).sum(-1).mean()


@dataclass(frozen=True)
class Batch:
    """What is asked [M, B, 3], both answers, and a point on the path from noise to one of them."""

    question: Tensor
    answers: Action
    data: Action
    noise: Action
    time: Tensor


def draw_batch(
    problems: Problems, batch_size: int, config: FlowConfig, generator: torch.Generator
) -> Batch:
    num_members = len(problems.phases)
    question = 2 * torch.rand(num_members, batch_size, 3, generator=generator) - 1
    answers = problems.answer(question)
    uniform = torch.rand(num_members, batch_size, 1, 1, generator=generator)
    is_second = uniform < problems.second_fraction
    action_vectors = answers.to_vector()
    data = Action.from_vector(torch.where(is_second, action_vectors[:, 1], action_vectors[:, 0]))
    time = flow.sample_time(num_members * batch_size, config, generator)
    noise = flow.sample_noise((num_members, batch_size, 1), config, generator)
    return Batch(question, answers, data, noise, time.view(num_members, batch_size))


def train(name: str, seeds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Train a network per seed and problem; returns what they do, by problem and measure."""
    config = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    problems = Problems.draw(seeds, generator)
    num_members = len(PROBLEMS) * seeds
    factor = INITIAL_VELOCITY_FACTORS.get(name.rpartition("-")[2], 1.0)
    networks = Networks(num_members, generator, factor)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(steps):
        batch = draw_batch(problems, TRAINING_BATCH_SIZE, config, generator)
        state, _ = flow.interpolate(batch.noise, batch.data, batch.time, config)
        optimizer.zero_grad(set_to_none=True)
        prediction = networks(batch.question, state, batch.time)
        loss = compute_total_loss(name, prediction, batch.noise, batch.data, batch.time, config)
        # The mean over the members times their number: every network gets its own loss's gradient.
        (num_members * loss).backward()
        optimizer.step()
        schedule.step()

    batch = draw_batch(problems, EVALUATION_BATCH_SIZE, config, generator)
    measures = evaluate(networks, batch, config)
    by_problem = {}
    for index, problem in enumerate(PROBLEMS):
        members = slice(index * seeds, (index + 1) * seeds)
        by_problem[problem] = {key: value[members].tolist() for key, value in measures.items()}
    return by_problem


@torch.no_grad()
def evaluate(networks: Networks, batch: Batch, config: FlowConfig) -> dict[str, Tensor]:
    """The measures [M] of the networks; see the module's description."""
    state, truth = flow.interpolate(batch.noise, batch.data, batch.time, config)
    prediction = networks(batch.question, state, batch.time)
    velocity = flow.prediction_to_velocity(prediction, state, batch.time, config)

    def predict(state: Action, time: Tensor) -> Action:
        return networks(batch.question, state, time)

    end = flow.integrate(predict, batch.noise, NUM_EULER_STEPS, config)
    angles = quat_distance(end.rotation[:, None], batch.answers.rotation).squeeze(-1)
    offsets = end.translation[:, None] - batch.answers.translation
    distances = offsets.norm(dim=-1).squeeze(-1)
    true_speed = truth.rotation.norm(dim=-1).clamp_min(1e-6)
    speed = velocity.rotation.norm(dim=-1) / true_speed
    return {
        "angle": 1000 * angles.amin(1).median(-1).values,
        "translation": 1000 * distances.amin(1).median(-1).values,
        "rarer": 100 * (angles.argmin(1) == 1).float().mean(-1),
        "speed": speed.squeeze(-1).median(-1).values,
    }


def format_interval(values: Sequence[float], digits: int = 0) -> str:
    """The mean over the seeds with its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    n = len(values)
    quantile = stats.t.ppf(0.975, n - 1)
    half_width = float(quantile * np.std(values, ddof=1) / math.sqrt(n))
    low = mean - half_width
    high = mean + half_width
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def format_row(name: str, measures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A line of the table, from measures by problem."""
    cells = [format_interval(by_measure["angle"]) for by_measure in measures.values()]
    cells.append(format_interval(measures["two, small"]["rarer"]))
    cells.append(format_interval(measures["two, large"]["rarer"]))
    cells.append(format_interval(measures["one, large"]["speed"], 2))
    cells.append(format_interval(measures["one, large"]["translation"]))
    return f"| {name} | {' | '.join(cells)} |"


def main(
    out: Path = Path("runs/flow-losses"),
    seeds: int = 5,
    steps: int = 3000,
    losses: tuple[str, ...] = (),
) -> None:
    """Train what is missing and print the table.

    Args:
        out: folder of the results, one file per loss.
        seeds: problems and networks of each kind, at least two.
        steps: of training.
        losses: by name; all without it.
    """
    for name in losses:
        if name not in LOSSES:
            raise make_unknown_name_error("loss", name, LOSSES)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"| loss | {' | '.join(PROBLEMS)} | rarer (small) | rarer (large) | speed | translation |"
    )
    print("|---" * (len(PROBLEMS) + 5) + "|")
    for name in losses or LOSSES:
        path = out / f"{name}-{steps}-{seeds}.json"
        if not path.is_file():
            path.write_text(json.dumps(train(name, seeds, steps)))
        print(format_row(name, json.loads(path.read_text())), flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
