"""The embedded simulator: an arm at a table with everyday things, on MuJoCo, registered with Gymnasium."""

import gymnasium

from spear.sim.scene import FAMILIES

gymnasium.register("spear/Tabletop-v0", "spear.sim.env:TabletopEnv", kwargs={"family": FAMILIES[0]})
