"""Records what a server observes and answers, as an episode store (`spear serve --record`).

A step of a recorded episode is one observation with its answer. An episode ends when its client
leaves, resets, changes the instruction or the cameras, or pauses.

Recording never delays an answer: the server puts observations into a queue, and a thread encodes
and writes them. If the queue is full, observations are not recorded, and are counted.

The newest recordings are kept, because a recording is looked at when a robot has just failed: when
the folder reaches its largest size, the oldest episodes are deleted. Only files of recordings are
ever deleted, and only in a folder that a server has marked as its own (`claim_folder`).

A server does not know how many actions of an answer its robot executes. So
`estimate_num_executed_per_answer` takes it from the times of answers and observations.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.actions import compose_action_groups
from spear.data.store.episode_store import (
    REQUEST_FILE,
    list_shards,
    remove_unfinished_shards,
)
from spear.data.store.growing_shard import PRIVATE_FILE_MODE, GrowingShard
from spear.data.store.shard import SESSION_NOTE
from spear.embodiments.observations import (
    COMMITTED_KEY,
    PROMPT_KEY,
    STATE_KEY,
    CheckedObservation,
    get_view_of_key,
    is_camera_key,
)
from spear.errors import SpearError, format_count, notice
from spear.serve.exchange import Exchange
from spear.serve.service import Service
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util.files import check_empty_or_own_folder, convert_write_errors, read_json, write_text
from spear.util.images import encode_jpeg
from spear.util.run_lock import acquire_run_lock

LOG = logging.getLogger(__name__)
MIB = 2**20
PRIVATE_FOLDER_MODE = 0o700
RECORDED_BY = "spear serve"  # in the file that marks a folder of recordings
SHARD_NAME = re.compile(r"episodes-\d{8}T\d{6}-\d{6}Z\.arrow")
"""Matches the names that `format_shard_name` makes."""

# All numbers are our choice.
MAX_QUEUED_BYTES = 64 * MIB
SAVE_INTERVAL_S = 5.0  # a program that is killed loses at most this much of each episode
IDLE_INTERVAL_S = 1.0  # how often the writer checks whether it has to save, without observations
MAX_PAUSE_S = 10.0  # a client that sends nothing for longer than this begins a new episode
MAX_EPISODE_STEPS = 3000  # then a new episode begins; ten minutes at 5 Hz
MAX_EPISODE_SHARE = 0.25  # of the folder's largest size, by one episode
MAX_EPISODES = 10_000  # in the folder, whose oldest episodes are then deleted
FILE_BLOCK_BYTES = 4096  # an episode's two files take at least this much each on a disk
CLOSE_TIMEOUT_S = 30.0  # how long the writer may take to write the queue when the server stops


@dataclasses.dataclass(frozen=True)
class _EndOfEpisode:
    """A client has left or has reset."""

    client: Hashable


class _Stop:
    """The server has stopped."""


class SessionRecorder:
    """Records the exchanges of a server's clients, in a thread of its own.

    All methods may be called in the event loop, because none of them waits for the disk (but
    `close`).

    Args:
        writer: writes the recordings. Only the recorder's thread uses it from now on.
        max_queued_bytes: exchanges of this size wait at most; further ones are not recorded.
    """

    def __init__(self, writer: "RecordingWriter", max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.num_dropped = 0  # exchanges that were not recorded
        self._writer = writer
        self._max_queued_bytes = max_queued_bytes
        self._queue: queue.SimpleQueue[Exchange | _EndOfEpisode | _Stop] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()  # of `_queued_bytes`
        self._recorded_clients: set[Hashable] = set()  # those whose episode may be open
        self._has_failed = False
        self._thread = threading.Thread(
            target=self._write_until_stopped, name="recorder", daemon=True
        )
        self._thread.start()

    def add(self, exchange: Exchange) -> None:
        """Queue an exchange for the recorder's thread, which writes it, and return at once.

        If the queue is full, or writing has failed, the exchange is counted as dropped.
        """
        with self._lock:
            queued_bytes = self._queued_bytes + exchange.num_bytes
            is_full = self._queued_bytes > 0 and queued_bytes > self._max_queued_bytes
            if not is_full and not self._has_failed:
                self._queued_bytes = queued_bytes
        if self._has_failed or is_full:
            self._record_drop()
            return
        self._recorded_clients.add(exchange.client)
        self._queue.put(exchange)

    def end_episode(self, client: Hashable) -> None:
        """End the episode of a client, if there is one."""
        if client in self._recorded_clients:
            self._recorded_clients.remove(client)
            self._queue.put(_EndOfEpisode(client))

    def close(self) -> None:
        """Write what still waits, and end all episodes."""
        self._queue.put(_Stop())
        self._thread.join(CLOSE_TIMEOUT_S)
        if self.num_dropped:
            num_dropped = format_count(self.num_dropped, "observations")
            notice(f"{self._writer.folder} lacks {num_dropped} that were answered.")

    def _record_drop(self) -> None:
        """Count an observation that is not recorded. The first one gives a notice."""
        self.num_dropped += 1
        if self.num_dropped == 1 and not self._has_failed:
            notice(
                f"observations arrive faster than they can be recorded in {self._writer.folder}. "
                "Some are not recorded; all are answered. Use a faster disk or fewer cameras."
            )

    def _write_until_stopped(self) -> None:
        """Write exchanges until the recorder is closed or writing fails. This is the thread."""
        try:
            while not isinstance(event := self._wait_for_event(), _Stop):
                if isinstance(event, Exchange):
                    self._writer.add(event)
                    with self._lock:
                        self._queued_bytes -= event.num_bytes
                elif isinstance(event, _EndOfEpisode):
                    self._writer.end_episode(event.client)
                self._writer.save_due_episodes(time.monotonic())
            self._writer.end_all()
        except SpearError as error:
            self._has_failed = True
            notice(f"nothing more is recorded, but robots are still answered, because {error}")
        except Exception:
            self._has_failed = True
            LOG.exception("recording failed; nothing more is recorded, robots are still answered")

    def _wait_for_event(self) -> Exchange | _EndOfEpisode | _Stop | None:
        """Wait for the next event; None if there is none for a while."""
        try:
            return self._queue.get(timeout=IDLE_INTERVAL_S)
        except queue.Empty:
            return None


class RecordingWriter:
    """Writes exchanges to a folder, each client's to an episode, and bounds the folder's size.

    Args:
        folder: a folder of recordings (`claim_folder`).
        session: what the server tells its clients (`Service.metadata`).
        max_bytes: the largest size of all recordings in the folder.

    Raises:
        SpearError: a file cannot be written. The methods raise this, too.
    """

    def __init__(self, folder: Path, session: Mapping[str, Any], max_bytes: int) -> None:
        self.folder = folder
        self._robot = session["embodiment"]
        self._note = {SESSION_NOTE: json.dumps(session)}
        self._max_bytes = max_bytes
        self._open_episodes: dict[Hashable, _OpenEpisode] = {}  # by client
        self._sizes: dict[str, int] = {}  # shard's name -> bytes on the disk, the oldest first
        self._has_deleted = False
        remove_unfinished_shards(folder)
        for path in list_shards(folder):
            if SHARD_NAME.fullmatch(path.name):
                num_bytes = path.stat().st_size
                num_image_bytes = path.with_suffix(".images").stat().st_size
                self._sizes[path.name] = sum_disk_bytes(num_bytes, num_image_bytes)

    def add(self, exchange: Exchange) -> None:
        """Append an exchange to the episode of its client, or begin an episode with it."""
        with convert_write_errors(self.folder):
            episode = self._open_episodes.get(exchange.client)
            if episode is not None and not self._is_continued_by(episode, exchange):
                self.end_episode(exchange.client)
                episode = None
            if episode is None:
                episode = self._begin_episode(exchange)
            episode.add(exchange)
            self._update_size(episode)
            self._delete_oldest_until_in_bounds()

    def end_episode(self, client: Hashable) -> None:
        """Write the rest of a client's episode, if there is one."""
        episode = self._open_episodes.pop(client, None)
        if episode is not None:
            self._save(episode, is_complete=True)

    def end_all(self) -> None:
        """Write the rest of all episodes."""
        for client in list(self._open_episodes):
            self.end_episode(client)

    def save_due_episodes(self, now_s: float) -> None:
        """Save the episodes that have new steps and were last saved `SAVE_INTERVAL_S` ago.

        `now_s` is the present time by the monotonic clock.
        """
        for episode in self._open_episodes.values():
            if episode.has_unsaved_steps and now_s - episode.last_saved_s > SAVE_INTERVAL_S:
                self._save(episode, is_complete=False)

    def _begin_episode(self, exchange: Exchange) -> "_OpenEpisode":
        """Begin a client's episode, with files that are named for its time."""
        start_time = datetime.fromtimestamp(exchange.arrival_s, UTC)
        while (name := format_shard_name(start_time)) in self._sizes:
            start_time += timedelta(microseconds=1)
        source = f"serve/{self._robot}/{exchange.address}/{start_time:%Y-%m-%dT%H:%M:%SZ}"
        shard = GrowingShard(self.folder / name)
        episode = _OpenEpisode(shard, source)
        self._open_episodes[exchange.client] = episode
        return episode

    def _is_continued_by(self, episode: "_OpenEpisode", exchange: Exchange) -> bool:
        """Return whether an exchange continues its client's episode."""
        previous_exchange = episode.exchanges[-1]
        return (
            _get_values_constant_in_episode(exchange)
            == _get_values_constant_in_episode(previous_exchange)
            and exchange.arrival_s - previous_exchange.answer_s <= MAX_PAUSE_S
            and len(episode.exchanges) < MAX_EPISODE_STEPS
            and episode.shard.num_image_bytes < MAX_EPISODE_SHARE * self._max_bytes
        )

    def _save(self, episode: "_OpenEpisode", is_complete: bool) -> None:
        """Write all steps of an episode up to now."""
        with convert_write_errors(self.folder):
            episode.save(self._note, is_complete)
            self._update_size(episode)

    def _update_size(self, episode: "_OpenEpisode") -> None:
        """Set the size of an episode's files in `_sizes`."""
        shard = episode.shard
        self._sizes[shard.path.name] = sum_disk_bytes(shard.num_table_bytes, shard.num_image_bytes)

    def _delete_oldest_until_in_bounds(self) -> None:
        """Delete the oldest episodes, also open ones, until the folder is within its bounds."""
        while sum(self._sizes.values()) > self._max_bytes or len(self._sizes) > MAX_EPISODES:
            name = next(iter(self._sizes))
            del self._sizes[name]
            for client, episode in list(self._open_episodes.items()):
                if episode.shard.path.name == name:
                    del self._open_episodes[client]
            # Without its Arrow file a shard does not count, so this file is deleted first.
            path = self.folder / name
            path.unlink(missing_ok=True)
            path.with_suffix(".images").unlink(missing_ok=True)
            if not self._has_deleted:
                self._has_deleted = True
                notice(
                    f"{self.folder} is full. From now on the oldest episodes are deleted. Give a "
                    "larger --max-record-gib to keep more."
                )


