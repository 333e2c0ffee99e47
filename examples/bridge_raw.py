"""Write recordings of `bridge_data_robot` (folders of pictures and pickles) to an episode store.

    python examples/bridge_raw.py RECORDINGS --out runs/my_widowx --instruction "pick up the cup"

RECORDINGS is searched for folders with an `obs_dict.pkl`. Unpickling can execute any code, so give
only recordings that you trust. For other recordings of per-step arrays, write your own
`read_columns`, and a layout that says what its columns mean.
"""

import argparse
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spear.cli import run_reporting_errors
from spear.data.readers.build_episode import build_episode
from spear.data.readers.columns import Steps
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.store.episode_store import append_episodes
from spear.errors import SpearError
from spear.types import Episode
from spear.util.files import check_new_or_empty_folder

# BridgeData's columns. These pictures are not squeezed to squares, as those of BridgeData are.
LAYOUT = dataclasses.replace(REGISTRY["bridge_dataset"], image_aspect={})

# What a recording raises that was interrupted, or lacks a file.
UNREADABLE = (OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


def read_columns(folder: Path, instruction: str) -> Steps:
    """Read a recording of T actions and T + 1 observations as columns of T rows."""
    with (folder / "obs_dict.pkl").open("rb") as file:
        observations = pickle.load(file)
    with (folder / "policy_out.pkl").open("rb") as file:
        outputs = pickle.load(file)

    actions = np.stack([output["actions"] for output in outputs])  # [T, 7]
    num_steps = len(actions)
    pictures = [folder / "images0" / f"im_{step}.jpg" for step in range(num_steps)]
    text_file = folder / "lang.txt"
    if text_file.is_file():  # BridgeData V2 has this file; the robot does not write it
        instruction = text_file.read_text("utf-8").partition("\n")[0]
    return {
        "observation": {
            "image_0": [picture.read_bytes() for picture in pictures],
            "state": np.asarray(observations["full_state"][:num_steps], np.float32),  # [T, 7]
        },
        "action": np.asarray(actions, np.float32),
        "language_instruction": [instruction] * num_steps,
    }


def read_recordings(root: Path, instruction: str) -> Iterator[Episode]:
    """Read the recordings below a folder; those that cannot be read are named and left out."""
    files = sorted(root.rglob("obs_dict.pkl"))
    if not files:
        raise SpearError(f"there is no obs_dict.pkl below {root}. Give a folder of recordings.")
    num_read = 0
    for file in files:
        source = str(file.parent.relative_to(root))
        try:
            columns = read_columns(file.parent, instruction)
        except UNREADABLE as error:
            print(f"left out: {source} ({type(error).__name__}: {error})")
            continue
        yield build_episode(columns, LAYOUT, source)
        num_read += 1
    if num_read == 0:
        raise SpearError(f"none of the recordings below {root} can be read. See the list above.")


def main() -> None:
    """Write the recordings below a folder to an episode store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, help="folder of recordings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new store")
    parser.add_argument("--instruction", default="", help="of recordings without a lang.txt")
    arguments = parser.parse_args()

    check_new_or_empty_folder(arguments.out)
    episodes = read_recordings(arguments.recordings, arguments.instruction)
    num_written = append_episodes(episodes, arguments.out)
    print(f"{num_written} episodes in {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(run_reporting_errors(main))
