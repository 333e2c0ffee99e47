"""The memory estimator against what PyTorch's allocator and autograd really do, at sizes that fit here."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType

from models_tiny import TINY, actions, spear1
from refusals import Command
from spear.models import presets
from spear.train import memory
from spear.train.optimize import Stepper
from spear.train.options import Optimization, Recipe

LEAN = dataclasses.replace(
    TINY,
    image_sizes={"external": (48, 32)},
    moge=None,
    vision={**TINY.vision, "num_hidden_layers": 1},
)
OPT = Optimization(steps=2, lr=1e-3, ema=0.9)
STAGE = Recipe("plan", "vla", "lean", "", OPT, batch_size=8, flow_samples=2)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        patch.setitem(presets.PRESETS, "lean", LEAN)
        yield


@pytest.fixture(scope="module")
def whole(small: None) -> memory.Memory:
    """What the stage needs with nothing saved."""
    return memory.training(STAGE)


def allocated(stage: Recipe) -> tuple[Stepper, int]:
    """A stepper with the loss that the estimator plans, on real tensors, and most bytes that the allocator
    held in a step, of its own running total: given out in it, or held before, which a mark says."""
    model, batch, chunk = spear1(), memory._observation(TINY, 8), actions(8, 5)

    def loss(batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, Mapping]:
        return model(**batch, actions=chunk, flow_samples=2, generator=generator).loss, {}

    batch["pixel_values"] = {
        v: torch.randint_like(p, 256) for v, p in batch["pixel_values"].items()
    }
    stepper = Stepper(SimpleNamespace(model=model, loss=loss), stage.optimization, seed=0)
    stepper(0, [batch])
    stepper.optimizer.zero_grad()
    held = sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    held += sum(t.nbytes for state in stepper.optimizer.state.values() for t in state.values())
    held += sum(t.nbytes for t in (stepper.ema or {}).values())
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        mark = torch.empty(12_345, dtype=torch.uint8)
        stepper(1, [batch])
    events, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.extra_fields.alloc_size, event.extra_fields.total_allocated))
    assert len(events) > 100
    (before,) = (total for size, total in events if size == mark.nbytes)
    return stepper, held + max(total for _, total in events) - before


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"frozen": ("vlm",), "frozen_precision": "bf16"}]
)
def test_the_estimate_is_what_the_allocator_gives_out(changes: dict[str, Any]) -> None:
    stage = STAGE.with_changes(preset="tiny", **changes)
    planned, (stepper, given_out) = memory.training(stage, as_on_gpu=False), allocated(stage)
    assert planned.total == pytest.approx(given_out, rel=0.05)
    learning = sum(p.numel() for p in stepper.trainable.values())
    assert planned.learning == learning and planned.parameters >= learning
    assert planned.averaged == 4 * learning >= planned.gradients  # not everything has a gradient
    assert planned.moments == 8 * learning
    assert planned.weights == sum(
        t.nbytes for t in (*stepper.model.parameters(), *stepper.model.buffers())
    )


def test_what_saves_memory_does(whole: memory.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    last = memory.training(STAGE.with_changes(gradient_checkpointing=True, accumulate=8, ema=0))
    assert last.activations < 0.6 * whole.activations and last.weights == whole.weights
    assert last.moments == whole.moments and last.averaged == 0 < whole.averaged
    monkeypatch.setattr(memory, "training", lambda stage: whole)
    names = ["frozen_precision", "gradient_checkpointing", "accumulate", "ema"]
    assert [list(changes) for changes, _ in memory.plans(STAGE)] == [
        names[:count] for count in range(5)
    ]
    asking = STAGE.with_changes(
        batch_size=48, question_images=3
    )  # training cannot share 3 images among 6 pieces
    assert [c["accumulate"] for c, _ in memory.plans(asking) if "accumulate" in c] == []
    assert [c for c, _ in memory.plans(STAGE.with_changes(batch_size=4))][-1]["accumulate"] == 4


def test_lora_and_questions_are_planned(whole: memory.Memory) -> None:
    pytest.importorskip("peft")
    lora = memory.training(
        STAGE.with_changes(lora_rank=4, frozen=("vlm.language_model", "vlm.vision_tower"))
    )
    assert lora.learning < whole.learning <= whole.parameters < lora.parameters
    assert lora.weights > whole.weights
    asked = memory.training(STAGE.with_changes(question_images=4))
    assert asked.weights == whole.weights and asked.activations > whole.activations
    assert memory.training(STAGE.with_changes(kind="vlm")).weights < whole.weights


def test_the_command_says_what_fits_and_what_would_make_it_fit(
    whole: memory.Memory, done: Command, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", "--preset", "lean", "--batch-size", "64", "--recipe", "post-train-bridge")
    monkeypatch.setattr(memory, "training", lambda stage: whole)
    said = done(*arguments, "--gpu", "16GB")
    assert "together" in said and said.endswith("fits\n") and "usable of 16GB: 14.8 GiB" in said
    acting: list[memory.Memory] = []
    real = memory.inference
    monkeypatch.setattr(
        memory, "inference", lambda *given: acting.append(real(*given)) or acting[-1]
    )
    said = done("plan", "--preset", "lean", "--gpu", "8GB", "--recipe", "inference")
    assert "bfloat16" in said and said.count("fits in 8GB") == 2
    half, full = sorted(acting, key=lambda found: found.weights)
    assert (
        half.total == pytest.approx(full.total / 2, rel=0.2)
        and half.gradients == half.learning == 0
    )
    monkeypatch.undo()
    for wrong, named in (
        *((("--recipe", "nano-depth"), "nano-depth"), (("--batch-size", "3"), "batch_size 3")),
        (("--gpu", "-3GB"), "-3GB"),
        (("--recipe", "inference", "--batch-size", "0"), "--batch-size 0"),
        (("--batch-size", "64", "--set", "batch_size=8"), "batch_size=8"),
    ):
        assert named in refused("plan", "--preset", "lean", *wrong)
    sizes = iter((100, 60, 50))  # as it is, with one saver, with two
    monkeypatch.setattr(
        memory, "training", lambda stage: memory.Memory(next(sizes), 0, 0, 0, 0, 1, 1)
    )
    monkeypatch.setattr(memory, "usable", lambda gpu: 50)
    assert "fits with --set frozen_precision=bf16 gradient_checkpointing=true: " in done(*arguments)
    monkeypatch.setattr(memory, "training", lambda stage: memory.Memory(51, 0, 0, 0, 0, 1, 1))
    assert "does not fit even with --set" in done(*arguments)
