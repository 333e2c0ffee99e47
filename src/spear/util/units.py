"""Units of lengths and angles that datasets are recorded in, with their factors to meters and
radians."""

import math

LENGTH_UNITS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}  # unit -> meters
ANGLE_UNITS = {"rad": 1.0, "deg": math.pi / 180}  # unit -> radians
