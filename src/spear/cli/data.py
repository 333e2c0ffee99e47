"""The commands on robot data: what a folder holds, and from one format to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import File, at_least
from spear.errors import SpearError

Source = Annotated[Positional[Path], arg(metavar="FOLDER")]
Sources = Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")]


def inspect(path: Source, /, out: File = None, layout: File = None) -> None:
    """Show what a folder of robot data holds: format, cameras, rates, instructions.

    With --out it also writes a page that opens in any browser: frames of some episodes, their actions as
    plots, and the paths of the gripper. Of a dataset whose layout is not known it shows the columns as they
    are.

    Examples:
        spear data inspect bridge_dataset/1.0.0
        spear data inspect my_lerobot_dataset --out look.html

    Args:
        path: An RLDS or LeRobot dataset, raw BridgeData V2 or DROID, or episodes written by this program.
        out: Write the page to this file.
        layout: What the dataset's columns mean, as JSON, when its folder has no spear.json (for the page).
    """
    from spear.data.inspect import inspect as describe

    check_layout(path, layout)
    if layout is not None and out is None:
        raise SpearError(f"--layout {layout}: is for the page: give --out as well")
    print(describe(path))
    if out is not None:
        from spear.data.inspect import layout_known
        from spear.report.columns import write_columns_page
        from spear.report.dataset import write_page

        if layout is None and not layout_known(path):
            write_columns_page(path, out)
        else:
            write_page(path, out, layout)
        print(f"open {out.resolve()}")


def prepare(
    paths: Sources,
    /,
    out: Path,
    split: str = "train",
    size: tuple[str, ...] = (),
    rate: float = 5.0,
    quality: int = 95,
    workers: int | None = None,
    layout: File = None,
) -> None:
    """Make robot datasets ready for training: small images, 5 Hz, one meaning of actions.

    The result is a LeRobot v3.0 dataset with an index beside it, which `spear train` reads as fast as its
    images can be decoded. Bad episodes are set aside, with the reasons in set_aside.json. If it is stopped,
    by whatever, the same command continues.

    Examples:
        spear data prepare bridge_dataset/1.0.0 --out runs/bridge --size 280x210
        spear data prepare droid/1.0.1 bridge_dataset/1.0.0 --out runs/data --size 280x210 wrist=112x112

    Args:
        paths: Folders of robot data (see spear data inspect). Each of several gets a folder of its name in
            OUT.
        out: Folder to write to.
        split: Which episodes: train, val, train[:90%], train[90%:] …
        size: Width x height of the images, as the model takes them (SPEAR-1: 280x210 wrist=112x112); for all
            cameras, or CAMERA=WIDTHxHEIGHT. Bars are added rather than stretching. Without it they stay as
            they are.
        rate: Steps per second (training takes 5).
        quality: JPEG quality of images that are changed.
        workers: Processes that read and resize; one for each processor by default. The result is the same.
        layout: What the dataset's columns mean, as JSON, when its folder has no spear.json.
    """
    import os

    from spear.data.readers.formats import dataset_name
    from spear.data.store.prepare import prepare as run
    from spear.models.processing import fit_image

    if not paths:
        raise SpearError("nothing to prepare: give one folder of robot data, or several")
    if not 0 < rate <= 1000:
        raise SpearError(f"--rate {rate:g}: give more than 0 and at most 1000 steps per second")
    if not 1 <= quality <= 100:
        raise SpearError(f"--quality {quality}: give 1 to 100")
    if workers is not None:
        at_least(0, workers=workers)
    for path in paths:
        check_layout(path, layout)
    names = [dataset_name(path) for path in paths]
    if len(set(names)) < len(names):
        raise SpearError(f"datasets of the same name: {', '.join(names)}: prepare them one by one")
    if workers is None:
        workers = os.cpu_count() or 1
    sizes = image_sizes(size)
    for path, name in zip(paths, names, strict=True):
        target = out if len(paths) == 1 else out / name
        written, reasons = run(
            path,
            target,
            split,
            layout,
            sizes=sizes,
            fit_image=fit_image,
            rate_hz=rate,
            quality=quality,
            workers=workers,
        )
        _report(reasons)
        print(f"{written} episodes in {target}, {len(reasons)} set aside")


def image_sizes(words: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Words like 280x210 and wrist=112x112 as camera -> (width, height), "" for all others."""
    sizes = {}
    for word in words:
        camera, _, text = word.rpartition("=")
        width, _, height = text.partition("x")
        if not (
            width.isdecimal() and height.isdecimal() and 0 < int(width) <= 8192 and 0 < int(height) <= 8192
        ):
            raise SpearError(f"--size {word}: write it as 280x210, or for one camera as wrist=112x112")
        sizes[camera] = (int(width), int(height))
    return sizes


