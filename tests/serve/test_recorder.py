"""`spear serve --record`: sessions over real sockets become episodes that other code reads."""

import dataclasses
import errno
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as connect_websocket

from data_tiny import make_episode
from processes import wait_until
from refusals import refuses
from serve_here import HomingPolicy, http_get, make_homing_chunk, run_python, run_server
from spear import embodiments
from spear.audit.inspect import describe_dataset
from spear.data.store.episode_store import REQUEST_FILE, EpisodeStore, append_episodes, list_shards
from spear.embodiments.observations import validate_observation
from spear.errors import Notice
from spear.evaluate.open_loop import measure_policy_errors
from spear.serve import recorder as recorder_module
from spear.serve import wire
from spear.serve.client import RemotePolicy
from spear.serve.exchange import Exchange
from spear.serve.recorder import (
    RecordingWriter,
    SessionRecorder,
    claim_folder,
    open_recorder,
    write_or_check_marker,
)
from spear.serve.server import PolicyServer
from spear.serve.service import Service
from spear.util.images import decode_image

GENERIC = embodiments.load("generic")
SESSION = {"policy": "test", "embodiment": "generic"}
MIB = 2**20
WAIT_S = 60.0

RECORDING_SERVER_CODE = """
from serve_here import *
from spear.serve import recorder as recorder_module
recorder_module.SAVE_INTERVAL_S = 0
folder = Path(sys.argv[1])
service = Service(HomingPolicy(), embodiments.load("generic"))
with (
    recorder_module.claim_folder(folder),
    recorder_module.open_recorder(folder, service, 2**30) as recorder,
):
    server = PolicyServer(service, ServeOptions("test", port=0), recorder=recorder)
    asyncio.run(server.run(lambda server: print(server.port, flush=True)))
"""


def make_observation(x: float = 0.4, **changes: Any) -> dict[str, Any]:
    """An observation with the arm at `x` (m, base frame); `changes` replace other entries."""
    observation = GENERIC.example()
    observation["observation/state"][0] = x
    return {**observation, **changes}


@contextmanager
def run_recording_server(
    folder: Path, robot: str = "generic", max_bytes: int = 1024 * MIB
) -> Iterator[PolicyServer]:
    """Run a server that records into a folder, and wait at the end until all is written."""
    service = Service(HomingPolicy(), embodiments.load(robot), "test", robot)
    with (
        claim_folder(folder),
        open_recorder(folder, service, max_bytes) as recorder,
        run_server(robot=robot, recorder=recorder) as server,
    ):
        yield server


@contextmanager
def connect(server: PolicyServer) -> Iterator[RemotePolicy]:
    with closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as policy:
        yield policy


def make_exchange(step: int = 0, interval_s: float = 0.2, **changes: Any) -> Exchange:
    """The exchange of a robot that asks every `interval_s` and moves along x."""
    observation = make_observation(0.2 + 0.01 * step)
    chunk = make_homing_chunk(observation["observation/state"])
    arrival_s = 1e9 + step * interval_s  # Unix time, from any moment on
    exchange = Exchange(
        client="robot",
        address="192.0.2.1:1234",
        arrival_s=arrival_s,
        answer_s=arrival_s + 0.05,
        inference_s=0.04,
        observation=validate_observation(observation),
        actions=chunk,
        rows=chunk,  # this robot's commands are the policy's actions
        num_bytes=1000,
    )
    return dataclasses.replace(exchange, **changes)


@pytest.fixture
def writer(tmp_path: Path) -> RecordingWriter:
    return RecordingWriter(tmp_path, SESSION, max_bytes=1024 * MIB)


