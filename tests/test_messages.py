"""What a user reads after a mistake: a hundred mistakes, each with the message that it brings.

The messages are in `tests/messages.txt`, to be read from top to bottom. To write the file again
after a change, run this test with the environment variable SPEAR_WRITE_MESSAGES set, and read what
has changed aloud.
"""

import errno
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from data_tiny import copy_dataset, edit_json, make_episode, write_store
from labels_stand_ins import make_engine, write_photos
from spear import embodiments
from spear.cli import main
from spear.data.mixture import Mixture
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.lerobot_write import write_lerobot
from spear.embodiments.actions import validate_chunk
from spear.errors import SpearError, import_optional
from spear.labels.inputs import list_images
from spear.labels.options import WorkOptions
from spear.labels.run import label_into_folder
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.serve import wire
from spear.util.files import write_bytes
from spear.util.run_lock import acquire_run_lock
from spear.util.skipped_items import SkippedItems

SNAPSHOT = Path(__file__).with_name("messages.txt")
NANO_FILES = ("config.json", "coordinates.json", "processor.json", "tokenizer.json")
EMPTY_TAR_BYTES = 10240

COMMANDS = """
evalute
version
--steps
evaluate --polcy nano
evaluate --xyz 3
evaluate --scenes 8
train list
train
train nano-vlm2 --labels photos
train nano-post
train nano-post --init nano --episodes arm --grad-clip 1
train nano-post --init nano --episodes arm --set learning_rate=1e-4
train nano-post --init nano --episodes arm --set lr
train nano-post --init nano --episodes arm --set lr=-1
train nano-post --init nano --episodes arm --set batch_size=two
train nano-post --init nano --episodes arm --set lr=1 --set ema=0
train nano-post --init nano --episodes arm --lr 1e-4 --set lr=1e-3
train nano-post --init nano --episodes arm --sampling-weights 1 2
train nano-post --init nano --episodes nowhere
train nano-post --init nano --episodes photos
train nano-post --init nano --episodes store --out notes.txt/run
train nano-post --init nano --episodes store --out photos-and-labels
train nano-vla --init nano --episodes store --labels labels
serve
serve --policy nano --port 99999
serve --policy nano --embodiment robot.py
serve --policy nano --embodiment widowx
serve --policy nano --embodiment droid --control joints
serve --policy nano --token schlüssel
serve --policy nano --replan-steps 2
serve --policy nano-vlm
evaluate --policy nowhere
evaluate --policy without-weights
evaluate --policy truncated
evaluate --policy other-model
evaluate --policy ws://127.0.0.1:9
evaluate --policy expert --tasks pick_up
evaluate --policy expert --num-scenes x
evaluate --policy expert --num-scenes
evaluate --policy expert --num-scenes 0
evaluate --policy expert --first-seed 9999
evaluate --policy expert --num-scenes 1 --shard 2/2
evaluate --policy expert --num-scenes 1 --shard 3/2
evaluate --policy nano --replan-steps 9
evaluate compare notes.txt notes.txt
evaluate vqa
evaluate vqa --model nano-vlm --labels nowhere
evaluate simpler --policy expert
evaluate data --policy nano --episodes nowhere
evaluate data --policy nano runs/mine --episodes arm
data datasets all
ask absent.png 'how far is the mug?'
ask notes.txt 'how far is the mug?'
ask sim:7
ask sim:7 ' '
ask sim:10000 'how far is the mug?'
ask sim:7 'how far?' --view left
ask sim:7 'how far?' --save-image box.txt
label nowhere.jpg
label empty
label photos --detector gemni
label photos --detector owlv2
label photos --detector file:absent.json
label photos
label photos --num-scenes 3
label photos --fps 0
label --num-scenes 3 --vocabulary mug
label sim:x
label broken.tar --detector owlv2 --vocabulary mug
label show photos
questions photos
record --first-seed 5
record --tasks stack_cubes
data inspect photos
data describe store
data audit unknown-layout
data prepare arm
data prepare arm --out store --workers 0
data prepare arm --out out --image-size 280
data prepare arm --out out --split train[:5
data prepare arm --out out --split train[5:] --workers 0
data prepare arm --out out --split trian
data prepare arm --out out --layout absent.json
data prepare unknown-layout --out out --workers 0
data prepare broken-json --out out --workers 0
data prepare unknown-key --out out --workers 0
data prepare wrong-value --out out --workers 0
data prepare wrong-choice --out out --workers 0
data prepare missing-fields --out out --workers 0
data prepare quaternion-order --out out --workers 0
data prepare joints --out out --workers 0
data prepare wrong-column --out out --workers 0
data prepare wrong-gripper-range --out out --workers 0
data prepare git-lfs --out out --workers 0
data prepare broken-info --out out --workers 0
estimate-memory --recipe finetune-lora --gpu big
estimate-memory --recipe nano-depth --gpu 24GB
convert vlm photos --out out
convert expected mog
doctor --out notes.txt/page.html
"""
"""Commands with a mistake, each in a line without the word "spear"."""


