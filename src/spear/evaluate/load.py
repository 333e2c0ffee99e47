"""Actors by name, for the command line."""

from __future__ import annotations

from spear.evaluate.actors import NOTHING, Actor, ConstantActor, ExpertActor, PolicyActor
from spear.policy import Spear1Policy
from spear.sim.render import Size


def load_actor(name: str) -> tuple[Actor, Size, Size]:
    """ "expert", "nothing", a trained folder or "nano" -> who acts, and the camera sizes it wants to see."""
    if name == "expert":
        return ExpertActor(), (280, 210), (112, 112)
    if name == "nothing":
        return ConstantActor("nothing", NOTHING), (280, 210), (112, 112)
    policy = Spear1Policy.load(name)
    sizes = policy.processor.image_sizes
    return PolicyActor(policy, name), sizes["external"], sizes["wrist"]
