"""How often the audit's checks of gripper and cameras are right: on right data, and on the same data damaged.

    python benchmarks/data/audit_senses.py bridge_v2_sample runs/episodes

Of each dataset, 200 draws of 5, 8 and 16 episodes are checked as they are and in four damaged ways. A right
check says "agrees" or "cannot tell" of right data, "wrong" or "cannot tell" of damaged data.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from spear.audit import dataset_audit as audit
from spear.checks.cameras import check_cameras
from spear.checks.gripper import check_gripper
from spear.checks.recording import Recording
from spear.errors import SpearError

DRAWS, SIZES = 200, (5, 8, 16)
DAMAGES: dict[str, Callable[[Recording], Recording]] = {
    "right": lambda r: r,
    "command inverted": lambda r: replace(r, command=1 - np.asarray(r.command)),
    "readings inverted": lambda r: replace(r, opening=1 - np.asarray(r.opening)),
    "both inverted": lambda r: replace(
        r, opening=1 - np.asarray(r.opening), command=1 - np.asarray(r.command)
    ),
    "another column": lambda r: replace(r, command=np.asarray(r.turn)[:, -1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    random = np.random.default_rng(0)
    print(
        f"{'dataset':<20} {'episodes':>8}  {'data':<18} agrees  wrong  cannot tell  (of {DRAWS} draws)"
    )
    for folder in parser.parse_args().folders:
        spec = audit.find_logged_layout(folder, None)
        recordings = [
            audit.make_recording(steps, spec, name)
            for name, steps in audit.episode_steps(folder, "train", ())
            if not isinstance(steps, SpearError)
        ]
        for size in (size for size in SIZES if size <= len(recordings)):
            for name, damage in DAMAGES.items():
                found: Counter[str] = Counter()
                for _ in range(DRAWS):
                    drawn = random.choice(len(recordings), size, replace=False)
                    said = {
                        check.verdict
                        for check in check_gripper([damage(recordings[i]) for i in drawn])
                    }
                    found[next(v for v in ("wrong", "cannot tell", "agrees") if v in said)] += 1
                counts = f"{found['agrees']:>6} {found['wrong']:>6} {found['cannot tell']:>12}"
                print(f"{folder.name:<20} {size:>8}  {name:<18} {counts}")
        views = audit.summarize_cameras(folder, "train", spec)
        if {"external", "wrist"} <= views.keys():
            for name, pair in (
                ("cameras", ("external", "wrist")),
                ("cameras exchanged", ("wrist", "external")),
            ):
                checks = check_cameras({"external": views[pair[0]], "wrist": views[pair[1]]})
                print(
                    f"{folder.name:<20} {len(views['wrist']):>8}  {name:<18} {[c.verdict for c in checks]}"
                )


if __name__ == "__main__":
    main()