def change_layout(dataset: Path, target: Path, **changes: Any) -> None:
    """Copy a dataset and change keys of its `spear.json`; the value None removes a key."""
    layout = {**json.loads((dataset / "spear.json").read_text()), **changes}
    copy_dataset(dataset, target, {key: layout[key] for key in layout if layout[key] is not None})


def write_datasets(desk: Path) -> None:
    """Write a LeRobot dataset, and copies with one mistake each."""
    arm = desk / "arm"
    write_lerobot([make_episode(index) for index in range(3)], arm)
    write_store([make_episode(index) for index in range(3)], desk / "store")

    copy_dataset(arm, desk / "unknown-layout", layout=None)
    (desk / "unknown-layout/spear.json").unlink()
    copy_dataset(arm, desk / "broken-json", layout=None)
    (desk / "broken-json/spear.json").write_text('{\n  "images": {')
    change_layout(arm, desk / "unknown-key", camera="external")
    change_layout(arm, desk / "wrong-value", rate_hz="fast")
    change_layout(arm, desk / "wrong-choice", rotation_format="quat_wxzy")
    change_layout(arm, desk / "missing-fields", position=None, images=None)
    change_layout(arm, desk / "quaternion-order", rotation_format="quat_xyzw")
    change_layout(arm, desk / "wrong-column", position="observation/pose")
    change_layout(arm, desk / "wrong-gripper-range", gripper_range=[0.0, 0.08])
    change_layout(arm, desk / "joints")
    edit_json(desk / "joints/meta/info.json", name_joints)
    change_layout(arm, desk / "git-lfs")
    (data_file,) = (desk / "git-lfs").glob("data/*/*.parquet")
    data_file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    change_layout(arm, desk / "broken-info")
    edit_json(desk / "broken-info/meta/info.json", lambda info: info.update(fps=0))


def name_joints(info: dict[str, Any]) -> None:
    """Name the numbers of a dataset's state as those of joints."""
    names = [f"joint_{number}.pos" for number in range(8)]
    info["features"]["observation.state"]["names"] = names


def write_checkpoints(desk: Path) -> None:
    """Write folders that are no complete policy."""
    for name in ("without-weights", "truncated", "other-model"):
        (desk / name).mkdir()
        for file in NANO_FILES:
            shutil.copy(BUNDLED_WEIGHTS / "nano" / file, desk / name / file)
    (desk / "truncated/model.safetensors").write_bytes(b"\0" * 9)
    (desk / "other-model/config.json").write_text('{"model_type": "gemma"}')


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the mistakes are made."""
    desk = tmp_path_factory.mktemp("desk")
    write_photos(desk / "photos", 2, bad=False)
    (desk / "empty").mkdir()
    (desk / "notes.txt").write_text("buy milk")
    (desk / "coco.json").write_text("{}")
    (desk / "broken.tar").write_bytes(b"\1" * EMPTY_TAR_BYTES)
    (desk / "photos-and-labels").mkdir()
    (desk / "photos-and-labels/labels-00000.parquet").touch()
    write_datasets(desk)
    write_checkpoints(desk)
    return desk


@pytest.fixture(autouse=True)
def work_at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test run in the folder `desk`, without keys and without a network."""
    monkeypatch.chdir(desk)
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "SPEAR_TOKEN", "SPEAR_LIBERO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# Mistakes that are not made on the command line


def read_observation(**changes: Any) -> None:
    """Read an observation with other values under some keys; the value None removes a key."""
    robot = embodiments.load("generic")
    observation = robot.example()
    for name, value in changes.items():
        key = name if name == "prompt" else f"observation/{name}"
        observation[key] = value
        if value is None:
            del observation[key]
    robot.read(observation)


def change_state(index: int, value: float) -> np.ndarray:
    """Return the state of the example with another number at an index."""
    state = embodiments.load("generic").example()["observation/state"].copy()
    state[index] = value
    return state


def fill_the_disk() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        def fail(path: Path, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", fail)
        write_bytes(Path("runs/page.html"), b"page")


def import_a_missing_package() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "mujoco", None)
        import_optional("mujoco", "sim", "the simulator")


def label_with_other_settings() -> None:
    """Label two photos, and then again with another rate."""
    for rate in (None, 2):
        settings = {"inputs": ["photos"], "rate": rate}
        label_into_folder(
            list_images("photos"), Path("labels"), make_engine(), settings, WorkOptions()
        )


