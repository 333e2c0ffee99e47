"""The memory estimator against what PyTorch's allocator and autograd really do, at sizes that fit here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType

from models_tiny import TINY
from spear.cli import main
from spear.errors import SpearError
from spear.models import presets
from spear.models.fast.linear import HAS_BFLOAT16
from spear.models.presets import Preset, spear1_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.train import memory
from spear.train.optimize import Optimization, Stepper
from spear.train.recipes import Recipe
from spear.types import Action

OPT = Optimization(steps=2, lr=1e-3, ema=0.9)
STAGE = Recipe("plan", "vla", "tiny", "", OPT, batch_size=8, flow_samples=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


class Acting:
    """The loss that the estimator plans, on real random tensors."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Spear1ForActionPrediction(spear1_config(TINY))

    def batch(self, step: int) -> dict[str, Any]:
        batch = memory._observation(TINY, 8)
        batch["pixel_values"] = {v: torch.randint_like(p, 256) for v, p in batch["pixel_values"].items()}
        rotation = torch.nn.functional.normalize(torch.randn(8, 5, 4), dim=-1)
        return {**batch, "actions": Action(torch.randn(8, 5, 3), rotation, torch.randn(8, 5, 1)).to_vector()}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, Mapping]:
        actions = Action.from_vector(batch.pop("actions"))
        return self.model(**batch, actions=actions, flow_samples=2, generator=generator).loss, {}


def traced(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that the allocator held at most while something ran, of what it gave out in it, and those left
    after.

    Read from the allocator's own running total: a sum over the recorded events is right only if all of them
    are there
    and in order, which they have not always been. Two marks say where the total stood before and after.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        first = torch.empty(12_345, dtype=torch.uint8)
        run()
        last = torch.empty(54_321, dtype=torch.uint8)
    events, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.extra_fields.alloc_size, event.extra_fields.total_allocated))
    assert len(events) > 100
    (before,) = (total for size, total in events if size == first.nbytes)
    (after,) = (total - size for size, total in events if size == last.nbytes)
    peak = max(total for size, total in events if size != last.nbytes)
    return peak - before, after - before


def allocated(stage: Recipe) -> int:
    """Most bytes that the allocator held in a step, of what it gave out in it, and the weights and states
    before."""
    task = Acting()
    stepper = Stepper(task, stage.optimization, seed=0)
    batch = task.batch(0)
    stepper(0, dict(batch))
    stepper.optimizer.zero_grad()
    before = sum(t.untyped_storage().nbytes() for t in task.model.state_dict().values())
    before += sum(t.nbytes for state in stepper.optimizer.state.values() for t in state.values())
    before += sum(t.nbytes for t in (stepper.ema or {}).values())
    return before + traced(lambda: stepper(1, batch))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"frozen": ("vlm",), "frozen_precision": "bf16", "ema": 0},
        {"moments": "bf16", "frozen": ("vlm.moge",)},
    ],
)
def test_the_estimate_is_what_the_allocator_gives_out(changes: dict[str, Any]) -> None:
    stage = STAGE.changed(**changes)
    planned = memory.training(stage, as_on_gpu=False)
    assert planned.total == pytest.approx(allocated(stage), rel=0.05)


def test_weights_gradients_and_states_are_exact() -> None:
    stage = STAGE.changed(frozen=("vlm",), frozen_precision="bf16", moments="bf16")
    stepper = Stepper(Acting(), stage.optimization, seed=0)
    planned = memory.training(stage, as_on_gpu=False)
    learning = sum(p.numel() for p in stepper.learning.values())
    stored = sum(t.nbytes for t in (*stepper.model.parameters(), *stepper.model.buffers()))
    assert planned.learning == learning and planned.parameters > learning
    assert (planned.gradients, planned.moments, planned.averaged) == (
        4 * learning,
        4 * learning,
        4 * learning,
    )
    assert planned.weights == stored


def test_what_saves_memory_does() -> None:
    whole = memory.training(STAGE)
    less = memory.training(STAGE.changed(gradient_checkpointing=True))
    assert less.activations < 0.6 * whole.activations and less.weights == whole.weights
    pieces = memory.training(STAGE.changed(accumulate=8))
    assert pieces.activations < 0.5 * whole.activations
    assert memory.training(STAGE.changed(ema=0)).averaged == 0
    tries = [memory.training(STAGE.changed(**changes)).total for changes in memory.savers(STAGE)]
    assert min(tries) == tries[-1] < whole.total


def test_the_first_saver_that_fits_is_named() -> None:
    sizes = {False: 100, True: 50}

    def measure(stage: Recipe) -> memory.Memory:
        total = sizes[stage.optimization.gradient_checkpointing]
        return memory.Memory(total, 0, 0, 0, 0, 1, 1)

    fits, _ = memory.fit(STAGE, 60, measure)
    assert fits is not None
    assert memory.flags(fits[0]) == "--set frozen_precision=bf16 gradient_checkpointing=true"
    assert memory.fit(STAGE, 100, measure)[0] == ({}, measure(STAGE))
    assert memory.fit(STAGE, 40, measure)[0] is None


