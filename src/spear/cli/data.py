"""The commands on robot data: they describe a folder, check its layout, and convert its format."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from spear.audit.options import AuditOptions, DescribeOptions, InspectOptions
from spear.data.options import Conversion, ExportOptions, PrepareOptions
from spear.errors import (
    MAX_LISTED_NAMES,
    SpearError,
    UndecidedError,
    check_known,
    escape_control_characters,
    format_count,
)
from spear.util.files import write_bytes, write_text

if TYPE_CHECKING:
    from spear.data.readers.splits import EpisodeRange
    from spear.data.store.episode_store import EpisodeStore

MAX_SHOWN_REASONS = 5  # for at most this many skipped episodes, the reason is printed


def inspect(options: InspectOptions) -> None:
    """Show what a folder of robot data holds: format, cameras, rates, instructions.

    With --report it also writes a page that opens in any browser, with frames of some episodes,
    plots of their actions, and the gripper's paths. If the dataset's layout is not known, the page
    shows the columns as they are.

    Examples:
        spear data inspect bridge_dataset/1.0.0
        spear data inspect my_lerobot_dataset --report look.html
    """
    from spear.audit.inspect import describe_dataset

    _check_layout_option(options.path, options.layout)
    if options.layout is not None and options.report is None:
        raise SpearError(f"--layout {options.layout} is for the page. Add --report FILE.")
    print(describe_dataset(options.path))
    if options.report is not None:
        from spear.report.dataset import write_dataset_page

        write_dataset_page(options.path, options.report, options.layout)
        print(f"open {options.report.resolve()}")


def describe(options: DescribeOptions) -> None:
    """Propose a spear.json for a dataset that nobody has described, for you to read and correct.

    Columns, units, ranges, rotation format, frames and the gripper's direction are guessed from the
    metadata and from what explains the recorded motion best. The key "facts" says why, and what is
    open (null).

    Examples:
        spear data describe my_robot
        spear data describe my_robot --out my_robot/spear.json
        spear data describe so101 --urdf so101.urdf --tip gripper_frame_link --out so101/spear.json
    """
    from spear.audit.describe import list_joint_names_without_pose, propose_layout

    if options.out is not None and options.out.exists():
        raise SpearError(f"--out {options.out} exists already. Correct it, or give another name.")
    if (options.urdf is None) != (options.tip is None):
        raise SpearError(
            "joint angles need both --urdf and --tip. Give the arm's URDF, and its link between "
            "the finger tips."
        )
    proposal = propose_layout(options.path, options.urdf, options.tip)
    text = json.dumps(proposal, indent=2, ensure_ascii=False)

    # A proposal for joint angles without their arm would be wrong in more than its pose, for
    # example in the gripper's range. So no file of it is written.
    if options.out is None:
        print(escape_control_characters(text, keep_newlines=True))
    joints = list_joint_names_without_pose(options.path, proposal)
    if joints:
        names = ", ".join(joints[:MAX_LISTED_NAMES])
        command = f"spear data describe {options.path} --urdf FILE --tip LINK"
        if options.out is not None:
            command += f" --out {options.out}"
        raise SpearError(
            f"the states of {options.path} are joints ({names}), which are no pose, so nothing was "
            f"written. Run `{command}` with the URDF of the arm (docs/howto/lerobot.md)."
        )

    if options.out is not None:
        if options.urdf is not None:
            _copy_urdf(options.urdf, options.out.parent)
        write_text(options.out, text + "\n")
    print(_advise_after_proposal(options), file=sys.stderr)


def _advise_after_proposal(options: DescribeOptions) -> str:
    """Return what to do with a proposed layout."""
    from spear.data.readers.dataset_layout import LAYOUT_FILE
    from spear.data.readers.formats import open_dataset

    # An RLDS dataset has a folder per version, and the layout belongs into that folder.
    file = open_dataset(options.path).path / LAYOUT_FILE
    above_version = options.path / LAYOUT_FILE
    command = f"spear data audit {options.path}"
    if options.out is None:
        advice = f"{file} should contain this, once you have corrected it"
        if file.exists():
            advice = f"{file} exists already: add what it lacks"
    else:
        advice = f"wrote {options.out}: read and correct it"
        is_in_place = options.out.resolve() == file.resolve()
        if not is_in_place and options.out.resolve() == above_version.resolve():
            advice += f", and move it to {file}"
        elif not is_in_place:  # commands find only the dataset's own spear.json
            command += f" --layout {options.out}"
    return f"{advice}; then run `{command}`"


def _copy_urdf(urdf: Path, folder: Path) -> None:
    """Copy a URDF into the folder of the layout that names it, unless it is there already.

    Raises SpearError if another file is there under its name.
    """
    target = folder / urdf.name
    content = urdf.read_bytes()
    if target.exists() and target.read_bytes() != content:
        raise SpearError(f"{target} exists already, and differs from {urdf}. Rename one of them.")
    if not target.exists():
        write_bytes(target, content)


def prepare(options: PrepareOptions) -> None:
    """Make robot datasets ready for training: small images, 5 Hz, one meaning of actions.

    The result is a store of episodes, which `spear train` reads as fast as its images can be
    decoded. Bad episodes are skipped, with the reasons in skipped.json. Run the same command to
    continue after it was stopped.

    Examples:
        spear data prepare bridge_dataset/1.0.0 --out runs/bridge --image-size 280x210
        spear data prepare droid/1.0.1 bridge_dataset/1.0.0 --out runs/data --image-size 280x210
    """
    from spear.data.readers.formats import get_dataset_name, list_cameras
    from spear.data.store.prepare import plan_preparation
    from spear.data.store.prepare import prepare as prepare_dataset

    conversion = options.conversion
    if not options.paths:
        raise SpearError("there is nothing to prepare. Give one folder of robot data, or several.")
    for path in options.paths:
        _check_layout_option(path, conversion.layout)
    names = [get_dataset_name(path) for path in options.paths]
    if len(set(names)) < len(names):
        raise SpearError(
            f"several datasets have the same name ({', '.join(names)}). Prepare them one by one."
        )
    cameras_of_path = {path: list_cameras(path, conversion.layout) for path in options.paths}
    _check_size_options_name_cameras(conversion, list(cameras_of_path.values()))

    # Plan all datasets before preparing one, so that a mistake in the last is found at once.
    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    jobs = []
    for path, name in zip(options.paths, names, strict=True):
        target = options.out if len(names) == 1 else options.out / name
        own_conversion = _drop_sizes_of_absent_cameras(conversion, cameras_of_path[path])
        plan_preparation(path, target, options.split, own_conversion)
        jobs.append((path, target, own_conversion))

    for path, target, own_conversion in jobs:
        num_written, reasons = prepare_dataset(path, target, options.split, own_conversion, workers)
        _print_written_and_skipped(num_written, target, reasons)


def _check_size_options_name_cameras(
    conversion: Conversion, cameras_of_datasets: Sequence[list[str]]
) -> None:
    """Check that every camera in --image-size is in one of the datasets."""
    all_cameras: set[str] = set()
    for cameras in cameras_of_datasets:
        all_cameras.update(cameras)
    for camera in conversion.sizes:
        if camera:
            check_known("camera", all_cameras, camera, location="--image-size")


def _drop_sizes_of_absent_cameras(conversion: Conversion, cameras: Sequence[str]) -> Conversion:
    """Return the conversion without the sizes of cameras that the dataset does not have.

    Args:
        conversion: its `image_size` are words CAMERA=WIDTHxHEIGHT, or WIDTHxHEIGHT for all cameras.
        cameras: the dataset's cameras.
    """
    sizes = []
    for size in conversion.image_size:
        camera, _, _ = size.rpartition("=")
        is_for_all_cameras = camera == ""
        if is_for_all_cameras or camera in cameras:
            sizes.append(size)
    return replace(conversion, image_size=tuple(sizes))


def _check_layout_option(path: Path, layout: Path | None) -> None:
    """Check that --layout is a file, and that the data need a layout."""
    from spear.data.readers.formats import FORMATS, find_format

    if layout is None:
        return
    if not layout.is_file():
        raise SpearError(f"--layout {layout} does not exist. Give a JSON file like spear.json.")
    if find_format(path) == "store":
        raise SpearError(
            f"--layout {layout} has no effect, because {path} is {FORMATS['store'].title}. "
            "Leave it out."
        )


def export(options: ExportOptions) -> None:
    """Write robot episodes as a LeRobot v3.0 dataset, at their own rate.

    Its states are position, quaternion (w x y z) and gripper opening; its actions are SPEAR-1's.
    Broken episodes are skipped and counted.

    Example:
        spear data export runs/episodes --out my_lerobot_dataset --images video
    """
    from spear.data.readers.formats import count_episodes, read_frame_versions
    from spear.data.readers.splits import parse_split
    from spear.data.store.lerobot_write import write_lerobot
    from spear.data.store.prepare import MAX_BAD_SHARE, read_good_episodes
    from spear.util.progress import ProgressBar, track_progress
    from spear.util.skipped_items import SkippedItems

    _check_layout_option(options.path, options.layout)
    ranges = parse_split(count_episodes(options.path), options.split, options.path)
    total = sum(episode_range.end - episode_range.first for episode_range in ranges)
    bar = ProgressBar("writing", total, "episodes")
    skipped = SkippedItems(MAX_BAD_SHARE)
    episodes = read_good_episodes(options.path, options.split, options.layout, skipped)
    num_written = write_lerobot(
        track_progress(episodes, bar),
        options.out,
        options.images,
        frames=read_frame_versions(options.path, options.layout),
    )
    _print_written_and_skipped(num_written, options.out, skipped.reasons)


def audit(options: AuditOptions) -> None:
    """Check that a dataset means what its layout says: frame, unit, signs, delay, gripper, cameras.

    Every plausible meaning of the logged actions is integrated from the recorded states and
    compared with where the robot went. The table says which meaning fits best, how much worse the
    next one is, and whether the layout (spear.json, or the list of known datasets) says the same.
    It also says what the data cannot tell. The gripper must follow its commands, and a camera must
    show something. The last line and the exit code are the verdict: consistent (0), contradiction
    (2) or undecided (3).

    Examples:
        spear data audit bridge_dataset/1.0.0
        spear data audit my_lerobot_dataset --report audit.html
    """
    from spear.audit.dataset_audit import audit_dataset
    from spear.data.readers.formats import find_format
    from spear.report.audit import (
        advise_on_undecided,
        explain_contradiction,
        format_report,
        write_audit_page,
    )

    _check_layout_option(options.path, options.layout)
    report = audit_dataset(options.path, options.split, options.layout)
    if options.report is not None:
        write_audit_page(report, options.report)
        print(f"open {options.report.resolve()}")
    print(escape_control_characters(format_report(report), keep_newlines=True))
    if report.outcome == "contradiction":
        cure = "Write what fits into its spear.json."
        if find_format(options.path) == "store":
            # An episode store has no spear.json of its own.
            cure = (
                "If `spear serve` recorded it, the robot does not move as commanded; `spear "
                "diagnose` names the cause. If it was prepared, correct the spear.json of its "
                "dataset, and prepare it again."
            )
        raise SpearError(f"In {options.path}, {explain_contradiction(report)}. {cure}")
    if report.outcome == "undecided":
        raise UndecidedError(advise_on_undecided(report))


def datasets() -> None:
    """List the datasets whose layout is known, with their sampling weight in the training mixture.

    Example:
        spear data datasets
    """
    from spear.data.readers.dataset_layout import REGISTRY, find_missing_fields

    largest_first = sorted(REGISTRY, key=lambda name: -(REGISTRY[name].weight or 0))
    for name in largest_first:
        layout = REGISTRY[name]
        weight = f"{layout.weight:5.1f} %" if layout.weight is not None else "      -"
        rate = f"{layout.rate_hz:g} Hz" if layout.rate_hz else "rate not known"
        missing = find_missing_fields(layout)
        note = ", ".join(layout.images)
        if missing:
            note = f"not readable yet: {', '.join(missing)} not known"
        print(f"{weight}  {name:<62} {layout.robot or '':<16} {rate:<8} {note}")


def _print_written_and_skipped(
    num_written: int, folder: Path, reasons: Sequence[str], file: TextIO | None = None
) -> None:
    """Print to `file` how many episodes were written, and to stderr why others were skipped.

    Without `file`, the number goes to stdout.
    """
    for reason in reasons[:MAX_SHOWN_REASONS]:
        print(f"skipped: {escape_control_characters(reason)}", file=sys.stderr)
    episodes = format_count(num_written, "episodes")
    print(f"{episodes} in {folder}, {len(reasons)} skipped", file=file)


def parse_usable_split(path: Path, split: str) -> "list[EpisodeRange]":
    """Check that the episodes of a split can be used, and return their ranges (`parse_split`).

    Nothing is prepared or written.

    Raises:
        SpearError: the folder's format, layout or split is not known, or it has neither an external
            nor a wrist camera.
    """
    from spear.data.readers.formats import count_episodes, list_cameras
    from spear.data.readers.splits import parse_split

    ranges = parse_split(count_episodes(path), split, path)
    cameras = list_cameras(path)
    if "external" not in cameras and "wrist" not in cameras:
        raise SpearError(
            f"{path} has no camera external or wrist, but {', '.join(cameras)}. Name them "
            "external and wrist in its spear.json."
        )
    return ranges


def open_or_prepare_episodes(path: Path, out: Path, split: str = "train") -> "EpisodeStore":
    """Return the episodes of the folder `path`.

    Episodes in another format than our store are first prepared in the folder `out`. Of several
    training processes the first prepares them, and the others wait.
    """
    from spear.data.store.prepare import open_or_prepare_store

    opened = open_or_prepare_store(path, out, split)
    if opened.skip_reasons:
        _print_written_and_skipped(len(opened.store), path, opened.skip_reasons, sys.stderr)
    return opened.store