def lock_twice() -> None:
    with (
        acquire_run_lock(Path("arm"), "preparing data in"),
        acquire_run_lock(Path("arm"), "preparing data in"),
    ):
        pass


def skip_most_episodes() -> None:
    skipped = SkippedItems(limit=0.5)
    for number in range(3):
        skipped(f"set#{number} has no steps. Leave the episode out.")
    skipped.check_limit(num_good=1, is_finished=True)


def mix_rates() -> None:
    fast = write_store([make_episode(0, rate_hz=10.0)], Path("fast"))
    Mixture([WeightedStore("fast", fast, 1.0)])


def truncate_a_shard() -> None:
    shutil.copytree("store", "truncated-store")
    (shard,) = Path("truncated-store").glob("*.arrow")
    os.truncate(shard, 100)
    EpisodeStore("truncated-store")


IMAGE = np.zeros((4, 4), np.uint8)
MISTAKES: dict[str, Callable[[], Any]] = {
    "an observation without a state": lambda: read_observation(state=None),
    "an observation with an unknown key": lambda: read_observation(imag=IMAGE),
    "a gray image": lambda: read_observation(image=IMAGE),
    "a tiny image": lambda: read_observation(image=np.zeros((4, 4, 3), np.uint8)),
    "a state of seven numbers": lambda: read_observation(state=np.zeros(7)),
    "a state with NaN": lambda: read_observation(state=change_state(0, np.nan)),
    "a position in millimeters": lambda: read_observation(state=change_state(0, 450)),
    "a gripper in percent": lambda: read_observation(state=change_state(7, 80)),
    "a long instruction": lambda: read_observation(prompt="pick " * 1000),
    "no instruction": lambda: read_observation(prompt=""),
    "an observation that is a list": lambda: embodiments.load("generic").read([1]),
    "a message that is no msgpack": lambda: wire.decode(b"\xc1"),
    "a message that is a number": lambda: wire.decode(msgpack.packb(7)),
    "a message with an object": lambda: wire.encode({"image": object()}),
    "actions with NaN": lambda: validate_chunk(np.full((5, 8), np.nan)),
    "actions that are too long": lambda: validate_chunk(
        np.tile([9, 0, 0, 1, 0, 0, 0, 1.0], (5, 1))
    ),
    "a full disk": fill_the_disk,
    "a missing extra": import_a_missing_package,
    "labels with other settings": label_with_other_settings,
    "two commands that write to one folder": lock_twice,
    "a dataset with mostly bad episodes": skip_most_episodes,
    "a store with another rate": mix_rates,
    "a truncated shard": truncate_a_shard,
}


# The snapshot


def read_snapshot() -> dict[str, str]:
    """Read the messages: the line that names the mistake → the lines below it."""
    # An entry begins with "$ " and a command, or with "# " and a key of `MISTAKES`.
    entries = re.split(r"^(?=[$#] )", SNAPSHOT.read_text("utf-8"), flags=re.MULTILINE)
    messages = {}
    for entry in entries:
        mistake, _, message = entry.strip().partition("\n")
        if mistake:
            messages[mistake] = message
    return messages


def to_snapshot(text: str, desk: Path) -> str:
    """Remove the paths that differ between machines, and NUL characters, from a message."""
    text = text.replace(f"{desk}/", "").replace(str(BUNDLED_WEIGHTS), "WEIGHTS")
    return text.replace("\0", "").strip()


def check_message(mistake: str, message: str) -> None:
    """Compare a message with the snapshot; or write it there, if the user asks for that."""
    if "SPEAR_WRITE_MESSAGES" in os.environ:
        messages = (
            {**read_snapshot(), mistake: message} if SNAPSHOT.exists() else {mistake: message}
        )
        entries = [f"{key}\n{value}\n" for key, value in messages.items()]
        SNAPSHOT.write_text("\n".join(entries), "utf-8")
    assert message == read_snapshot().get(mistake)


@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_a_command_with_a_mistake_says_what_happened_and_what_to_do(
    command: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code = main(shlex.split(command))

    message = to_snapshot(capsys.readouterr().err, desk)
    assert exit_code == 2
    check_message(f"$ spear {command}", message)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_elsewhere_says_what_happened_and_what_to_do(mistake: str, desk: Path) -> None:
    with pytest.raises(SpearError) as caught:
        MISTAKES[mistake]()

    check_message(f"# {mistake}", to_snapshot(str(caught.value), desk))


def test_a_port_that_is_taken_is_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        exit_code = main(["serve", "--policy", "nano", "--port", str(port)])

    message = to_snapshot(capsys.readouterr().err, desk).replace(str(port), "8000")
    assert exit_code == 2
    check_message("$ spear serve --policy nano --port 8000", message)
