"""Worker processes of scripts; who computes keeps worker threads, who has done so gives them back."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from spear.util.processes import release_workers


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_a_thread_gives_its_workers_back_and_gets_new_ones() -> None:
    if not list(Path(torch.__file__).with_name("lib").glob("libgomp*")):
        pytest.skip("PyTorch comes with another OpenMP here")
    counts: list[int] = []
    results: list[torch.Tensor] = []
    x = torch.arange(2.0**22)

    def work() -> None:
        torch.set_num_threads(3)
        for _ in range(2):
            counts.append(len(list(Path("/proc/self/task").iterdir())))
            results.append(x * 2 + 1)
            counts.append(len(list(Path("/proc/self/task").iterdir())))
            release_workers()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before, computed, released, again = counts
    assert computed == before + 2
    assert released == before
    assert again == before + 2
    assert torch.equal(results[0], results[1])
