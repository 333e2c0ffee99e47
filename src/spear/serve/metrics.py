"""The numbers that a server reports to Prometheus, at GET /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = ("ok", "refused", "busy", "failed", "gone")
DURATION_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0
)  # fmt: skip
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server.

    Requests are counted by outcome: ok, refused (a bad observation), busy (the queue is full),
    failed (an error of the server), gone (the client left).

    Args:
        count_waiting: returns the number of requests that wait. Like `count_clients`, it is called
            whenever the metrics are read.
        count_clients: returns the number of open connections.
    """

    def __init__(
        self, count_waiting: Callable[[], float], count_clients: Callable[[], float]
    ) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spear_requests", "Requests by outcome.", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # so that all outcomes are shown from the start
        self.latency = self._make_histogram(
            "spear_request_seconds",
            "From a request's arrival to its answer being ready.",
            DURATION_BUCKETS_S,
        )
        self.inference = self._make_histogram(
            "spear_inference_seconds", "Inference of one batch.", DURATION_BUCKETS_S
        )
        self.batch_size = self._make_histogram(
            "spear_batch_size", "Requests answered together.", BATCH_SIZE_BUCKETS
        )
        self._add_gauge("spear_queue", "Requests that wait.", count_waiting)
        self._add_gauge("spear_clients", "Open connections.", count_clients)
        self._add_gauge(
            "spear_gpu_memory_bytes", "Held by PyTorch on GPUs.", measure_reserved_gpu_bytes
        )

    def add_gauge_of_unrecorded_observations(self, count: Callable[[], float]) -> None:
        """Also report how many observations were not recorded, which `count` returns."""
        self._add_gauge("spear_unrecorded", "Observations that were not recorded.", count)

    def format(self) -> str:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def _make_histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, description, buckets=buckets, registry=self.registry)

    def _add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        Gauge(name, description, registry=self.registry).set_function(read)


def measure_reserved_gpu_bytes() -> float:
    """Return the memory that PyTorch reserves on all GPUs together; 0 without one."""
    import torch

    reserved = [torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())]
    return float(sum(reserved))
