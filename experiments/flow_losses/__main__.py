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
from spear.errors import unknown_name_error
from spear.flow import FlowConfig
from spear.geometry import quat_canonical, quat_distance, quat_exp
from spear.types import Action

PROBLEMS = {
    "one, small": (0.08, 0.0),
    "one, large": (1.2, 0.0),
    "two, small": (0.08, 0.3),
    "two, large": (1.2, 0.3),
}
"""The largest turn about an axis, rad, and how often the second answer is given."""
STEPS = 10
"""Euler steps."""


def _cosine(step: float | None, geodesic: float = 1.0, weight: float = 1.0) -> FlowConfig:
    return FlowConfig(geodesic_step=step, geodesic_weight=geodesic, rotation_weight=weight)


def _mse(weight: float, prediction: Any = "velocity") -> FlowConfig:
    return FlowConfig(
        prediction=prediction, rotation_loss="mse", geodesic_weight=0, rotation_weight=weight
    )


LOSSES: Mapping[str, FlowConfig] = {
    "as-written-0.1": _cosine(0.1),  # 1 - v·u in place of 1 - cos(v, u)
    "cosine": _cosine(0.1, 0),
    "cosine-0.003": _cosine(0.003),
    "cosine-0.03": _cosine(0.03),
    "cosine-0.1": _cosine(0.1),
    "cosine-0.3": _cosine(0.3),
    "cosine-rest": _cosine(None),
    "cosine-0.003-slow": _cosine(0.003),
    "cosine-0.003-fast": _cosine(0.003),
    "cosine-0.1-slow": _cosine(0.1),
    "cosine-0.1-fast": _cosine(0.1),
    "cosine-0.003-x33": _cosine(0.003, 100 / 3),
    "cosine-0.1-x10": _cosine(0.1, 10),
    "cosine-0.1-all-x10": _cosine(0.1, weight=10),
    "cosine-0.1-all-x66": _cosine(0.1, weight=66),
    "mse": _mse(1),
    "mse-x20": _mse(20),
    "mse-x560": _mse(560),
    "clean-mse-x50": _mse(50, "clean"),
    "clean-cosine-x200": FlowConfig(prediction="clean", geodesic_weight=0, rotation_weight=200),
    "clean-chord": FlowConfig(prediction="clean"),
}
"""By name: kind, δ ("rest": all of 1 - τ; none: no geodesic term), and weights other than 1, of the
geodesic term or of all that is said of rotations. The largest cost a missed turn of 0.1 rad alike.
"slow" and "fast": the untrained network's velocities are a fifth and five times as long."""
START = {"slow": 0.2, "fast": 5.0}


@dataclass(frozen=True)
class Problems:
    """Smooth functions of what is asked, for M members: a wave per number of an answer, [M, 2, 3,
    7].

    turn [M, 1, 1, 1, 1]: the largest about an axis, rad. rarer [M, 1, 1, 1]: how often the second
    answer is given; where it is 0, both are the same.
    """

    frequencies: Tensor
    phases: Tensor
    turn: Tensor
    rarer: Tensor

    @classmethod
    def draw(cls, seeds: int, generator: torch.Generator) -> Problems:
        """All of `PROBLEMS`, one after the other, with as many members of each as there are
        seeds.
        """
        members = len(PROBLEMS) * seeds
        turn, rarer = torch.tensor(list(PROBLEMS.values())).repeat_interleave(seeds, 0).unbind(-1)
        frequencies = torch.randn(members, 2, 3, 7, generator=generator)
        phases = 2 * math.pi * torch.rand(members, 2, 1, 7, generator=generator)
        for part in (frequencies, phases):
            part[rarer == 0, 1] = part[rarer == 0, 0]
        return cls(frequencies, phases, turn.view(-1, 1, 1, 1, 1), rarer.view(-1, 1, 1, 1))

    def answers(self, asked: Tensor) -> Action:
        """Both answers [M, 2, B, 1, ·] to what is asked, [M, B, 3]."""
        wave = torch.sin(asked[:, None] @ self.frequencies + self.phases)[..., None, :]
        rotation = quat_canonical(quat_exp(self.turn * wave[..., 3:6]))
        return Action(
            math.sqrt(2) * wave[..., :3], rotation, torch.where(wave[..., 6:] > 0, 1.0, -1.0)
        )


