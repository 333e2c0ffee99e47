"""`spear convert …`: dry runs, whole ways there and back, and one clear line for bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from published_checkpoints import (
    ROWS,
    TINY14,
    paligemma,
    pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
)
from refusals import Command
from spear.cli import main
from spear.models.processing import Processor
from spear.models.spear1 import load_inner_vlm
from spear.models.weights import conversion
from spear.models.weights.published import PUBLISHED
from spear.tokens import CoordinateTokenizer

pytestmark = pytest.mark.usefixtures("known_sizes")
BACKBONES = ("convert", "backbones")


def coordinates(path: Path, bins: int = TINY14.bins) -> str:
    CoordinateTokenizer.fit(np.random.default_rng(0).normal(size=1000), bins, "metre").save(path)
    return str(path)


def test_from_backbones_to_a_policy(
    tmp_path: Path, done: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma")
    moge = publish_moge(tmp_path / "model.pt")
    expert = publish_pi0(pi0(state=32, action=32), tmp_path / "pi0")
    vlm, policy = (tmp_path / name for name in ("vlm", "policy"))
    meaning = coordinates(tmp_path / "coordinates.json")
    size = ("--preset", "tiny14")
    monkeypatch.setattr(conversion, "MOST", "100KB")
    made = [
        (*BACKBONES, str(folder), str(moge), "--out", str(vlm), "--coordinates", meaning, *size),
        ("convert", "vlm", str(vlm), "--out", str(policy), "--expert", str(expert), *size),
    ]
    for argv in made:
        said = done(*argv, "--dry-run")
        assert "nothing written" in said and "SPEAR-VLM" in said
        assert not Path(argv[argv.index("--out") + 1]).exists()
        assert done(*argv).startswith(said.partition("nothing written")[0])
    first, last = (load_inner_vlm(path).state_dict() for path in (vlm, policy))
    assert all(torch.equal(last[name], weight) for name, weight in first.items())
    assert len(list(policy.glob("*.safetensors"))) > 1
    for path in (vlm, policy):
        processor = Processor.load(path)
        assert processor.coordinate_ids.start == ROWS
        assert dict(processor.image_sizes) == dict(TINY14.image_sizes)
        assert json.loads((path / "recipe.json").read_text())["converted"]
        assert (path / "README.md").read_text().startswith("---\nlicense: gemma\n")


def test_what_does_not_fit_is_one_line(
    tmp_path: Path,
    done: Command,
    refused: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    bare = str(publish_paligemma(paligemma(), tmp_path / "bare", tokenizer=False))
    size = ("--preset", "tiny14", "--dry-run")
    few = coordinates(tmp_path / "few.json", 8)
    assert "tokenizer" in refused(*BACKBONES, bare, "none", "--coordinates", few, *size)
    assert "'--dry-run'" in refused(*BACKBONES, bare, "none", "--dryrun")
    into = ("--out", str(tmp_path / "few.json" / "out"), "--preset", "tiny14")  # that is a file
    assert "cannot write" in refused(*BACKBONES, bare, "none", *into)
    into = ("--out", str(tmp_path / "full"), "--preset", "tiny14")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        assert "no room for" in refused(*BACKBONES, bare, "none", *into)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".part", "full"))]
    into = ("--out", str(tmp_path / "out"), "--preset", "tiny14")
    assert "without a processor" in done(*BACKBONES, bare, "none", *into)
    for command in ((*BACKBONES, bare, "none"), ("convert", "vlm", bare)):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert "is there already" in said.err and not said.out


def test_what_published_files_must_hold(done: Command, refused: Command) -> None:
    said = done("convert", "expected", "list")
    assert len(said.splitlines()) == len(PUBLISHED) and PUBLISHED["moge"].revision in said
    said = done("convert", "expected", "moge")
    assert (
        "24 × backbone.blocks.0…23.attn.qkv.weight [3072, 1024]" in said and "420 tensors" in said
    )
    assert "'pi0'" in refused("convert", "expected", "pi00")
