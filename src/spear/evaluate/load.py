"""Actors by name, for the command line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from spear.errors import SpearError
from spear.evaluate.agents import NOTHING, Agent, ConstantActor, ExpertActor, PolicyActor
from spear.policy import Spear1Policy, locate

if TYPE_CHECKING:
    from spear.sim.render import Size


class Cameras(TypedDict, total=False):
    """Sizes (width, height), by keyword of `spear.evaluate.closed_loop.evaluate`."""

    image_size: Size
    wrist_size: Size


def load_agent(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    dataset: str | None = None,
) -> tuple[Agent, Cameras]:
    """Who acts ("expert", "nothing", a trained folder, a shipped name or a server's ws:// address), and the
    cameras that it needs.

    device, dtype: where a policy that is loaded here computes, and the precision of its weights.
    dataset: whose units it uses, see `Spear1Policy.load`. Raises SpearError where no policy is loaded here.
    """
    if dataset is not None and (
        name in ("expert", "oracle", "nothing") or name.startswith(("ws://", "wss://"))
    ):
        raise SpearError(f"--dataset {dataset}: is for a policy that is loaded here: leave it out for {name}")
    if name == "expert":
        return ExpertActor(), {}
    if name == "nothing":
        return ConstantActor("nothing", NOTHING), {}
    if name.startswith(("ws://", "wss://")):
        from spear.serve.client import RemotePolicy

        return PolicyActor(RemotePolicy(name, os.environ.get("SPEAR_TOKEN")), name), {}
    policy = Spear1Policy.load(name, device, dataset=dataset, dtype=dtype)
    sizes = policy.processor.image_sizes
    # Outcomes in another precision or in other units are those of another policy.
    which = fingerprint(locate(name)) + ("" if dtype == torch.float32 else f" {dtype}")
    which += "" if dataset is None else f" {dataset}"
    return PolicyActor(policy, name, which), {
        "image_size": sizes["external"],
        "wrist_size": sizes["wrist"],
    }


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint's configuration and weights: results of other weights never mix with its
    own."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
