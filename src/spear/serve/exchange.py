"""An observation with its answer, as a server hands it to a recorder."""

import dataclasses
from collections.abc import Hashable
from typing import Protocol

from spear.embodiments.observations import CheckedObservation
from spear.types import Array


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An observation and its answer.

    client       identifies the client.
    address      the client's address, for the episode's source.
    arrival_s    when the observation arrived, Unix time.
    answer_s     when the answer was ready, Unix time.
    inference_s  how long the policy computed.
    observation  what the policy observed.
    actions      [H, 8] the policy's action chunk.
    rows         [number of commands, numbers per command] the commands that the robot got.
    num_bytes    the size of the client's message, which stays in memory as long as its images do.
    """

    client: Hashable
    address: str
    arrival_s: float
    answer_s: float
    inference_s: float
    observation: CheckedObservation
    actions: Array
    rows: Array
    num_bytes: int


class Recorder(Protocol):
    """The methods of `spear.serve.recorder.SessionRecorder` that the server calls."""

    num_dropped: int

    def add(self, exchange: Exchange) -> None: ...
    def end_episode(self, client: Hashable) -> None: ...
