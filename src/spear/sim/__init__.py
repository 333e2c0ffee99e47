"""The embedded simulator: an arm at a table with everyday objects, on MuJoCo, registered with
Gymnasium."""

from importlib.util import find_spec

if find_spec("gymnasium"):  # other rooms import constants from here, and need no simulator
    import gymnasium

    gymnasium.register("spear/Tabletop-v0", "spear.sim.env:TabletopEnv")