class _OpenEpisode:
    """An episode that is being recorded. Its exchanges are kept without their images.

    Args:
        shard: the episode's files.
        source: the episode's source.
    """

    def __init__(self, shard: GrowingShard, source: str) -> None:
        self.shard = shard
        self.exchanges: list[Exchange] = []
        # When the episode was last saved, or began, by the monotonic clock.
        self.last_saved_s = time.monotonic()
        self.has_unsaved_steps = False
        self._source = source

    def add(self, exchange: Exchange) -> None:
        """Append an exchange."""
        images: dict[str, bytes] = {}
        without_images = CheckedObservation()
        for key, value in exchange.observation.items():
            if is_camera_key(key):
                images[get_view_of_key(key)] = encode_jpeg(value)
                without_images[key] = (
                    None  # `_get_values_constant_in_episode` compares the cameras' keys
                )
            elif key in (STATE_KEY, PROMPT_KEY, COMMITTED_KEY):
                without_images[key] = value
        self.shard.append_images(images)
        self.exchanges.append(dataclasses.replace(exchange, observation=without_images))
        self.has_unsaved_steps = True

    def save(self, note: Mapping[str, str], is_complete: bool) -> None:
        """Write all steps up to now."""
        episode = make_episode_without_images(self.exchanges, self._source)
        self.shard.save(episode, collect_answer_columns(self.exchanges), note, is_complete)
        self.has_unsaved_steps = False
        self.last_saved_s = time.monotonic()


