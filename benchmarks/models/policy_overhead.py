"""Policy overhead: `infer` (checks, image fitting, tokens, normalization, network) against the bare
network.

Both run on the same observation (two 640 x 480 cameras), one after the other, many times, on one
thread. Processor time is compared, by medians, so that other work on the machine does not count.

    python benchmarks/models/policy_overhead.py [--name POLICY] [--runs RUNS]
    python benchmarks/models/policy_overhead.py --beside    # by the clock, beside other work

With `--beside`, the time that passes in an `infer`, and in one of 16 observations, alone and beside
a process that keeps one core busy: medians, and in what time 90 % of the runs end.
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

NUM_WARM_UPS = 5
BATCHES = (1, 16)
MAX_RATIO = 1.08  # the goal


def measure_seconds(
    run: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> float:
    """Measure one call in processor time, or by another clock."""
    start = clock()
    run()
    return clock() - start


def work_forever() -> None:
    while True:
        pass


def make_observation() -> dict[str, object]:
    rng = np.random.default_rng(0)
    return {
        "observation/image": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8),
        "observation/state": np.array([0.45, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 1.0], np.float32),
        "prompt": "put the carrot on the plate",
    }


def measure_beside_others(
    policy: Spear1Policy, observation: dict[str, object], num_runs: int
) -> None:
    """Print what an `infer` takes by the clock, alone and beside a busy process."""
    print_latencies(policy, observation, num_runs, "alone")
    worker = multiprocessing.get_context("spawn").Process(target=work_forever, daemon=True)
    worker.start()
    print_latencies(policy, observation, num_runs, "beside a busy process")
    worker.terminate()


def print_latencies(
    policy: Spear1Policy, observation: dict[str, object], num_runs: int, where: str
) -> None:
    for batch in BATCHES:
        infer = functools.partial(policy.infer_batch, [observation] * batch)
        infer()  # the first run is slower
        runs_ms = [1000 * measure_seconds(infer, time.perf_counter) for _ in range(num_runs)]
        median_ms = statistics.median(runs_ms)
        percentile_90_ms = statistics.quantiles(runs_ms, n=10)[-1]
        print(
            f"{where}, {batch} at once: {median_ms:.1f} ms, 90 % within {percentile_90_ms:.1f} ms"
        )


def main(name: str = "nano", runs: int = 100, beside: bool = False) -> None:
    policy = Spear1Policy.load(name)
    observation = make_observation()
    if beside:
        measure_beside_others(policy, observation, runs)
        return

    inputs = policy.prepare_inputs([observation])
    infer = functools.partial(policy.infer, observation)
    predict = functools.partial(policy.predict, inputs)
    torch.set_num_threads(1)
    for _ in range(NUM_WARM_UPS):
        infer()
        predict()

    infer_ms = []
    predict_ms = []
    for _ in range(runs):
        infer_ms.append(1000 * measure_seconds(infer))
        predict_ms.append(1000 * measure_seconds(predict))
    infer_median_ms = statistics.median(infer_ms)
    predict_median_ms = statistics.median(predict_ms)
    ratio = infer_median_ms / predict_median_ms
    print(
        f"infer {infer_median_ms:.2f} ms, bare network {predict_median_ms:.2f} ms,"
        f" medians of {runs} runs"
    )
    print(f"policy overhead: infer / bare network = {ratio:.3f} (goal <= {MAX_RATIO})")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
