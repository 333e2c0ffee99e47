"""SPEAR-1 as a policy of LeRobot, which imports this package by itself.

LeRobot then knows `--policy.type=spear1`, and `--env.type=spear`, the embedded simulator.
"""

from . import environment_spear
from .configuration_spear1 import Spear1Config
from .modeling_spear1 import Spear1Policy
from .processor_spear1 import make_spear1_pre_post_processors

__all__ = ["Spear1Config", "Spear1Policy", "environment_spear", "make_spear1_pre_post_processors"]
