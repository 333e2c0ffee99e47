"""Finds the checks: every `RolloutCheck` in a file of `checks.rollout` or `policy_checks`."""

import functools
import importlib
import pkgutil
from types import ModuleType

import spear.checks.rollout
import spear.diagnose.policy_checks
from spear.checks.rollout.case import RolloutCheck

FAULTS = (
    "action-frame",
    "action-sign",
    "translation-unit",
    "angle-unit",
    "quaternion-order",
    "euler-order",
    "gripper-inverted",
    "gripper-scale",
    "gripper-late",
    "cameras-exchanged",
    "camera-mirrored",
    "camera-turned",
    "camera-cropped",
    "camera-stretched",
    "camera-bgr",
    "camera-exposure",
    "camera-frozen",
    "camera-late",
    "camera-missing",
    "padding-bars",
    "control-rate",
    "latency",
    "controller-short",
    "actions-repeated",
    "actions-dropped",
    "wrong-statistics",
    "unseen-instruction",
    "start-outside",
    "object-not-in-view",
    "seam-jumps",
    "ignores-images",
    "ignores-words",
    "few-demonstrations",
    "overfitting",
)
"""All faults that a diagnosis should be able to name, in the order of the how-to page."""


@functools.cache
def make_all_checks() -> tuple[RolloutCheck, ...]:
    """Return one check of every class, in the order of `FAULTS`."""
    checks = []
    for package in (spear.checks.rollout, spear.diagnose.policy_checks):
        for module in _import_modules(package):
            for value in vars(module).values():
                is_check = isinstance(value, type) and issubclass(value, RolloutCheck)
                if is_check and value.__module__ == module.__name__ and hasattr(value, "fault"):
                    checks.append(value())
    return tuple(sorted(checks, key=lambda check: FAULTS.index(check.fault)))


def _import_modules(package: ModuleType) -> list[ModuleType]:
    """Import all modules of a package."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]