def _get_values_constant_in_episode(exchange: Exchange) -> tuple[Any, ...]:
    """Return what all exchanges of an episode have in common: instruction, cameras and shapes."""
    cameras = sorted(filter(is_camera_key, exchange.observation))
    return exchange.observation[PROMPT_KEY], cameras, exchange.actions.shape, exchange.rows.shape


def make_episode_without_images(exchanges: Sequence[Exchange], source: str) -> Episode:
    """Make an episode without images of T exchanges.

    The action of a step is what the robot executed until its next observation: the first action of
    the answer, or several that are composed to one. The rate is that of these actions.
    """
    states = np.array([exchange.observation[STATE_KEY] for exchange in exchanges])  # [T, 8]
    chunks = np.array([exchange.actions for exchange in exchanges])  # [T, H, 8]
    num_executed = estimate_num_executed_per_answer(exchanges, horizon=chunks.shape[1])
    action = compose_action_groups(chunks[:, :num_executed])
    action[:, 7] = action[:, 7].clip(0, 1)
    return Episode(
        images={},
        position=states[:, :3],
        rotation=states[:, 3:7],
        gripper=states[:, 7],
        instruction=exchanges[0].observation[PROMPT_KEY],
        rate_hz=CONTROL_RATE_HZ / num_executed,
        source=source,
        action=action,
        action_mask=np.ones(len(exchanges), bool),
    )


