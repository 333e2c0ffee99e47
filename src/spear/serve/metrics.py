"""What the server counts, in Prometheus' text format
(https://prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How often a value was at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """As Prometheus wants it: cumulative counts, sum and count."""
        total, out = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum!r}", f"{name}_count {total}"]


class Metrics:
    """The counts of one server.

    requests    by outcome: ok, refused (a bad observation), busy, failed (an error of ours), gone (the client
                left).
    latency     seconds from a request's arrival to its answer being ready; inference: of a batch alone.
    batch_size  requests that were answered together.
    """

    OUTCOMES = ("ok", "refused", "busy", "failed", "gone")

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.latency = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)

    def text(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> str:
        """All metrics. gauges: name → (help, how to read it now)."""
        lines = _head("spear_requests_total", "counter", "Requests by outcome.")
        lines += [f'spear_requests_total{{outcome="{o}"}} {self.requests[o]}' for o in self.OUTCOMES]
        for name, about, histogram in (
            ("spear_request_seconds", "From a request's arrival to its answer being ready.", self.latency),
            ("spear_inference_seconds", "Inference of one batch.", self.inference),
            ("spear_batch_size", "Requests answered together.", self.batch_size),
        ):
            lines += [*_head(name, "histogram", about), *histogram.lines(name)]
        for name, (about, value) in gauges.items():
            lines += [*_head(name, "gauge", about), f"{name} {value():g}"]
        return "\n".join(lines) + "\n"


def gpu_memory() -> float:
    """Bytes that PyTorch holds on all GPUs together; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return float(sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())))


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
