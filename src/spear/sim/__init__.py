"""The embedded simulator: an arm at a table with everyday things, on MuJoCo, registered with Gymnasium."""

from importlib.util import find_spec

if find_spec("gymnasium"):  # which what others take from here needs no more than MuJoCo
    import gymnasium

    gymnasium.register("spear/Tabletop-v0", "spear.sim.env:TabletopEnv")
