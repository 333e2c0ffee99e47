"""Who computes keeps worker threads, who has done so gives them back."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from spear.util.processes import release_workers


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
