"""SPEAR-1: label images with 3D, train the 3D-aware VLM, train the policy, evaluate it, serve
it."""

import os

# PyTorch's threads (GNU OpenMP) wait for one another in a busy loop, for milliseconds. Where
# another process uses one of their cores, they do so at each of a step's thousands of products.
# With this setting they wait briefly and then sleep (docs/results/serving.md). It must be set
# before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
