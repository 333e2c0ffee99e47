"""SIMPLER's WidowX tasks on ManiSkill 3.

The background is a photograph of a real table; the arm and the objects are simulated.
"""
