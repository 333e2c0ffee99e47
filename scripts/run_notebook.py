"""Runs examples/quickstart.ipynb in an empty folder, and stores it with its outputs.

    pip install nbclient ipykernel
    python scripts/run_notebook.py

Progress bars are removed from the outputs, and pictures are stored as JPEG.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROGRESS = re.compile(r"[━╸╺ ]*[\w ,./-]+: \d+ of \d+ \w+,? ")
"""The line of a progress bar, such as "recording: 3 of 8 demonstrations, 6.2 demonstrations"."""


def remove_progress(text: str) -> str:
    """Return what remains on a terminal after a command, without the lines of progress bars."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        last_version = CONTROL_SEQUENCE.sub("", line.rpartition("\r")[2])
        if not PROGRESS.match(last_version):
            lines.append(last_version.rstrip())
    return "\n".join(lines).strip("\n") + "\n"


def clean_outputs(outputs: list[Any]) -> list[Any]:
    """Return the outputs of a cell: its printed text as one, and its pictures as JPEG."""
    printed = "".join(
        output["text"]
        for output in outputs
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )
    cleaned = []
    if printed:
        cleaned.append(
            nbformat.v4.new_output("stream", name="stdout", text=remove_progress(printed))
        )
    for output in outputs:
        if output["output_type"] == "execute_result":
            output["data"].pop("image/png", None)
            cleaned.append(output)
    return cleaned


def clean_notebook(notebook: Any) -> None:
    """Clean the outputs of all cells, and forget when they ran."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)


def main() -> None:
    """Run the notebook and store it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}})
        client.execute()
    clean_notebook(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
