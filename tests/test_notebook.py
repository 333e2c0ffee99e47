"""The notebook is stored with outputs, and its cells print them when they run."""

import contextlib
import io
import json
import re
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from page_blocks import find_difference, run_line
from serve_here import SPEAR_CLI_CODE, run_python
from spear.data.readers.formats import read_episodes
from spear.evaluate.open_loop import build_observations
from spear.serve.client import RemotePolicy

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
MAX_BYTES = 500_000  # a larger notebook is slow to load in a browser
MAX_RELATIVE_ERROR = 0.3  # results after a training differ between processors


def read_code_cells() -> list[dict[str, Any]]:
    """Return the cells of the notebook that contain code."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_cell(cell: dict[str, Any], variables: dict[str, Any]) -> str:
    """Run a cell as a notebook would, and return what it prints.

    variables: those of the notebook, which the cell may read and change.
    """
    source = "".join(cell["source"])
    python = re.sub(r"^!.*", "", source, flags=re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for command in re.findall(r"^!(.*)", source, re.MULTILINE):
            run_line(command, printed)
        exec(python, variables)
    return printed.getvalue()


def read_stored_text(cell: dict[str, Any]) -> str:
    """Return the text that a cell printed when the notebook was stored."""
    texts = ["".join(output.get("text", "")) for output in cell["outputs"]]
    return "".join(texts)


def test_every_cell_is_stored_with_its_output() -> None:
    for cell in read_code_cells():
        assert cell["outputs"], cell["source"]


def test_the_notebook_has_three_pictures_and_is_small() -> None:
    outputs = [output for cell in read_code_cells() for output in cell["outputs"]]

    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size < MAX_BYTES


def test_stored_outputs_have_no_progress_bars() -> None:
    for cell in read_code_cells():
        assert not re.search(r"\x1b|\r|: \d+ of \d+ ", read_stored_text(cell))


@pytest.mark.slow  # runs the whole notebook
def test_the_cells_print_what_is_stored_and_the_policy_can_be_served(
    renderer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    for cell in read_code_cells():
        printed = run_cell(cell, variables)

        assert not find_difference(read_stored_text(cell), printed, MAX_RELATIVE_ERROR)

    folder = Path("runs/tutorial")
    episode, *_ = read_episodes(folder / "my_robot", "train[6:]")
    with run_python(
        SPEAR_CLI_CODE, "serve", "--policy", str(folder / "mine"), "--port", "0"
    ) as server:
        line = server.stdout.readline()
        match = re.search(r"ws://\S+", line)
        assert match, line
        with closing(RemotePolicy(match[0])) as policy:
            actions = policy.infer(build_observations(episode)[0])["actions"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert actions.shape == (5, 8)
    assert np.isfinite(actions).all()
    quaternions = actions[:, 3:7]
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=1), 1, atol=1e-5)
