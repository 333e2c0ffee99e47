"""Configs that are saved without the folders that they, or their parts, were loaded from."""

from __future__ import annotations

from typing import Any


class WithoutFolders:
    """Goes before `PreTrainedConfig` among a config's bases.

    Transformers notes in every config where it was loaded from, and writes that of the nested ones to
    config.json: a path of the machine that the model was trained on, of no use to anybody else.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields of the config and of its parts, but for `_name_or_path`."""
        return _without(super().to_dict())  # type: ignore[misc]


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name != "_name_or_path"
    }