def test_states_and_actions_are_those_that_were_sent_and_answered(tmp_path: Path) -> None:
    observations = [make_observation(x, prompt="lift the cup") for x in (0.5, 0.4, 0.3)]

    with run_recording_server(tmp_path / "new") as server, connect(server) as policy:
        answers = [policy.infer(observation)["actions"] for observation in observations]

    (episode,) = EpisodeStore(tmp_path / "new")
    assert episode.instruction == "lift the cup"
    states = np.array([observation["observation/state"] for observation in observations])
    np.testing.assert_allclose(episode.position, states[:, :3], atol=1e-7)
    np.testing.assert_allclose(episode.rotation, states[:, 3:7], atol=1e-6)
    np.testing.assert_allclose(episode.gripper, states[:, 7], atol=1e-7)
    first_actions = np.array([answer[0] for answer in answers])
    np.testing.assert_allclose(episode.action, first_actions, atol=1e-7)


def test_images_are_those_that_were_sent_up_to_jpeg(tmp_path: Path) -> None:
    observation = make_observation()

    with run_recording_server(tmp_path / "new") as server, connect(server) as policy:
        policy.infer(observation)

    (episode,) = EpisodeStore(tmp_path / "new")
    for camera, key in (("external", "image"), ("wrist", "wrist_image")):
        sent_image = observation[f"observation/{key}"].astype(int)
        recorded_image = decode_image(episode.images[camera][0])
        # JPEG changes a single level of 255 by less than 16, and levels by less than 2 on average.
        assert np.abs(recorded_image - sent_image).max() < 16
        assert np.abs(recorded_image - sent_image).mean() < 2


def test_answers_and_times_are_kept(tmp_path: Path) -> None:
    """The DROID robot gets joint velocities, which its control makes from the policy's actions."""
    observation = embodiments.load("droid").example()

    before_s = time.time()
    with run_recording_server(tmp_path / "new", "droid") as server, connect(server) as policy:
        rows = policy.infer(observation)["actions"]
    after_s = time.time()

    served = EpisodeStore(tmp_path / "new").served_steps(0)
    assert served is not None
    assert served.actions.shape == (1, 5, 8)
    np.testing.assert_array_equal(served.rows[0], rows)
    assert before_s <= served.arrival_s[0] <= served.answer_s[0] <= after_s
    assert 0 <= served.inference_s[0] <= served.answer_s[0] - served.arrival_s[0]
    assert served.session["control"] == "joint_velocity"


def test_the_source_names_the_robot_and_the_client(tmp_path: Path) -> None:
    with run_recording_server(tmp_path / "new") as server, connect(server) as policy:
        policy.infer(make_observation())

    assert EpisodeStore(tmp_path / "new").source(0).startswith("serve/generic/127.0.0.1:")


def test_a_store_that_no_server_recorded_has_no_served_steps(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path)

    assert EpisodeStore(tmp_path).served_steps(0) is None


def test_each_connection_is_an_episode(tmp_path: Path) -> None:
    with (
        run_recording_server(tmp_path / "new") as server,
        connect(server) as first,
        connect(server) as second,
    ):
        first.infer(make_observation())
        second.infer(make_observation())
        first.infer(make_observation())

    assert EpisodeStore(tmp_path / "new").lengths.tolist() == [2, 1]


def test_another_instruction_begins_an_episode(tmp_path: Path) -> None:
    with run_recording_server(tmp_path / "new") as server, connect(server) as policy:
        policy.infer(make_observation(prompt="lift the cup"))
        policy.infer(make_observation(prompt="lift the spoon"))

    instructions = [episode.instruction for episode in EpisodeStore(tmp_path / "new")]
    assert instructions == ["lift the cup", "lift the spoon"]


def test_a_reset_begins_an_episode(tmp_path: Path) -> None:
    recorder = SessionRecorder(RecordingWriter(tmp_path, SESSION, 1024 * MIB))
    recorder.add(make_exchange(0))
    recorder.end_episode("robot")
    recorder.add(make_exchange(1))
    recorder.close()

    assert EpisodeStore(tmp_path).lengths.tolist() == [1, 1]


def test_a_request_to_reset_ends_the_episode(tmp_path: Path) -> None:
    observation = embodiments.load("roboarena").example()

    with run_recording_server(tmp_path / "new", "roboarena") as server:
        with connect_roboarena(server) as ask:
            ask(observation)
            ask({"endpoint": "reset"})
            ask(observation)

    assert EpisodeStore(tmp_path / "new").lengths.tolist() == [1, 1]


