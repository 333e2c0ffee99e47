"""Model cards: what a converted checkpoint is, what it was made of, and what is still untrained in it."""

from __future__ import annotations

from collections.abc import Mapping

from spear.models.weights.keys import KeyReport

_KINDS = {
    "spear_vlm": {
        "title": "SPEAR-VLM",
        "cls": "SpearVLMForConditionalGeneration",
        "module": "spear.models.vlm",
        "pipeline": "image-text-to-text",
        "use": "It answers 3D questions about images once it is trained",
    },
    "spear1": {
        "title": "SPEAR-1",
        "cls": "Spear1ForActionPrediction",
        "module": "spear.models.spear1",
        "pipeline": "robotics",
        "use": "It controls a robot once it is trained",
    },
}
_CARD = """---
license: gemma
library_name: spear
pipeline_tag: {pipeline}
tags:
- spear-1
---

# {name}

{title} ([arXiv 2511.17411](https://arxiv.org/abs/2511.17411)), converted, not trained further. \
{use}: `spear train list` shows the recipes.

## Made of

{made}

{fresh}

## Parameters

```
{table}
```

## Loading

```python
from spear.models.weights import load as weights
from {module} import {cls}

model = weights.load({cls}, "{name}")
```
"""


def card(name: str, kind: str, report: KeyReport, sources: Mapping[str, str]) -> str:
    """The README.md of a checkpoint folder, with the header that the Hub reads. kind: the model's type.

    The licence is that of PaliGemma's weights, which every such model holds.
    """
    fresh = "Every weight was loaded; none is new."
    new = [key for key in report.folded() if key.status == "new"]
    if new:
        lines = [f"- `{key.name}` {list(key.shape)}: {key.note}" for key in new]
        fresh = "\n".join(["These weights are new and untrained:", "", *lines])
    made = "\n".join(f"- {role}: `{source}`" for role, source in sources.items())
    table = report.module_table()
    return _CARD.format(name=name, made=made, fresh=fresh, table=table, **_KINDS[kind])
