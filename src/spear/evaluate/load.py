"""Actors by name, for the command line."""

from __future__ import annotations

import os
from typing import TypedDict

from spear.evaluate.actors import NOTHING, Actor, ConstantActor, ExpertActor, PolicyActor
from spear.policy import Spear1Policy
from spear.sim.render import Size


class Cameras(TypedDict, total=False):
    """Sizes (width, height), by keyword of `spear.evaluate.closed_loop.evaluate`."""

    image_size: Size
    wrist_size: Size


def load_actor(name: str) -> tuple[Actor, Cameras]:
    """Who acts ("expert", "nothing", a trained folder, a shipped name or a server's ws:// address), and the cameras
    that it needs."""
    if name == "expert":
        return ExpertActor(), {}
    if name == "nothing":
        return ConstantActor("nothing", NOTHING), {}
    if name.startswith(("ws://", "wss://")):
        from spear.serve.client import RemotePolicy

        return PolicyActor(RemotePolicy(name, os.environ.get("SPEAR_TOKEN")), name), {}
    policy = Spear1Policy.load(name)
    sizes = policy.processor.image_sizes
    return PolicyActor(policy, name), {"image_size": sizes["external"], "wrist_size": sizes["wrist"]}
