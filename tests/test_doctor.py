"""`spear doctor` compares optimized inference with the plain network, and names what disagrees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refusals import Command, refuses
from spear import doctor
from spear.cli import main
from spear.models.presets import get_preset
from spear.train.memory import MemoryEstimate


@pytest.mark.slow
def test_everything_agrees_on_this_machine(tmp_path: Path, run_command: Command) -> None:
    page = tmp_path / "doctor.html"

    output = run_command("doctor", "--device", "cpu", "--out", str(page))

    for name in ("plain network", "fast"):
        for dtype in ("float32", "bfloat16"):
            row_start = f"| {name} | {dtype} |"
            assert row_start in output
            assert row_start in page.read_text()


@pytest.fixture
def instant_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the speed of the machine and the memory of the model, so that nothing is measured."""
    speed = doctor.MachineSpeed(bytes_per_s=1e10, flops_per_s=1e11)
    estimate = MemoryEstimate(
        weights=2**25,
        gradients=0,
        moments=0,
        ema=0,
        activations=0,
        num_parameters=1,
        num_trainable=0,
    )
    monkeypatch.setattr(doctor, "measure_machine", lambda *_: speed)
    monkeypatch.setattr(doctor, "measure_inference_memory", lambda *_: estimate)


@pytest.mark.usefixtures("instant_measurements")
def test_an_implementation_that_differs_or_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 the fast implementation has another result, and in bfloat16 it fails."""
    sample_fast = doctor.sample_fast

    def sample_wrongly(model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        if model.dtype == torch.bfloat16:
            raise RuntimeError("no kernel")
        return sample_fast(model, *arguments, **options) + 3e-4

    monkeypatch.setattr(doctor, "sample_fast", sample_wrongly)

    assert main(["doctor", "--device", "cpu", "--out", str(tmp_path / "doctor.html")]) == 1

    output = capsys.readouterr()
    assert "fast in float32, fast in bfloat16" in output.err
    assert "no kernel" in output.out


@pytest.fixture
def examine_with(
    instant_measurements: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], str]:
    """A function that examines a machine with this available memory, in kB.

    It returns the type of the first result: the first one that fits into memory.
    """
    monkeypatch.setattr(doctor, "MEMORY_INFO", tmp_path / "meminfo")

    def examine(available_kb: int) -> str:
        text = f"MemFree: 9 kB\nMemAvailable: {available_kb} kB\n"
        (tmp_path / "meminfo").write_text(text)
        return next(
            doctor.measure_implementations(get_preset("nano"), torch.device("cpu"), repeats=1)
        ).dtype

    return examine


def test_memory_that_holds_copies_of_files_is_available(
    examine_with: Callable[[int], str],
) -> None:
    """Only "MemAvailable" counts such memory; "MemFree" is 9 kB."""
    assert examine_with(2**30) == "float32"


def test_a_preset_that_does_not_fit_is_refused(examine_with: Callable[[int], str]) -> None:
    refuses("nano", examine_with, 9)
