"""Policy overhead: `infer` (checks, image fitting, tokens, normalisation, network) against the bare network.

Both run on the same observation (two 640 x 480 cameras), one after the other, many times, on one thread.
Processor time is compared, by medians, so that other work on the machine does not count. Goal: at most 1.08.

    python benchmarks/models/policy_overhead.py [--name POLICY] [--runs RUNS]
    python benchmarks/models/policy_overhead.py --beside    # by the clock, beside other work

With `--beside`, the time that passes in an `infer`, and in one of 16 observations, alone and beside a process
that keeps one core busy: medians, and in what time 90 % of the runs end.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import tyro

from spear.cli import run_reporting_errors
from spear.policy import Spear1Policy


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Processor time of one call, or the time by another clock."""
    started = clock()
    run()
    return clock() - started


def busy() -> None:
    """Work for ever."""
    while True:
        pass


def beside_others(policy: Spear1Policy, observation: dict[str, object], runs: int) -> None:
    """Print what an `infer` takes by the clock, alone and beside a busy process."""

    def measure(where: str) -> None:
        for count in (1, 16):
            act = functools.partial(policy.infer_batch, [observation] * count)
            act()  # the first is slower
            taken = [1000 * seconds(act, time.perf_counter) for _ in range(runs)]
            middle, late = statistics.median(taken), statistics.quantiles(taken, n=10)[-1]
            print(f"{where}, {count} at once: {middle:.1f} ms, 90 % within {late:.1f} ms")

    measure("alone")
    worker = multiprocessing.get_context("spawn").Process(target=busy, daemon=True)
    worker.start()
    measure("beside a busy process")
    worker.terminate()


def main(name: str = "nano", runs: int = 100, beside: bool = False) -> None:
    policy = Spear1Policy.load(name)
    rng = np.random.default_rng(0)
    observation = {
        "observation/image": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8),
        "observation/state": np.array([0.45, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 1.0], np.float32),
        "prompt": "put the carrot on the plate",
    }
    inputs = policy.prepare_inputs([observation])
    whole, bare = (lambda: policy.infer(observation)), (lambda: policy.predict(inputs))
    if beside:
        beside_others(policy, observation, runs)
        return
    torch.set_num_threads(1)
    for _ in range(5):
        whole(), bare()
    times = [(seconds(whole), seconds(bare)) for _ in range(runs)]
    infer, network = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    print(f"infer {infer:.2f} ms, bare network {network:.2f} ms, medians of {runs} runs")
    print(f"policy overhead: infer / bare network = {infer / network:.3f} (goal <= 1.08)")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
