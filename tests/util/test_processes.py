"""Worker processes: a script without a main guard, and interrupts by Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = """
import os, signal, time
from spear.util.processes import open_worker_pool
"""
MAIN_GUARD = 'if __name__ == "__main__":'


def run_script(folder: Path, script: str) -> str:
    """Run a script that can import the modules of its folder, and return what it writes to stderr.

    The script runs in its own process group, so that its interrupts do not reach the tests.
    """
    path = folder / "script.py"
    path.write_text(IMPORTS + script)
    module_paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": module_paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        start_new_session=True,
    )
    return finished.stderr


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("if True:", "__main__"),  # each worker runs the script again, and fails
        (MAIN_GUARD, "out of memory"),  # the worker ends by itself
    ],
)
def test_a_script_without_a_main_guard_is_told_of_it(
    guard: str, message: str, tmp_path: Path
) -> None:
    script = f"""
{guard}
    with open_worker_pool(1, 'spear.errors', '') as pool:
        pool.submit(os._exit, 1).result()
"""

    assert message in run_script(tmp_path, script).splitlines()[-1]


# A module that presses Ctrl-C while the worker that imports it starts. (The signal reaches all
# processes of the group.) Then it waits until its parent process ends.
INTERRUPTS_AND_WAITS_FOR_ITS_PARENT = """
import os, signal, time
parent = os.getppid()
os.killpg(0, signal.SIGINT)
while os.getppid() == parent:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "preloaded", [INTERRUPTS_AND_WAITS_FOR_ITS_PARENT, ""], ids=["while starting", "while working"]
)
def test_only_the_parent_reports_an_interrupt_and_it_waits_for_no_worker(
    preloaded: str, tmp_path: Path
) -> None:
    """`preloaded` is the content of a module that the workers import when they start.

    The script prints a single traceback, and ends long before the worker's sleep of 600 s.
    """
    (tmp_path / "preloaded.py").write_text(preloaded)
    # `signal.signal` makes Ctrl-C work also if the process of the tests ignores it.
    script = f"""
{MAIN_GUARD}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_worker_pool(1, 'preloaded', '') as pool:
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
"""

    assert run_script(tmp_path, script).count("Traceback") == 1
