"""Worker processes of scripts."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("guard", "said"), [("if True:", "__main__"), ('if __name__ == "__main__":', "out of memory")]
)
def test_a_script_that_its_workers_would_run_again_is_told_so(guard: str, said: str, tmp_path: Path) -> None:
    lines = (
        "import os",
        "from spear.util.processes import pool",
        guard,
        "    with pool(1, 'spear.errors', 'give fewer') as made:",
        "        made.submit(os._exit, 1).result()",
    )
    (tmp_path / "script.py").write_text("\n".join(lines))
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said in done.stderr.splitlines()[-1]