def estimate_num_executed_per_answer(exchanges: Sequence[Exchange], horizon: int) -> int:
    """Estimate how many actions of an answer a robot executes before its next observation.

    Most robots stand still while they wait for an answer, so they execute actions from the answer
    to the next observation. A robot that sends a committed prefix moves all the time. A robot in
    the execution mode "async" does so, too, but does not say it: for slow answers, the estimate is
    too low.

    Args:
        exchanges: T exchanges.
        horizon: H, the number of actions in an answer.
    """
    moves_while_waiting = any(COMMITTED_KEY in exchange.observation for exchange in exchanges)
    durations_s: list[float] = []
    for exchange, next_exchange in itertools.pairwise(exchanges):
        start_s = exchange.arrival_s if moves_while_waiting else exchange.answer_s
        durations_s.append(next_exchange.arrival_s - start_s)
    if not durations_s:
        return 1
    num_executed = round(float(np.median(durations_s)) * CONTROL_RATE_HZ)
    return min(max(num_executed, 1), horizon)


def collect_answer_columns(exchanges: Sequence[Exchange]) -> dict[str, Array]:
    """Collect times and answers of T exchanges in the columns of `ServedSteps`.

    Returns:
        Name of a column → [T, …].
    """
    num_steps = len(exchanges)
    num_rows = len(exchanges[0].rows)
    return {
        "arrival_s": np.array([exchange.arrival_s for exchange in exchanges]),
        "answer_s": np.array([exchange.answer_s for exchange in exchanges]),
        "inference_s": np.array([exchange.inference_s for exchange in exchanges]),
        "actions": np.array([exchange.actions for exchange in exchanges], np.float32),
        "num_rows": np.full(num_steps, num_rows, np.int32),
        "rows": np.array([exchange.rows for exchange in exchanges], np.float64),
    }


