"""SIMPLER's WidowX tasks on ManiSkill 3: photographs of a real table, with a simulated arm and objects."""