@contextmanager
def connect_roboarena(server: PolicyServer) -> Iterator[Any]:
    """Connect as RoboArena's client, whose requests to reset have no images."""
    with connect_websocket(f"ws://127.0.0.1:{server.port}", compression=None) as connection:
        connection.recv()  # the greeting

        def ask(request: dict[str, Any]) -> None:
            connection.send(wire.encode(request))
            connection.recv()

        yield ask


def test_a_refused_observation_is_not_recorded(tmp_path: Path) -> None:
    with run_recording_server(tmp_path / "new") as server, connect(server) as policy:
        refuses("prompt", policy.infer, make_observation(prompt=""))
        policy.infer(make_observation())

    assert EpisodeStore(tmp_path / "new").lengths.tolist() == [1]


def test_a_long_pause_begins_an_episode(tmp_path: Path, writer: RecordingWriter) -> None:
    writer.add(make_exchange(0, interval_s=60))
    writer.add(make_exchange(1, interval_s=60))
    writer.end_all()

    assert EpisodeStore(tmp_path).lengths.tolist() == [1, 1]


def test_an_endless_session_is_cut_into_episodes(
    tmp_path: Path, writer: RecordingWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_EPISODE_STEPS", 3)

    for step in range(7):
        writer.add(make_exchange(step))
    writer.end_all()

    assert EpisodeStore(tmp_path).lengths.tolist() == [3, 3, 1]


@pytest.mark.parametrize(
    ("interval_s", "num_executed"),  # (interval_s - 0.05 s) / 0.2 s, rounded, 1 … 5
    [(0.06, 1), (0.26, 1), (0.46, 2), (1.05, 5), (3.0, 5)],
)
def test_the_action_of_a_step_is_all_that_the_robot_executes_until_the_next_one(
    interval_s: float, num_executed: int, tmp_path: Path, writer: RecordingWriter
) -> None:
    """A robot gets an answer after 0.05 s, and executes the five equal actions of its chunk.

    An action takes 0.2 s, so the robot executes as many actions as fit best between an answer and
    the next observation, at least one and at most all five.
    """
    for step in range(4):
        writer.add(make_exchange(step, interval_s))
    writer.end_all()

    (episode,) = EpisodeStore(tmp_path)
    first_action = make_exchange(0).actions[0]
    assert episode.action is not None
    np.testing.assert_allclose(episode.action[0, :3], num_executed * first_action[:3], atol=1e-6)
    assert episode.rate_hz == 5 / num_executed


@pytest.mark.parametrize(("changes", "rate_hz"), [({}, 5.0), ({"committed": np.ones(8)}, 2.5)])
def test_a_robot_that_sends_committed_actions_moves_while_it_waits(
    changes: dict[str, Any], rate_hz: float, tmp_path: Path, writer: RecordingWriter
) -> None:
    """The answers take half of the 0.4 s between two observations, so the time of one action.

    A robot that stands still while it waits executes one action per observation (5 Hz). A robot
    that moves meanwhile executes two, which together are one step of the episode (2.5 Hz).
    """
    for step in range(4):
        exchange = make_exchange(step, interval_s=0.4)
        exchange.observation.update(changes)
        writer.add(dataclasses.replace(exchange, answer_s=exchange.arrival_s + 0.2))
    writer.end_all()

    assert EpisodeStore(tmp_path)[0].rate_hz == rate_hz


def test_a_recording_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "new"

    with run_recording_server(folder) as server, connect(server) as policy:
        policy.infer(make_observation())

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in (REQUEST_FILE, *(path.name for path in folder.glob("episodes-*"))):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_permissions_that_were_given_later_stay(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with run_recording_server(folder):
        pass
    folder.chmod(0o750)

    with run_recording_server(folder):
        pass

    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_the_oldest_episodes_make_room_for_new_ones(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, SESSION, max_bytes=MIB)

    with pytest.warns(Notice, match="is full") as notices:
        for number in range(100):
            writer.add(make_exchange(number, interval_s=60))
    writer.end_all()

    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("episodes-*"))
    store = EpisodeStore(tmp_path)
    assert len(notices) == 1
    assert num_bytes <= MIB
    assert num_bytes > MIB / 2
    assert len(store) < 100
    last_position = make_exchange(99).observation["observation/state"][:3]
    last_episode = store[len(store) - 1]
    np.testing.assert_allclose(last_episode.position[0], last_position, atol=1e-6)


def test_one_long_episode_does_not_exceed_the_bound(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, SESSION, max_bytes=MIB)

    with pytest.warns(Notice, match="is full"):
        for step in range(200):
            writer.add(make_exchange(step))
    writer.end_all()

    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("episodes-*"))
    assert num_bytes <= MIB
    assert len(EpisodeStore(tmp_path)) > 1


