"""SPEAR-1: label images with 3D, train the 3D-aware VLM, train the policy, evaluate it, serve it."""

import os

# PyTorch's threads (GNU's OpenMP) wait busily for one another, for milliseconds: where another process
# has one of their cores, at each of a step's thousands of products. Set before PyTorch is imported, this
# lets them wait briefly, and then sleep (docs/robots.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
