"""Names on the Hugging Face Hub: files from there, or from the cache that they are kept in."""

from __future__ import annotations

import re
from pathlib import Path

from spear.errors import SpearError

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CHECKPOINT = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
"""The files of a repository that belong to a checkpoint."""


def is_name(name: str) -> bool:
    """Whether this looks like a repository, such as "google/paligemma-3b-pt-224"."""
    return _NAME.fullmatch(name) is not None


def download(name: str, instead: str, file: str | None = None) -> Path:
    """One file of a repository, or (file None) the folder of its checkpoint, from the local cache if there.

    instead: what to give when there is no network. Raises `SpearError`, naming the reason.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(name, file))
        return Path(snapshot_download(name, allow_patterns=_CHECKPOINT))
    except Exception as error:  # the client's errors and its transport's have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpearError(
            f"cannot get {name} from the Hugging Face Hub: {reason}: check the name and the network, or give "
            f"{instead}"
        ) from error
