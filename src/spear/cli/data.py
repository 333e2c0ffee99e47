"""The commands on robot data: what a folder holds, and from one format to another."""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from spear.audit.options import AuditOptions, DescribeOptions, InspectOptions
from spear.data.options import ExportOptions, PrepareOptions
from spear.errors import SpearError, UndecidedError, check_known, format_count
from spear.util.files import write_text

if TYPE_CHECKING:
    from spear.data.store.episode_store import EpisodeStore


def inspect(options: InspectOptions) -> None:
    """Show what a folder of robot data holds: format, cameras, rates, instructions.

    With --out it also writes a page that opens in any browser: frames of some episodes, their actions as
    plots, and the gripper's paths. Of a dataset whose layout is not known it shows the columns as they are.

    Examples:
        spear data inspect bridge_dataset/1.0.0
        spear data inspect my_lerobot_dataset --out look.html
    """
    from spear.audit.inspect import inspect as describe

    path, out, layout = options.path, options.out, options.layout
    _check_layout(path, layout)
    if layout is not None and out is None:
        raise SpearError(f"--layout {layout}: is for the page: give --out as well")
    print(describe(path))
    if out is not None:
        from spear.report.dataset import write_page

        write_page(path, out, layout)
        print(f"open {out.resolve()}")


def describe(options: DescribeOptions) -> None:
    """Propose a spear.json for a dataset that nobody has described: to be read and corrected.

    Columns, units, ranges, the form of rotations, frames and the gripper's sense are guessed from the
    metadata and from what explains the recorded motion best; "facts" says why, and what is open (null).

    Examples:
        spear data describe my_robot
        spear data describe my_robot --out my_robot/spear.json
    """
    from spear.audit.describe import describe as propose
    from spear.data.readers.dataset_layout import LAYOUT_FILE
    from spear.data.readers.formats import open_dataset

    path, out = options.path, options.out
    if out is not None and out.exists():
        raise SpearError(f"--out {out}: it exists already: correct it, or choose another name")
    text = json.dumps(propose(path), indent=2, ensure_ascii=False)
    file = open_dataset(path).path / LAYOUT_FILE  # of RLDS in the folder of the version
    advice = (
        "is there already: take from this what it lacks"
        if file.exists()
        else "is to be this, corrected"
    )
    if out is None:
        print(text)
    else:
        write_text(out, text + "\n")
    print(f"{file} {advice}; then: spear data audit {path}", file=sys.stderr)


def prepare(options: PrepareOptions) -> None:
    """Make robot datasets ready for training: small images, 5 Hz, one meaning of actions.

    The result is a store of episodes, which `spear train` reads as fast as its images can be decoded. Bad
    episodes are skipped, with the reasons in skipped.json. If it is stopped, the same command continues.

    Examples:
        spear data prepare bridge_dataset/1.0.0 --out runs/bridge --size 280x210
        spear data prepare droid/1.0.1 bridge_dataset/1.0.0 --out runs/data --size 280x210 wrist=112x112
    """
    from spear.data.readers.formats import get_dataset_name, list_cameras
    from spear.data.store.prepare import plan_preparation
    from spear.data.store.prepare import prepare as run

    if not options.paths:
        raise SpearError("nothing to prepare: give one folder of robot data, or several")
    how = options.conversion
    for path in options.paths:
        _check_layout(path, how.layout)
    names = [get_dataset_name(path) for path in options.paths]
    if len(set(names)) < len(names):
        raise SpearError(f"datasets of the same name: {', '.join(names)}: prepare them one by one")
    seen = [list_cameras(path, how.layout) for path in options.paths]
    check_known(
        "camera (in --size)", {*itertools.chain(*seen)}, *(name for name in how.sizes if name)
    )
    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    jobs = []
    for path, name, there in zip(options.paths, names, seen, strict=True):
        target = options.out if len(names) == 1 else options.out / name
        own = tuple(size for size in how.size if size.rpartition("=")[0] in ("", *there))
        jobs.append((path, target, options.split, replace(how, size=own)))
        plan_preparation(*jobs[-1])  # what is wrong with the last is said before the first is made
    for job in jobs:
        written, reasons = run(*job, workers)
        _report(written, job[1], reasons)


def _check_layout(path: Path, layout: Path | None) -> None:
    """Raises `SpearError` for a --layout that is no file, or is given with data that need none."""
    from spear.data.readers.formats import FORMATS, find_format

    if layout is None:
        return
    if not layout.is_file():
        raise SpearError(f"--layout {layout}: no such file: give a JSON file like spear.json")
    if find_format(path) == "store":
        raise SpearError(
            f"--layout {layout}: {path} is {FORMATS['store'].title} and needs no layout"
        )


