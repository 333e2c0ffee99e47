"""Worker processes of scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, *lines: str) -> str:
    """What a script with a module `loaded` beside it says on stderr."""
    head = "import os, signal, time", "from spear.util.processes import open_worker_pool"
    (folder / "script.py").write_text("\n".join((*head, *lines)))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    command, how = (
        [sys.executable, str(folder / "script.py")],
        {"env": env, "start_new_session": True},
    )
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, **how
    ).stderr


@pytest.mark.parametrize(
    ("guard", "said"), [("if True:", "__main__"), ('if __name__ == "__main__":', "out of memory")]
)
def test_a_script_that_its_workers_would_run_again_is_told_so(
    guard: str, said: str, tmp_path: Path
) -> None:
    work = (
        "    with open_worker_pool(1, 'spear.errors', '') as made:",
        "        made.submit(os._exit, 1).result()",
    )
    assert said in run(tmp_path, guard, *work).splitlines()[-1]


LOADED = """import os, signal, time
parent = os.getppid()
os.killpg(0, signal.SIGINT)
while os.getppid() == parent:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("loaded", [LOADED, ""])
def test_an_interrupt_is_for_one_process_alone_and_waits_for_no_worker(
    loaded: str, tmp_path: Path
) -> None:
    (tmp_path / "loaded.py").write_text(loaded)
    heard = (
        "    signal.signal(signal.SIGINT, signal.default_int_handler)"  # where it is ignored too
    )
    begin = (
        'if __name__ == "__main__":',
        heard,
        "    with open_worker_pool(1, 'loaded', '') as made:",
    )
    work = "        made.submit(time.sleep, 600)", "        raise KeyboardInterrupt"
    assert run(tmp_path, *begin, *work).count("Traceback") == 1
