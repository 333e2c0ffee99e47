"""How often the audit's checks of gripper and cameras are right, on right and on damaged data.

    python benchmarks/data/audit_checks.py bridge_v2_sample runs/episodes

Of each dataset, 200 draws of 5, 8 and 16 episodes are checked as they are and in four damaged ways.
A right check says "agrees" or "cannot tell" of right data, "wrong" or "cannot tell" of damaged
data.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from spear.audit.dataset_audit import (
    load_layout_with_logged_actions,
    make_recording,
    read_episode_steps,
    summarize_cameras,
)
from spear.checks.cameras import find_absent_or_blank_cameras, judge_camera_exchange
from spear.checks.gripper import judge_gripper
from spear.checks.recording import Recording
from spear.errors import SpearError

NUM_DRAWS = 200
DRAW_SIZES = (5, 8, 16)
VERDICTS_BY_WEIGHT = ("wrong", "cannot tell", "agrees")


def invert_command(recording: Recording) -> Recording:
    return replace(recording, command=1 - np.asarray(recording.command))


def invert_opening(recording: Recording) -> Recording:
    return replace(recording, opening=1 - np.asarray(recording.opening))


def use_another_column(recording: Recording) -> Recording:
    return replace(recording, command=np.asarray(recording.turn)[:, -1])


DAMAGES: dict[str, Callable[[Recording], Recording]] = {
    "right": lambda recording: recording,
    "command inverted": invert_command,
    "readings inverted": invert_opening,
    "both inverted": lambda recording: invert_command(invert_opening(recording)),
    "another column": use_another_column,
}


def read_recordings(folder: Path) -> list[Recording]:
    """All good episodes of a dataset."""
    layout = load_layout_with_logged_actions(folder, None)
    recordings = []
    for name, steps in read_episode_steps(folder, "train", ()):
        if not isinstance(steps, SpearError):
            recordings.append(make_recording(steps, layout, name))
    return recordings


def find_weightiest_verdict(recordings: Sequence[Recording]) -> str:
    """The most serious verdict of the gripper's checks."""
    verdicts = {check.verdict for check in judge_gripper(recordings)}
    return next(verdict for verdict in VERDICTS_BY_WEIGHT if verdict in verdicts)


def count_verdicts(
    recordings: Sequence[Recording],
    size: int,
    damage: Callable[[Recording], Recording],
    rng: np.random.Generator,
) -> Counter[str]:
    """How often each verdict is given in `NUM_DRAWS` draws of `size` episodes."""
    counts: Counter[str] = Counter()
    for _ in range(NUM_DRAWS):
        indices = rng.choice(len(recordings), size, replace=False)
        counts[find_weightiest_verdict([damage(recordings[i]) for i in indices])] += 1
    return counts


def print_camera_verdicts(folder: Path) -> None:
    """The verdicts about cameras as they are, and exchanged."""
    views = summarize_cameras(folder, "train", load_layout_with_logged_actions(folder, None))
    if not {"external", "wrist"} <= views.keys():
        return
    external = views["external"]
    wrist = views["wrist"]
    arrangements = {
        "cameras": {"external": external, "wrist": wrist},
        "cameras exchanged": {"external": wrist, "wrist": external},
    }
    for name, arrangement in arrangements.items():
        checks = find_absent_or_blank_cameras(arrangement)
        exchange = judge_camera_exchange(arrangement["external"], arrangement["wrist"])
        if exchange is not None:
            checks.append(exchange)
        verdicts = [check.verdict for check in checks]
        print(f"{folder.name:<20} {len(wrist):>8}  {name:<18} {verdicts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    rng = np.random.default_rng(0)
    header = f"{'dataset':<20} {'episodes':>8}  {'data':<18} agrees  wrong  cannot tell"
    print(f"{header}  (of {NUM_DRAWS} draws)")
    for folder in parser.parse_args().folders:
        recordings = read_recordings(folder)
        for size in DRAW_SIZES:
            if size > len(recordings):
                continue
            for name, damage in DAMAGES.items():
                counts = count_verdicts(recordings, size, damage, rng)
                row = f"{folder.name:<20} {size:>8}  {name:<18} {counts['agrees']:>6}"
                print(f"{row} {counts['wrong']:>6} {counts['cannot tell']:>12}")
        print_camera_verdicts(folder)


if __name__ == "__main__":
    main()
