"""The Triton kernels for few tokens against PyTorch's: on a GPU as they act, else in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models" / "few_rows.py"
GPU = torch.cuda.is_available()


@pytest.mark.parametrize("batch", ["1", "2"])
def test_few_rows_are_what_the_stack_gives(batch: str) -> None:
    pytest.importorskip("triton")
    if not GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter needs NumPy before 2.4")
    command = [sys.executable, str(SCRIPT), "--batch", batch, "--repeats", "1"]
    more = {} if GPU else {"TRITON_INTERPRET": "1"}
    where = ["--device", "cuda" if GPU else "cpu"]
    said = subprocess.run(command + where, env={**os.environ, **more}, capture_output=True, text=True)
    found = re.search(r"difference: (\S+) .* (\S+)$", said.stdout, re.MULTILINE)
    assert found, said.stderr
    assert max(map(float, found.groups())) < (0.05 if GPU else 1e-5)
