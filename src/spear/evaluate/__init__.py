"""How good is a model? Success in closed loop, errors in open loop, and errors of 3D answers.

Every result has a number of samples n and a 95 % interval.
"""
