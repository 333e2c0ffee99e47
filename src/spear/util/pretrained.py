"""The one place that calls Transformers' `from_pretrained`, so that no model folder runs code."""

from pathlib import Path
from typing import Any

from spear.errors import SpearError

_REFUSAL_OF_TRANSFORMERS = "trust_remote_code"
"""Transformers names this option in its error for a folder that has to run Python code."""


def load_pretrained(cls: Any, name: Path | str | None, **options: Any) -> Any:
    """Call `cls.from_pretrained` without running Python code that comes with the model.

    With `trust_remote_code` unset, Transformers asks on the terminal whether it should run the
    code, and a "y" in a script's input would run it.

    Args:
        cls: a class of Transformers: a model, `AutoConfig`, `AutoTokenizer`, `AutoProcessor`.
        name: the model's folder, its name on the Hub, or None for a model in memory.
        options: further arguments of `from_pretrained`.

    Raises:
        SpearError: the model cannot be loaded without its code.
        Exception: whatever `from_pretrained` raises.
    """
    try:
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as error:
        if _REFUSAL_OF_TRANSFORMERS not in str(error):
            raise
        raise SpearError(
            f"the model {name} wants to run Python code from its folder, which spear never "
            "does. Give a model that Transformers knows without such code, and remove auto_map "
            "from its JSON files."
        ) from error