def test_recordings_of_earlier_servers_count_and_are_deleted_first(tmp_path: Path) -> None:
    first_writer = RecordingWriter(tmp_path, SESSION, max_bytes=MIB)
    first_writer.add(make_exchange())
    first_writer.end_all()
    (first_shard,) = list_shards(tmp_path)

    second_writer = RecordingWriter(tmp_path, SESSION, max_bytes=MIB)
    with pytest.warns(Notice, match="is full"):
        for number in range(1, 100):
            second_writer.add(make_exchange(number, interval_s=60))

    assert not first_shard.exists()


def test_only_recordings_are_deleted(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path)
    (demonstrations,) = list_shards(tmp_path)

    writer = RecordingWriter(tmp_path, SESSION, max_bytes=MIB)
    with pytest.warns(Notice, match="is full"):
        for number in range(100):
            writer.add(make_exchange(number, interval_s=60))

    assert demonstrations.exists()


class SlowWriter(RecordingWriter):
    """A writer whose disk does nothing until `is_disk_free` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SESSION, max_bytes=1024 * MIB)
        self.is_disk_free = threading.Event()

    def add(self, exchange: Exchange) -> None:
        self.is_disk_free.wait(WAIT_S)
        super().add(exchange)


def test_a_full_queue_drops_observations_and_counts_them(tmp_path: Path) -> None:
    writer = SlowWriter(tmp_path)
    recorder = SessionRecorder(writer, max_queued_bytes=3000)

    with pytest.warns(Notice, match="faster than they can be recorded") as notices:
        for step in range(10):
            recorder.add(make_exchange(step))  # of 1000 bytes each
    writer.is_disk_free.set()
    with pytest.warns(Notice, match="lacks 7 observations"):
        recorder.close()

    assert len(notices) == 1
    assert recorder.num_dropped == 7
    assert EpisodeStore(tmp_path).lengths.tolist() == [3]


def test_metrics_count_what_was_not_recorded(tmp_path: Path) -> None:
    with run_recording_server(tmp_path / "new") as server:
        metrics = http_get(server, "/metrics")[2]

    assert "spear_unrecorded 0.0" in metrics


def test_metrics_say_nothing_of_recording_without_a_recorder() -> None:
    with run_server() as server:
        assert "unrecorded" not in http_get(server, "/metrics")[2]


class FullDiskWriter(RecordingWriter):
    """A writer whose disk is full after one exchange."""

    def _begin_episode(self, exchange: Exchange) -> Any:
        is_first_exchange = not self._open_episodes and not list_shards(self.folder)
        if not is_first_exchange:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super()._begin_episode(exchange)


def test_a_full_disk_ends_recording_but_not_serving(tmp_path: Path) -> None:
    recorder = SessionRecorder(FullDiskWriter(tmp_path, SESSION, 1024 * MIB))

    with pytest.warns(Notice, match="nothing more is recorded.*disk is full"):
        with run_server(recorder=recorder) as server, connect(server) as policy:
            policy.infer(make_observation(prompt="lift the cup"))
            wait_until(
                lambda: (
                    policy.infer(make_observation(prompt="lift the spoon")) and recorder.num_dropped
                ),
                "an answer that is not recorded",
            )
        recorder.close()

    assert len(EpisodeStore(tmp_path)) == 1


def test_an_episode_can_be_read_while_it_is_recorded(
    tmp_path: Path, writer: RecordingWriter
) -> None:
    later_s = time.monotonic() + 3600  # when the episode has to be saved again
    writer.add(make_exchange(0))
    writer.save_due_episodes(later_s)
    writer.add(make_exchange(1))  # its images are on the disk, but nothing refers to them yet

    store = EpisodeStore(tmp_path)
    episode = store[0]

    assert len(episode) == 1
    assert decode_image(episode.images["external"][0]).shape[2] == 3


def test_a_kill_leaves_a_readable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    arguments = {"cwd": Path(__file__).parents[1] / "support"}

    with run_python(RECORDING_SERVER_CODE, str(folder), **arguments) as process:
        port = int(process.stdout.readline())
        with closing(RemotePolicy(f"ws://127.0.0.1:{port}")) as policy:
            for step in range(5):
                policy.infer(make_observation(0.1 * step))
            wait_until(
                lambda: list_shards(folder) and EpisodeStore(folder).lengths[0] == 5,
                "the fifth observation on the disk",
            )
            process.kill()

    (episode,) = EpisodeStore(folder)
    np.testing.assert_allclose(episode.position[:, 0], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    assert len(episode.images["wrist"]) == 5


def test_recording_goes_on_in_the_folder_of_a_killed_server(tmp_path: Path) -> None:
    """The killed server leaves an unfinished table, and images that nothing refers to."""
    with run_recording_server(tmp_path) as server, connect(server) as policy:
        policy.infer(make_observation())
    (tmp_path / ".episodes-20261130T065012-345678Z.arrow").write_bytes(b"half a table")
    (tmp_path / "episodes-20261130T065012-345678Z.images").write_bytes(b"images")

    with run_recording_server(tmp_path) as server, connect(server) as policy:
        policy.infer(make_observation())

    assert len(EpisodeStore(tmp_path)) == 2
    assert not list(tmp_path.glob("*065012-345678Z*"))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")

    refuses("contains other files", claim_folder(tmp_path).__enter__)


def test_a_prepared_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / REQUEST_FILE).write_text('{"path": "bridge"}')

    refuses("is a prepared dataset", claim_folder(tmp_path).__enter__)


def test_two_servers_do_not_record_into_one_folder(tmp_path: Path) -> None:
    with claim_folder(tmp_path):
        refuses("another process is recording", claim_folder(tmp_path).__enter__)


def test_recordings_in_other_frames_are_refused(tmp_path: Path) -> None:
    write_or_check_marker(tmp_path, {"droid": 1})

    refuses("other frames", write_or_check_marker, tmp_path, {"droid": 2})


def test_a_recording_says_the_versions_of_its_frames(tmp_path: Path) -> None:
    with run_recording_server(tmp_path / "new", "droid") as server, connect(server) as policy:
        policy.infer(embodiments.load("droid").example())

    droid = embodiments.load("droid")
    assert EpisodeStore(tmp_path / "new").frame_versions == {droid.frame: droid.frame_version}


def test_data_inspect_describes_a_recording(tmp_path: Path, writer: RecordingWriter) -> None:
    for step in range(4):
        writer.add(make_exchange(step))
    writer.end_all()

    description = describe_dataset(tmp_path)

    assert "4 steps" in description
    assert "1 unknown" in description  # the one episode, of which nobody knows the success


def test_a_policy_agrees_with_a_recording_of_itself(
    tmp_path: Path, writer: RecordingWriter
) -> None:
    for step in range(8):
        writer.add(make_exchange(step))
    writer.end_all()

    errors = measure_policy_errors("same policy", HomingPolicy(), EpisodeStore(tmp_path))

    np.testing.assert_allclose(errors.predicted[0], errors.truth[0], atol=1e-6)


def test_a_server_that_does_not_record_does_not_load_the_recorder() -> None:
    code = (
        "import sys, spear.serve.server; "
        "print('spear.serve.recorder' in sys.modules, 'pyarrow' in sys.modules)"
    )

    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    assert output == "False False\n"
