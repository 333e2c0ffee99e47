"""What a training is given: refused in one line where it is missing, out of range, or changes nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spear.cli import main
from spear.errors import SpearError
from spear.train.options import Inputs, check_inputs
from spear.train.recipes import recipe


@pytest.mark.parametrize(
    ("name", "given", "key"),
    [
        ("nano-vla", "labels init", "--episodes"),
        ("nano-vlm-1", "labels init moge episodes", "--episodes"),
        ("nano-vlm-1", "init moge", "--labels"),
        ("nano-vla", "episodes init", "--labels"),  # for the questions beside
        ("nano-post", "episodes", "--labels"),  # for the tokenizer of a model from random weights
        ("nano-depth", "labels init", "--init"),
        ("nano-siglip", "labels init", "--init"),
        ("nano-post", "episodes init moge", "--moge"),
        ("nano-vlm-1", "labels moge", "--moge"),
    ],
)
def test_what_is_missing_or_would_change_nothing_is_named(name: str, given: str, key: str) -> None:
    words: dict[str, Any] = {word: Path(word) for word in given.split() if word != "episodes"}
    if "episodes" in given:
        words["episodes"] = [("mine", None, 1.0)]
    with pytest.raises(SpearError, match=f"recipe {name} .*{key}"):
        check_inputs(recipe(name), Inputs(**words))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", bad) for bad in (math.nan, math.inf, -1e-4, True, "fast")),
        *(("steps", bad) for bad in (-1, 2.5)),
        ("lr_scale", {"vlm": -1.0}),
        ("ema", 1.0),
        *(("betas", bad) for bad in ([0.9, 3], [0.9])),
        *(("grad_clip", 0), ("augment", 7), ("bins", 1), ("frozen", "vlm")),
        *(("moments", "bf61"), ("spacing", "unifrom")),
        *(("pairs", bad) for bad in ([4, 1], [0, 1])),
        ("families", []),
        ("flow", {"rotation_weight": math.nan}),
        ("lora_rank", -1),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(SpearError, match=key):
        recipe("nano-vla").changed(**{key: value})


def test_values_are_taken_as_json_has_them() -> None:
    changes = {"frozen": ["vlm.moge"], "betas": [0.5, 0.9], "lr": 1, "pairs": [2, 2], "augment": None}
    stage = recipe("nano-vla").changed(**changes)
    assert stage.optimization.lr == 1 and stage.questions.pairs == [2, 2] and stage.augment == 0.5


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train nano-post --init nano --seed -1", "--seed"),
        ("train nano-post --init nano --episodes a --shares 0", "--shares 0"),
        ("train nano-post --init nano --episodes a --shares nan", "--shares nan"),
        ("train nano-post --init nano --episodes a --shares 1 2", "--shares"),
        ("train nano-post --init nano", "--episodes"),
        ("train nano-vlm2", "'nano-vlm-2'"),
        ("train nano-vla --set batchsize=3", "'batch_size'"),
        ('train nano-vla --set families=["keypont"]', "'keypoint'"),
        ("train nano-vla --set lr", "KEY=VALUE"),
        ("train nano-vla --preset nanno", "'nano'"),
        ("train nano-vla --weights 1", "--weights"),
        ("plan --gpu big", "'big'"),
        ("plan --recipe finetune-lorra", "'finetune-lora'"),
    ],
)
def test_the_commands_refuse_in_one_line(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


def test_recipes_are_listed_and_mistakes_are_found_without_pytorch() -> None:
    code = (
        "import sys; from spear.cli import main; main(['train', 'list']); "
        "main(['train', 'nano-vla', '--set', 'lr=-1']); main(['evaluate', 'ablations', '--seeds', '0']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nano-vlm-2" in done.stdout and len(done.stderr.splitlines()) == 2