def export(options: ExportOptions) -> None:
    """Write robot episodes as a LeRobot v3.0 dataset, at their own rate.

    Its states are position, quaternion (w x y z) and gripper opening; its actions are SPEAR-1's. Broken
    episodes are skipped and counted.

    Example:
        spear data export runs/episodes --out my_lerobot_dataset --images video
    """
    from spear.data.readers.formats import count_episodes
    from spear.data.readers.splits import parse_split
    from spear.data.store.lerobot_write import write_lerobot
    from spear.data.store.prepare import MAX_BAD_SHARE, read_good_episodes
    from spear.util.progress import ProgressBar, track_progress
    from spear.util.skipped_items import SkippedItems

    path, split, skipped = options.path, options.split, SkippedItems(MAX_BAD_SHARE)
    _check_layout(path, options.layout)
    total = sum(end - first for _, first, end in parse_split(count_episodes(path), split, path))
    bar = ProgressBar("writing", total, "episodes")
    episodes = read_good_episodes(path, split, options.layout, skipped)
    written = write_lerobot(track_progress(episodes, bar), options.out, options.images)
    _report(written, options.out, skipped.reasons)


def audit(options: AuditOptions) -> None:
    """Check that a dataset means what its layout says: frame, unit, signs, delay, gripper, cameras.

    Every plausible reading of the logged actions is integrated from the recorded states and compared with
    where the robot went. The table says which fits best, how much worse the next one is, and whether the
    layout (spear.json, or the list of known datasets) says the same; where the data cannot tell, it says so.
    The gripper must follow its commands, and a camera must show something. The last line and the exit code
    say which it is: consistent (0), contradiction (2) or undecided (3).

    Examples:
        spear data audit bridge_dataset/1.0.0
        spear data audit my_lerobot_dataset --out audit.html
    """
    from spear.audit.dataset_audit import audit as run
    from spear.report.audit import conclude, format_report, write_audit_page

    _check_layout(options.path, options.layout)
    report = run(options.path, options.split, options.layout)
    if options.out is not None:
        write_audit_page(report, options.out)
        print(f"open {options.out.resolve()}")
    print(format_report(report))
    if report.outcome == "contradiction":
        raise SpearError(f"{options.path}: {conclude(report)}: say what fits in its spear.json")
    if report.outcome == "undecided":
        raise UndecidedError(f"{options.path}: undecided: the line above says what cannot be told")


def datasets() -> None:
    """List the datasets whose layout is known, with their share of the training mixture.

    Example:
        spear data datasets
    """
    from spear.data.readers.dataset_layout import REGISTRY, find_missing_fields

    for name, spec in sorted(REGISTRY.items(), key=lambda item: -(item[1].weight or 0)):
        weight = f"{spec.weight:5.1f} %" if spec.weight is not None else "      -"
        rate = f"{spec.rate_hz:g} Hz" if spec.rate_hz else "rate not known"
        unknown = find_missing_fields(spec)
        note = (
            f"not readable yet: {', '.join(unknown)} not known"
            if unknown
            else ", ".join(spec.images)
        )
        print(f"{weight}  {name:<62} {spec.robot or '':<16} {rate:<8} {note}")


def _report(written: int, folder: Path, reasons: Sequence[str], file: TextIO | None = None) -> None:
    for reason in reasons[:5]:
        print(f"skipped: {reason}", file=sys.stderr)
    print(f"{format_count(written, 'episodes')} in {folder}, {len(reasons)} skipped", file=file)


def check_episodes(path: Path, split: str) -> Sequence[tuple[str, int, int]]:
    """What `parse_split` finds. Raises `SpearError` for a folder without a format, a layout or this split;
    makes nothing."""
    from spear.data.readers.formats import count_episodes, list_cameras
    from spear.data.readers.splits import parse_split

    ranges, there = parse_split(count_episodes(path), split, path), list_cameras(path)
    if not {"external", "wrist"} & {*there}:
        raise SpearError(
            f"{path}: no camera external or wrist, but {', '.join(there)}: name them so"
        )
    return ranges


def open_episodes(path: Path, out: Path, split: str = "train") -> "EpisodeStore":
    """The episodes of a folder; other than our own are prepared first, into OUT, by the first process."""
    from spear.data.store.prepare import open_store

    store, reasons = open_store(path, out, split)
    if reasons:
        _report(len(store), path, reasons, sys.stderr)
    return store
