"""The embedded simulator: an arm at a table with everyday things, on MuJoCo, registered with Gymnasium."""

import gymnasium

gymnasium.register("spear/Tabletop-v0", "spear.sim.env:TabletopEnv")
