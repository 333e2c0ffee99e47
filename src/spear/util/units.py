"""Units of lengths and angles that datasets are recorded in, with their factors to meters and
radians."""

import math
from collections.abc import Mapping

LENGTH_UNITS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}  # unit -> meters
ANGLE_UNITS = {"rad": 1.0, "deg": math.pi / 180}  # unit -> radians


def name_unit(factor: float, units: Mapping[str, float]) -> str:
    """Name a unit by its factor: "mm", or "0.05 m" if it is none of the known ones.

    Args:
        factor: How many meters or radians one unit has.
        units: `LENGTH_UNITS` or `ANGLE_UNITS`.

    Example:
        >>> name_unit(0.001, LENGTH_UNITS), name_unit(0.05, LENGTH_UNITS)
        ('mm', '0.05 m')
    """
    for name, known_factor in units.items():
        if math.isclose(factor, known_factor, rel_tol=1e-6):
            return name
    return f"{factor:.3g} {next(iter(units))}"


def get_unit_factor(name: str, units: Mapping[str, float]) -> float:
    """Return the factor of a unit from the name that `name_unit` made.

    Example:
        >>> get_unit_factor("mm", LENGTH_UNITS), get_unit_factor("0.05 m", LENGTH_UNITS)
        (0.001, 0.05)
    """
    if name in units:
        return units[name]
    number, _ = name.split()
    return float(number)
