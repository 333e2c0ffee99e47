"""Options of the commands that inspect, describe and audit robot data."""

from typing import Annotated

from tyro.conf import arg

from spear.data.options import DatasetFolder
from spear.util.options import LayoutFile, OptionalFile, Options


class InspectOptions(Options):
    path: DatasetFolder
    report: OptionalFile = None
    """Write a page to this file."""
    layout: LayoutFile = None


class DescribeOptions(Options):
    path: DatasetFolder
    out: OptionalFile = None
    """Write it to this new file, instead of showing it; it is found as FOLDER/spear.json."""
    urdf: OptionalFile = None
    """For joint angles: the URDF of the arm. With --out, it is copied beside that file."""
    tip: Annotated[str | None, arg(metavar="LINK")] = None
    """For joint angles: the URDF's link between the finger tips."""


class AuditOptions(Options):
    path: DatasetFolder
    report: OptionalFile = None
    """Write a page with plots to this file."""
    split: Annotated[str | None, arg(metavar="SPLIT")] = None
    """Which episodes (at most 50, or 3,000 steps, are read): train, val, train[:90%] …; by default
    the first split."""
    layout: LayoutFile = None