def format_shard_name(start_time: datetime) -> str:
    """Name the Arrow file of an episode for the time at which it began.

    The names sort by time. The other shards of an episode store end with their number, and readers
    report a missing number. These names end with "Z" instead, so no reader takes the microseconds
    for a number and reports that the numbers in between are missing.

    Example:
        >>> format_shard_name(datetime(2026, 11, 30, 6, 50, 12, 345678))
        'episodes-20261130T065012-345678Z.arrow'
    """
    return f"episodes-{start_time:%Y%m%dT%H%M%S}-{start_time:%f}Z.arrow"


def sum_disk_bytes(*file_sizes: int) -> int:
    """Return the bytes that files take on a disk: each its size, rounded up to whole blocks."""
    num_blocks = sum(max(1, math.ceil(num_bytes / FILE_BLOCK_BYTES)) for num_bytes in file_sizes)
    return num_blocks * FILE_BLOCK_BYTES


@contextlib.contextmanager
def open_recorder(
    claimed_folder: Path, service: Service, max_bytes: int
) -> Iterator[SessionRecorder]:
    """Record what a service observes and answers, as long as the `with` block runs.

    Args:
        claimed_folder: the folder of the recordings, which `claim_folder` has claimed.
        service: the service.
        max_bytes: the largest size of all recordings in the folder.

    Raises:
        SpearError: the folder has recordings whose poses are in other frames.
    """
    embodiment = service.embodiment
    frames = {}
    if embodiment.frame is not None:
        frames[embodiment.frame] = embodiment.frame_version
    write_or_check_marker(claimed_folder, frames)
    recorder = SessionRecorder(RecordingWriter(claimed_folder, service.metadata, max_bytes))
    try:
        yield recorder
    finally:
        recorder.close()


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Make a folder of recordings, and let one server at a time record into it.

    A new or empty folder becomes private: other users cannot list it. A folder of earlier
    recordings keeps its permissions.

    Raises:
        SpearError: the folder has other files, which could be deleted by mistake, or another server
            records into it.
    """
    check_empty_or_own_folder(folder, REQUEST_FILE, "record")
    with acquire_run_lock(folder, "recording into", REQUEST_FILE):
        if (folder / REQUEST_FILE).is_file():
            read_marker(folder)
        else:
            with convert_write_errors(folder):
                folder.chmod(PRIVATE_FOLDER_MODE)
        yield


def write_or_check_marker(folder: Path, frame_versions: Mapping[str, int]) -> None:
    """Mark a folder as one of recordings, with the versions of the frames of their poses.

    Raises:
        SpearError: the folder has recordings in other versions.
    """
    marker_file = folder / REQUEST_FILE
    if marker_file.is_file():
        recorded_frames = read_marker(folder)["frames"]
        if recorded_frames != frame_versions:
            raise SpearError(
                f"{folder} has recordings in other frames ({recorded_frames}, now "
                f"{frame_versions}). Choose another folder."
            )
        return
    write_text(
        marker_file, json.dumps({"recorded_by": RECORDED_BY, "frames": dict(frame_versions)})
    )
    marker_file.chmod(PRIVATE_FILE_MODE)


def read_marker(folder: Path) -> dict[str, Any]:
    """Read the file that marks a folder of recordings.

    Raises:
        SpearError: it marks a prepared dataset.
    """
    marker = read_json(folder / REQUEST_FILE, "choose another folder")
    if marker.get("recorded_by") != RECORDED_BY:
        raise SpearError(f"{folder} is a prepared dataset. Choose an empty folder to record into.")
    return marker
