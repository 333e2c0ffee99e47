"""SIMPLER's WidowX tasks on ManiSkill 3: photographs of a real table, with a simulated arm and objects before
them.

`tasks.py` says which tasks there are, `world.py` is one of them in ManiSkill, in a process of its own,
`oracle.py` the scripted reference. ManiSkill is not loaded before a scene is asked for.
"""
