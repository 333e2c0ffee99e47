"""The embedded simulator: an arm at a table with everyday objects, on MuJoCo, registered with
Gymnasium."""

from importlib.util import find_spec

# Other packages import constants from here, and work without Gymnasium and MuJoCo.
if find_spec("gymnasium"):
    import gymnasium

    gymnasium.register("spear/Tabletop-v0", "spear.sim.env:TabletopEnv")
