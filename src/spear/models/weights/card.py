"""Model cards: what a converted checkpoint is, what it was made of, and what is still untrained in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spear.models.weights.keys import KeyReport

_NAMES = {"spear_vlm": "SPEAR-VLM", "spear1": "SPEAR-1"}
_CLASSES = {
    "spear_vlm": ("spear.models.vlm", "SpearVLMForConditionalGeneration"),
    "spear1": ("spear.models.spear1", "Spear1ForActionPrediction"),
}
_USE = {
    "spear_vlm": "It answers 3D questions about images once it is trained: `spear train list` shows the recipes.",
    "spear1": "It controls a robot once it is trained: `spear train list` shows the recipes.",
}


def card(name: str, config: Any, report: KeyReport, sources: Mapping[str, str]) -> str:
    """The README.md of a checkpoint folder, with the header that the Hub reads.

    The licence is that of PaliGemma's weights, which every such model holds.
    """
    kind = config.model_type
    module, cls = _CLASSES[kind]
    new = report.of("new")
    untrained = [
        f"- `{key.name}` {list(key.shape)}: {key.note}" for key in report.folded() if key.status == "new"
    ]
    made = [f"- {role}: `{source}`" for role, source in sources.items()]
    header = [
        "---",
        "license: gemma",
        "library_name: spear",
        "pipeline_tag: robotics",
        "tags:",
        "- spear-1",
        "---",
    ]
    if kind == "spear_vlm":
        header[3] = "pipeline_tag: image-text-to-text"
    fresh = (
        ["These weights are new and untrained:", "", *untrained]
        if new
        else ["Every weight was loaded; none is new."]
    )
    return "\n".join(
        [
            *header,
            "",
            f"# {name}",
            "",
            f"{_NAMES[kind]} ([arXiv 2511.17411](https://arxiv.org/abs/2511.17411)), converted, not trained further. "
            f"{_USE[kind]}",
            "",
            "## Made of",
            "",
            *made,
            "",
            *fresh,
            "",
            "## Parameters",
            "",
            "```",
            report.module_table(),
            "```",
            "",
            "## Loading",
            "",
            "```python",
            "from spear.models import weights",
            f"from {module} import {cls}",
            "",
            f'model = weights.load({cls}, "{name}")',
            "```",
            "",
        ]
    )