class Networks(torch.nn.Module):
    """One MLP per member, all at once: what is asked [M, B, 3], the state [M, B, 1, ·] and τ [M, B]
    in.
    """

    def __init__(
        self,
        members: int,
        generator: torch.Generator,
        start: float,
        width: int = 64,
        depth: int = 3,
    ) -> None:
        super().__init__()
        sizes = [12, *[width] * depth, 8]
        self.weights = torch.nn.ParameterList(
            torch.randn(members, a, b, generator=generator) / math.sqrt(a)
            for a, b in pairwise(sizes)
        )
        self.biases = torch.nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])
        self.weights[-1].data *= start

    def forward(self, asked: Tensor, state: Action, time: Tensor) -> Action:
        x = torch.cat([asked, state.to_vector().squeeze(-2), time[..., None]], -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if k == 0 else torch.nn.functional.silu(x), weight)
        return Action.from_vector(x[..., None, :])


def total(
    name: str, said: Action, noise: Action, data: Action, time: Tensor, config: FlowConfig
) -> Tensor:
    """The loss of `spear.flow`; the paper's cosine as it is written is put in from the same
    velocities.
    """
    found, parts = flow.compute_loss(said, noise, data, time, config)
    if not name.startswith("as-written"):
        return found
    state, truth = flow.interpolate(noise, data, time, config)
    velocity = flow.prediction_to_velocity(said, state, time, config).rotation
    return found - parts["rotation"] + 1 - (velocity * truth.rotation).sum(-1).mean()


def train(name: str, seeds: int, steps: int, batch: int = 128) -> dict[str, dict[str, list[float]]]:
    """What the network of every seed does after so many steps, by problem and measure."""
    config, generator = LOSSES[name], torch.Generator().manual_seed(0)
    problems, members = Problems.draw(seeds, generator), len(PROBLEMS) * seeds
    networks = Networks(members, generator, START.get(name.rpartition("-")[2], 1.0))
    optimizer = torch.optim.Adam(networks.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def draw(count: int) -> tuple[Tensor, Action, Action, Action, Tensor]:
        asked = 2 * torch.rand(members, count, 3, generator=generator) - 1
        answers = problems.answers(asked)
        rarer = torch.rand(members, count, 1, 1, generator=generator) < problems.rarer
        both = answers.to_vector()
        data = Action.from_vector(torch.where(rarer, both[:, 1], both[:, 0]))
        time = flow.sample_time(members * count, config, generator).view(members, count)
        return asked, answers, data, flow.sample_noise((members, count, 1), config, generator), time

    for _ in range(steps):
        asked, _, data, noise, time = draw(batch)
        state, _ = flow.interpolate(noise, data, time, config)
        optimizer.zero_grad(set_to_none=True)
        # The mean over the members times their number: every network gets its own loss's gradient.
        (members * total(name, networks(asked, state, time), noise, data, time, config)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        asked, answers, data, noise, time = draw(4096)
        state, truth = flow.interpolate(noise, data, time, config)
        spoken = flow.prediction_to_velocity(networks(asked, state, time), state, time, config)
        found = flow.integrate(lambda s, t: networks(asked, s, t), noise, STEPS, config)
        apart = quat_distance(found.rotation[:, None], answers.rotation).squeeze(-1)
        along = (found.translation[:, None] - answers.translation).norm(dim=-1).squeeze(-1)
        speed = spoken.rotation.norm(dim=-1) / truth.rotation.norm(dim=-1).clamp_min(1e-6)
        measured = {
            "angle": 1000 * apart.amin(1).median(-1).values,
            "translation": 1000 * along.amin(1).median(-1).values,
            "rarer": 100 * (apart.argmin(1) == 1).float().mean(-1),
            "speed": speed.squeeze(-1).median(-1).values,
        }
    return {
        problem: {
            key: value[k * seeds : (k + 1) * seeds].tolist() for key, value in measured.items()
        }
        for k, problem in enumerate(PROBLEMS)
    }


def interval(values: Sequence[float], digits: int = 0) -> str:
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def row(name: str, cells: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    found = [interval(cell["angle"]) for cell in cells.values()]
    found += [interval(cells[problem]["rarer"]) for problem in ("two, small", "two, large")]
    found += [
        interval(cells["one, large"]["speed"], 2),
        interval(cells["one, large"]["translation"]),
    ]
    return f"| {name} | {' | '.join(found)} |"


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
            raise unknown_name_error("loss", name, LOSSES)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"| loss | {' | '.join(PROBLEMS)} | rarer (small) | rarer (large) | speed | translation |"
    )
    print("|---" * (len(PROBLEMS) + 5) + "|")
    for name in losses or LOSSES:
        path = out / f"{name}-{steps}-{seeds}.json"
        if not path.is_file():
            path.write_text(json.dumps(train(name, seeds, steps)))
        print(row(name, json.loads(path.read_text())), flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
