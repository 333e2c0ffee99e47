"""Closed loop in SIMPLER, a benchmark of WidowX tasks in the simulator ManiSkill 3.

The background of its images is a photograph of a real table. The arm and the objects are simulated.
"""
