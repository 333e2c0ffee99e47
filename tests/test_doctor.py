"""`spear doctor`: what agrees passes, what does not is named, with exit code 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

from refusals import Command, refuses
from spear import doctor
from spear.cli import main
from spear.models.presets import get_preset
from spear.train.memory import MemoryEstimate


def test_everything_agrees_on_this_machine(tmp_path: Path, done: Command) -> None:
    page = tmp_path / "doctor.html"
    said = done("doctor", "--device", "cpu", "--out", str(page))
    for way in ("plain network", "fast"):
        for dtype in ("float32", "bfloat16"):
            assert all(f"| {way} | {dtype} |" in text for text in (said, page.read_text()))


def test_a_way_that_differs_or_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.sample_fast

    def broken(model: Any, *rest: Any) -> torch.Tensor:
        if model.dtype == torch.bfloat16:
            raise RuntimeError("no kernel")
        return real(model, *rest) + 3e-4

    monkeypatch.setattr(doctor, "sample_fast", broken)
    monkeypatch.setattr(doctor, "machine", lambda *_: doctor.Machine(1e10, 1e11))  # measured above
    monkeypatch.setattr(
        doctor, "measure_inference", lambda *_: MemoryEstimate(2**25, 0, 0, 0, 0, 1, 0)
    )
    assert main(["doctor", "--device", "cpu", "--out", str(tmp_path / "doctor.html")]) == 1
    found = capsys.readouterr()
    assert "fast in float32, fast in bfloat16" in found.err and "no kernel" in found.out


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def examined(available: int) -> str:
        (tmp_path / "meminfo").write_text(f"MemFree: 9 kB\nMemAvailable: {available} kB\n")
        return next(doctor.examine(get_preset("nano"), torch.device("cpu"), repeats=1)).dtype

    monkeypatch.setattr(doctor, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(doctor, "machine", lambda *_: doctor.Machine(1e10, 1e11))
    monkeypatch.setattr(
        doctor, "measure_inference", lambda *_: MemoryEstimate(2**25, 0, 0, 0, 0, 1, 0)
    )
    assert examined(2**30) == "float32"  # memory that holds copies of files is there to be had
    refuses("nano", examined, 9)