def check_layout(path: Path, layout: Path | None) -> None:
    """Raises `SpearError` for a --layout that is no file, or is given with data that need none."""
    from spear.data.readers.formats import FORMATS, need_format

    if layout is None:
        return
    if not layout.is_file():
        raise SpearError(f"--layout {layout}: no such file: give a JSON file like spear.json")
    if (name := need_format(path)) == "store":
        raise SpearError(
            f"--layout {layout}: {path} is {FORMATS[name].title} and needs no layout: leave it out"
        )


def export(
    path: Source,
    /,
    out: Path,
    split: str = "train",
    images: Literal["image", "video"] = "image",
    layout: File = None,
) -> None:
    """Write robot episodes as a LeRobot v3.0 dataset, at their own rate.

    Its states are position, quaternion (w x y z) and gripper opening; its actions are SPEAR-1's. Broken
    episodes are set aside and counted.

    Example:
        spear data export runs/episodes --out my_lerobot_dataset --images video

    Args:
        path: A folder of robot data (see spear data inspect).
        out: Folder to write to; it must not exist yet.
        split: Which episodes: train, val, train[:90%], train[90%:] …
        images: Keep the images as they are (image), or encode them as AV1 video (video), which is much
            smaller and a little blurred.
        layout: What the dataset's columns mean, as JSON, when its folder has no spear.json.
    """
    from spear.data.aside import SetAside, good_episodes
    from spear.data.readers.formats import episode_ranges
    from spear.data.store.lerobot_write import write_lerobot
    from spear.util.progress import ProgressBar, tracked

    check_layout(path, layout)
    aside = SetAside(most=0.5)
    total = sum(end - first for _, first, end in episode_ranges(path, split))
    bar = ProgressBar("writing", total, "episodes")
    written = write_lerobot(tracked(good_episodes(path, split, layout, aside), bar), out, images)
    _report(aside.reasons)
    print(f"{written} episodes in {out}, {len(aside.reasons)} set aside")


def audit(path: Source, /, out: File = None, split: str | None = None, layout: File = None) -> None:
    """Check that a dataset's logged actions mean what its layout says: frame, unit, signs, delay.

    Every plausible reading of the logged actions is integrated from the recorded states and compared with
    where the robot went. The table says which fits best, how much worse the next one is, and whether the
    layout (spear.json, or the list of known datasets) says the same; where the data cannot tell, it says so.
    Ends with exit code 2 when the layout is wrong, so that a script can rely on it; otherwise with 0.

    Examples:
        spear data audit bridge_dataset/1.0.0
        spear data audit my_lerobot_dataset --out audit.html

    Args:
        path: A folder of robot data (see spear data inspect).
        out: Write a page with plots to this file.
        split: Which episodes: train, val, train[:90%] … (the first 50 of them are read).
        layout: What the dataset's columns mean, as JSON, when its folder has no spear.json.
    """
    from spear.data.audit import audit as run
    from spear.report.audit import conclusion, text, write_audit_page

    check_layout(path, layout)
    report = run(path, split, layout)
    print(text(report))
    if out is not None:
        write_audit_page(report, out)
        print(f"open {out.resolve()}")
    if not report.agrees:
        raise SpearError(f"{path}: {conclusion(report)}: say what fits in its spear.json (or --layout)")


def datasets() -> None:
    """List the datasets whose layout is known, with their share of the training mixture.

    Example:
        spear data datasets
    """
    from spear.data.readers.spec import REGISTRY, missing

    for name, spec in sorted(REGISTRY.items(), key=lambda item: -(item[1].weight or 0)):
        weight = f"{spec.weight:5.1f} %" if spec.weight is not None else "      -"
        rate = f"{spec.rate_hz:g} Hz" if spec.rate_hz else "rate not known"
        unknown = missing(spec)
        note = f"not readable yet: {', '.join(unknown)} not known" if unknown else ", ".join(spec.images)
        print(f"{weight}  {name:<62} {spec.robot or '':<16} {rate:<8} {note}")


def _report(reasons: Sequence[str]) -> None:
    for reason in reasons[:5]:
        print(f"set aside: {reason}", file=sys.stderr)
