"""Text from data of others is escaped, so that a terminal shows its control characters.

A terminal would otherwise obey them, for example clear the screen.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_tiny import make_episode
from refusals import Command
from spear.cli import run_reporting_errors
from spear.data.store.episode_store import append_episodes
from spear.errors import SpearError, escape_control_characters, notice
from spear.evaluate.results import build_terminal_table
from spear.util.progress import ProgressBar

CLEAR_SCREEN = "\x1b[2J"
ESCAPED_TEXT = r"\u001b[2J"
HOSTILE = f"push{CLEAR_SCREEN}\nepisodes      100"
"""A text that clears the screen, and pretends to be a line of `spear data inspect`."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pick up the cup", "pick up the cup"),
        ("Öffne die 杯子 🥤 at 5 °C", "Öffne die 杯子 🥤 at 5 °C"),
        ("\x1b]0;title\x07", r"\u001b]0;title\u0007"),
        ("\x9b2J", r"\u009b2J"),
        ("one\r\n\ttwo", r"one\r\n\ttwo"),
        ("cup\u202egnp", r"cup\u202egnp"),  # changes the direction of writing
        ("half \ud800", r"half \ud800"),  # half of a character
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, expected: str) -> None:
    assert escape_control_characters(text) == expected


def test_newlines_of_a_report_stay() -> None:
    assert escape_control_characters("a\n\rb", keep_newlines=True) == "a\n\\rb"


def test_an_error_is_one_line_without_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise SpearError(HOSTILE)

    run_reporting_errors(fail)

    assert capsys.readouterr().err == f"error: push{ESCAPED_TEXT}\\nepisodes      100\n"


def test_a_notice_is_one_line_without_commands(capsys: pytest.CaptureFixture[str]) -> None:
    run_reporting_errors(lambda: notice(HOSTILE))

    assert capsys.readouterr().err == f"note: push{ESCAPED_TEXT}\\nepisodes      100\n"


def test_a_cell_of_a_table_has_no_commands() -> None:
    stream = io.StringIO()
    table = build_terminal_table(HOSTILE, [CLEAR_SCREEN], [[CLEAR_SCREEN]], CLEAR_SCREEN)

    Console(file=stream).print(table)

    assert "\x1b" not in stream.getvalue()
    assert ESCAPED_TEXT in stream.getvalue()


def test_a_line_above_a_progress_bar_has_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar("evaluating", 1, "episodes").print_line(CLEAR_SCREEN)

    assert capsys.readouterr().err == f"{ESCAPED_TEXT}\n"


@pytest.fixture
def hostile_dataset(tmp_path: Path, run_command: Command) -> Path:
    """A LeRobot dataset with `HOSTILE` as the robot's name, in the state's names and as a task."""
    append_episodes([make_episode(0)], tmp_path / "store")
    folder = tmp_path / "set"
    run_command("data", "export", str(tmp_path / "store"), "--out", str(folder))

    info_file = folder / "meta/info.json"
    info = json.loads(info_file.read_text())
    info["robot_type"] = HOSTILE
    info["features"]["observation.state"]["names"] = [HOSTILE] * 8
    info_file.write_text(json.dumps(info))
    set_column(next(folder.glob("meta/episodes/**/*.parquet")), "tasks", [[HOSTILE]])
    set_column(folder / "meta/tasks.parquet", "__index_level_0__", [HOSTILE])
    return folder


def set_column(file: Path, name: str, values: list[object]) -> None:
    """Replace the values of a column in a Parquet file."""
    table = pq.read_table(file)
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), file)


@pytest.mark.parametrize("command", ["inspect", "describe"])
def test_a_dataset_is_described_without_commands(
    command: str, hostile_dataset: Path, run_command: Command
) -> None:
    output = run_command("data", command, str(hostile_dataset))

    assert "\x1b" not in output


def test_an_instruction_cannot_pretend_to_be_a_line(
    hostile_dataset: Path, run_command: Command
) -> None:
    lines = run_command("data", "inspect", str(hostile_dataset)).splitlines()

    assert f"       1 × push{ESCAPED_TEXT}\\nepisodes      100" in lines
    assert "episodes      100" not in lines


def test_a_proposed_layout_stays_json(hostile_dataset: Path, run_command: Command) -> None:
    assert json.loads(run_command("data", "describe", str(hostile_dataset)))
