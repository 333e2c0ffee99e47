"""What is wrong with a training is found before its data are made, by all commands, and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_tiny import make
from spear.data.store.lerobot_write import write_lerobot
from spear.policy import locate

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine` must be prepared before it can be learned from; `cut` is nano with half of its weights."""
    root = tmp_path_factory.mktemp("given")
    write_lerobot([make(0), make(1)], root / "mine")
    weights = shutil.copytree(locate("nano"), root / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (root / "empty").mkdir()
    (root / "file").touch()
    state = {"step": 1, "skipped": 0, "counts": {}, "settings": {"seed": 5, "pieces": 1, "about": {}}}
    for name, settings in (("of-seed-5", {}), ("of-2-pieces", {"seed": 0, "pieces": 2})):
        begun = root / name / "checkpoints" / "step-00000001"
        begun.mkdir(parents=True)
        new = {**state, "settings": {**state["settings"], **settings}}
        (begun / "state.json").write_text(json.dumps(new))
    return root


@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param(
            "--device cuda", "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
        ),
        ("--device gpu", "'gpu'"),
        ("--shares 1 2", "--shares"),
        ("--init {}/cut", "model.safetensors"),
        ("--init nano-depth", "nano-depth"),
        ("--init nano --preset small", "small"),
        ("--moge {}/cut", "--moge"),
        ("--labels {}/empty --set question_images=4", "empty"),
        ("--set accumulate=3", "batch_size 32"),
        ('--set frozen=["vlm.moeg"]', "'vlm.moeg'"),
        ('--set flow={"rotatoin":1}', "'rotation'"),
        ("--set precision=fp32 frozen_precision=bf16", "frozen_precision"),
        ("--split trian", "trian"),
        ("--split train[5:]", "train[5:]"),
        ("--episodes {}/mine {}/missing", "missing"),
        ("--out {}/file/run", "file"),
        ("--out {}/of-seed-5", "seed"),
        ("--out {}/of-2-pieces --steps 0", "1 steps"),
    ],
)
def test_mistakes_are_found_before_data_are_made(
    words: str, named: str, given: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("spear.data.store.prepare.prepare", prepare)
    told = words.replace("{}", str(given)).split()
    usual = {"--init": "nano", "--episodes": str(given / "mine"), "--out": str(tmp_path / "run")}
    more = [word for pair in usual.items() if pair[0] not in told for word in pair]
    assert named in refused("train", "nano-post", *told, *more)
    assert not (tmp_path / "run").exists()


def test_ablations_ask_before_they_make_data(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spear.ablations.plan.obtain", None)
    words = ("--rows", "siglip", "--out", str(tmp_path / "run"), "--set", 'lr_scale={"visoin":1}')
    assert "'visoin'" in refused("evaluate", "ablations", *words)
    assert not (tmp_path / "run").exists()