def test_lora_and_questions_are_planned() -> None:
    pytest.importorskip("peft")
    frozen = ("vlm.language_model", "vlm.vision_tower", "vlm.moge")
    lora = memory.training(STAGE.changed(lora_rank=4, frozen=frozen))
    expert = memory.training(STAGE.changed(frozen=("vlm",)))
    assert expert.learning < lora.learning < memory.training(STAGE).learning
    assert memory.training(STAGE.changed(question_images=4)).total > memory.training(STAGE).total
    assert memory.training(STAGE.changed(kind="vlm")).total > 0


def test_acting_in_half_precision_takes_half() -> None:
    full, half = (memory.inference(TINY, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.total == pytest.approx(full.total / 2, rel=0.2) and half.gradients == half.learning == 0


NANO = presets.PRESETS["nano"]
LESS = {"num_hidden_layers": 2}
SMALL = dataclasses.replace(
    presets.PRESETS["small"],
    name="small, 2 layers",
    vocabulary=2048,
    vision={**presets.PRESETS["small"].vision, **LESS},
    moge={**(presets.PRESETS["small"].moge or {}), "num_hidden_layers": 4},
    text={**presets.PRESETS["small"].text, **LESS},
    expert={**presets.PRESETS["small"].expert, **LESS},
)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(NANO, torch.float32), (NANO, torch.bfloat16), (SMALL, torch.float32)],
    ids=["nano", "nano in bfloat16", "small"],
)
def test_what_inference_on_a_cpu_takes_is_what_the_allocator_gives_out(
    size: Preset, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Spear1ForActionPrediction(spear1_config(size)).eval().to(dtype)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    acting = memory.inference(size, dtype, 2, as_on_gpu=False)
    both = memory.inference(size, dtype, 2, as_on_gpu=False, answers=True)
    act_peak, act_kept = traced(lambda: memory._act(model, size, 2))
    answer_peak, answer_kept = traced(lambda: memory._answer(model, size, 2))
    assert acting.weights == both.weights == weights
    # What is kept: weights of the expert, then of the language model, once more; AVX2's layout pads small
    # ones.
    padded = 0.02 if HAS_BFLOAT16 else 0.1
    assert acting.prepared == pytest.approx(act_kept, rel=padded)
    assert both.prepared == pytest.approx(act_kept + answer_kept, rel=padded)
    expert = sum(p.nbytes for p in model.expert.layers.parameters())
    both_parts = expert + sum(p.nbytes for p in model.vlm.language_model.layers.parameters())
    near = 0.05
    if dtype == torch.float32 or HAS_BFLOAT16:
        assert 0.9 * expert < acting.prepared < 1.2 * expert
        assert 0.9 * both_parts < both.prepared < 1.2 * both_parts
    else:  # oneDNN cannot use them here: none are packed, and PyTorch's own products take memory of their own
        assert both.prepared < 0.1 * both_parts
        near = 0.15
    assert acting.total == pytest.approx(weights + act_peak, rel=near)
    assert both.total == pytest.approx(weights + max(act_peak, act_kept + answer_peak), rel=near)


def test_on_a_gpu_fused_weights_are_moved_not_copied() -> None:
    planned = memory.inference(NANO, torch.float32)
    on_cpu = memory.inference(NANO, torch.float32, as_on_gpu=False)
    assert planned.prepared < 0.2 * on_cpu.prepared and planned.weights == on_cpu.weights


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "--preset", "tiny", "--gpu", "16GB", "--batch-size", "64")
    assert main([*arguments, "--recipe", "post-train-bridge"]) == 0
    said = capsys.readouterr().out
    assert "together" in said and said.endswith("fits\n") and "usable of 16GB: 14.8 GiB" in said
    assert main(["plan", "--preset", "tiny", "--gpu", "8GB", "--recipe", "inference"]) == 0
    said = capsys.readouterr().out
    assert "bfloat16" in said and said.count("acting and answering") == 2
    for wrong, words in (
        (("--gpu", "big"), "no size of a GPU: 'big': write it like 24GB"),
        (("--recipe", "finetune-lorra"), "did you mean 'finetune-lora'"),
        (("--recipe", "nano-depth"), "plan a vla or vlm recipe"),
        (("--batch-size", "3"), "batch_size 3 has no 8 equal pieces"),
    ):
        assert main(["plan", "--preset", "tiny", *wrong]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_sizes_of_gpus() -> None:
    assert memory.usable("24GB") == memory.usable("24 GiB") == memory.usable("24")
    assert 0.9 * 24 * memory.GIB < memory.usable("24GB") < 24 * memory.GIB
    with pytest.raises(SpearError):
        memory.usable("-3GB")
