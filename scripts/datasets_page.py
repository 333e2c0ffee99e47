"""Write docs/reference/datasets.md: what is known of each dataset of the mixture, and how.

The page repeats the facts of src/spear/data/readers/oxe.toml; run this script after changing them.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from spear.data.readers.dataset_layout import REGISTRY, DatasetLayout, find_missing_fields

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "datasets.md"
REGISTRY_FILE = ROOT / "src" / "spear" / "data" / "readers" / "oxe.toml"
SAME_SOURCE = "the same"  # as the fact before, in the order of the file
VERIFIED = "verified: "
DOUBTFUL = ("not known", "probably")
CHOICE = "ours: "
HIDDEN_FACTS = ("weight", "images")  # choices of the mixture, not meanings of numbers
INTRODUCTION = """# Known datasets

spear describes the 24 datasets of the paper's mixture, so you can read them without a `spear.json`.
`spear data datasets` lists them with their sampling weights. This page says how sure each
description is. `scripts/datasets_page.py` writes it from the facts in
[`oxe.toml`](../../src/spear/data/readers/oxe.toml).

- The paper names the sampling weights of four datasets, 69 % together. The other 20 datasets and
  their weights are our choice.
- Two datasets cannot be read. `roboturk` has no robot state, and `cmu_stretch` has no orientation.
- `bc_z` must be version 0.1.0, because later versions are broken.
- Idle steps of DROID are removed (`drop_idle`). Its end-effector is the point 0.1548 m from the
  flange, between the closed pads of its Robotiq gripper.
- Steps that a policy did instead of a person (`bc_z`, `austin_sirius`) are no training targets.
- The frames of `droid`, `fractal20220817_data` and `jaco_play` were corrected: they have version 2
  (see [Versions of frames](../explanation/actions.md#versions-of-frames)).
- Only `bridge_dataset` was checked with real episodes.

To use a known description for your own dataset, name it in your [spear.json](spear-json.md):
`"like": "bridge_dataset"`.

Each fact is of one of four kinds:

- **Verified**: the dataset's authors say it, or a computation decides it from data that did not
  suggest it, such as forward kinematics of recorded joint angles.
- **Documented**: a catalogue, another project's reader or the authors' code says it; nobody
  compared it with data.
- **Ours**: a choice of this project, which may be wrong.
- **Unknown**: no source decides it. Run `spear data audit` on your copy of the dataset before you
  rely on it.
"""


def classify(fact: str) -> str:
    """Say how a field is known, by the first words of its fact."""
    if fact.startswith(VERIFIED):
        return "verified"
    if fact.startswith(DOUBTFUL):
        return "unknown"
    return "ours" if fact.startswith(CHOICE) else "documented"


def name_sources(own_facts: Mapping[str, str]) -> dict[str, str]:
    """Replace "the same" at the beginning of facts by the source of the fact before."""
    named: dict[str, str] = {}
    source = ""
    for name, fact in own_facts.items():
        text = fact.removeprefix(VERIFIED).removeprefix(CHOICE)
        if text.startswith(SAME_SOURCE):
            fact = fact.replace(SAME_SOURCE, source, 1)
        else:
            source = text.split(": ")[0]
        named[name] = fact
    return named


def load_facts() -> dict[str, dict[str, str]]:
    """Load the facts of each dataset, its families' included."""
    tables = tomllib.loads(REGISTRY_FILE.read_text("utf-8"))
    facts: dict[str, dict[str, str]] = {}
    for name, layout in REGISTRY.items():
        facts[name] = {**layout.facts, **name_sources(tables[name]["facts"])}
    return facts


FACTS = load_facts()


def list_facts(layout: DatasetLayout, kind: str) -> list[tuple[str, str]]:
    """List the fields of a kind with their facts."""
    facts: list[tuple[str, str]] = []
    for name, fact in FACTS[layout.name].items():
        if name not in HIDDEN_FACTS and classify(fact) == kind:
            facts.append((name, fact))
    return facts


def format_overview() -> str:
    """Format the table of all datasets, those with the largest share first."""
    readable = [layout for layout in REGISTRY.values() if not find_missing_fields(layout)]
    lines = [
        f"**{len(readable)} of the {len(REGISTRY)} datasets can be read; few of their conventions "
        "are verified.**",
        "",
        "| Dataset | Sampling weight (%) | Verified | Ours | Unknown | Tool's frame |",
        "|---|---|---|---|---|---|",
    ]
    for layout in sort_by_share():
        counts = [len(list_facts(layout, kind)) for kind in ("verified", "ours", "unknown")]
        tool_frame = describe_tool_frame(layout) if layout in readable else "cannot be read"
        cells = [f"`{layout.name}`", f"{layout.weight:g}", *map(str, counts), tool_frame]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Verified, Ours and Unknown count fields of the layout. The last column says how the "
        "rotation from the recorded tool's frame to our end-effector frame is known, and the "
        "version of the frames, if it is not the first.",
    ]
    return "\n".join(lines)


def describe_tool_frame(layout: DatasetLayout) -> str:
    """Say how the rotation of the tool is known, and which version the frames have."""
    kind = classify(FACTS[layout.name].get("tool_rotation", CHOICE))
    version = layout.frames[layout.name]
    return kind if version == 1 else f"{kind}, version {version}"


def sort_by_share() -> list[DatasetLayout]:
    """Sort the datasets by their share of the mixture, the largest first."""
    return sorted(REGISTRY.values(), key=lambda layout: layout.weight or 0, reverse=True)


def format_dataset(layout: DatasetLayout) -> str:
    """Format the section of a dataset."""
    lines = [f"## {layout.name}", "", f"{layout.robot}, {layout.rate_hz:g} Hz."]
    missing_fields = find_missing_fields(layout)
    if missing_fields:
        lines[-1] += f" It cannot be read, because its layout lacks {', '.join(missing_fields)}."
    for kind in ("verified", "ours", "unknown", "documented"):
        facts = list_facts(layout, kind)
        if facts:
            lines += ["", f"{kind.capitalize()}:", ""]
        for name, fact in facts:
            lines.append(f"- `{name}`: {fact.removeprefix(VERIFIED).removeprefix(CHOICE)}")
    return "\n".join(lines)


def format_page() -> str:
    """Format the whole page."""
    sections = [INTRODUCTION, format_overview()]
    sections += [format_dataset(layout) for layout in sort_by_share()]
    return "\n\n".join(section.strip() for section in sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(format_page(), "utf-8")
