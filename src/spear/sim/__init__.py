"""The embedded simulator: an arm at a table with everyday things, on MuJoCo, registered with Gymnasium."""

from spear.sim import env as env  # registers it
