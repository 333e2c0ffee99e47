"""`python -m experiments.ablations` refuses mistakes early, and prints plans without PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_tiny import make_episode
from experiments.ablations import plan as planning
from experiments.ablations.__main__ import main
from labels_boxes import make_labeled_image
from spear.data.store.episode_store import append_episodes
from spear.labels.store import write_labels


@pytest.mark.parametrize(
    ("args", "hint"),  # the message contains the hint
    [
        (("--set", "steps=3"), "--budget"),
        (("--init", "nano-vlm-9"), "nano-vlm-0"),
        (("--episodes", "/nowhere", "--dry-run"), "/nowhere"),
        (("--rows", "siglip", "--set", 'lr_scale={"visoin":1}'), "'visoin'"),
    ],
)
def test_a_mistake_is_found_before_any_data_are_made(
    args: tuple[str, ...],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planning, "make_missing_data", None)  # calling it would fail
    out = tmp_path / "run"

    code = main([*args, "--out", str(out)])

    message = capsys.readouterr().err
    assert code == 2
    assert hint in message
    assert len(message.splitlines()) == 1
    assert not out.exists()


def test_a_plan_needs_no_network_library(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path)
    write_labels([make_labeled_image(0)], tmp_path / "labels-00000.parquet")
    program = (
        "import sys; from experiments.ablations.__main__ import main;"
        "assert main(['--dry-run', '--episodes', sys.argv[1], '--labels', sys.argv[1]]) == 0;"
        "assert not {'torch', 'transformers', 'mujoco'} & set(sys.modules)"
    )

    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )

    assert "nano-vlm-2" in result.stdout
    assert "scoring" in result.stdout
