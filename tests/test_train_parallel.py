"""Two processes with half a batch each learn what one process learns with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from spear.train import loop
from spear.train.optimize import Optimization

OPT = Optimization(steps=12, lr=1e-2, warmup=3, ema=0.9, precision="fp32")


class Line:
    """A linear regression without randomness in its loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)

    def batch(self, step: int) -> dict[str, Any]:
        return {"x": torch.randn(6, 3, generator=torch.Generator().manual_seed(step))}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        x = batch["x"]
        return (self.model(x) - x.sum(-1, keepdim=True)).square().mean(), {}


class Pairs(Line):
    """The batches 2k and 2k + 1 together."""

    def batch(self, step: int) -> dict[str, Any]:
        return {"x": torch.cat([Line.batch(self, 2 * step + r)["x"] for r in (0, 1)])}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_train_parallel import OPT, Line
from spear.train import loop, parallel
parallel.start()
assert parallel.world() == 2
loop.run(Line(), OPT, Path(sys.argv[1]), seed=0, workers=0, quiet=True)
"""


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    loop.run(Pairs(), OPT, tmp_path / "one", seed=0, workers=0, quiet=True)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), str(tmp_path / "two"), str(Path(__file__).parent)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    for name in ("model", "ema"):
        one, two = (
            load_file(tmp_path / run / "checkpoints" / "step-00000012" / f"{name}.safetensors")
            for run in ("one", "two")
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)
