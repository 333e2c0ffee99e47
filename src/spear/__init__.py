"""SPEAR-1: label images with 3D, train the 3D-aware VLM, train the policy, evaluate it, serve it."""

__version__ = "0.1.0"
