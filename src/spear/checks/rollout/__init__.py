"""Checks of why a robot fails: one file per fault, which `spear diagnose` finds by itself.

`case` says what a check is and what it looks at. `motion`, `pictures` and `gripper` compute what
several checks need.
"""
