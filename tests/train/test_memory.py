"""The memory estimate, compared with what PyTorch's allocator really gives out in a step.

The recipes here train a policy of a tiny preset. "lean" is smaller still: it has one camera and no
MoGe.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType

from models_tiny import TINY, draw_actions, make_spear1
from refusals import Command
from spear.cli import main
from spear.models import presets
from spear.train import memory
from spear.train.memory import MemoryEstimate
from spear.train.optimize import Stepper
from spear.train.options import Optimization, Recipe

LEAN = dataclasses.replace(
    TINY,
    image_sizes={"external": (48, 32)},
    moge=None,
    vision={**TINY.vision, "num_hidden_layers": 1},
)
RECIPE = Recipe(
    name="plan",
    kind="vla",
    preset="lean",
    description="",
    optimization=Optimization(steps=2, lr=1e-3, ema=0.9),
    batch_size=8,
    flow_samples=2,
)
MARKER_BYTES = 12_345  # an allocation of this size marks the beginning of a step


@pytest.fixture(autouse=True, scope="module")
def small_presets() -> Iterator[None]:
    """Make the presets "tiny" and "lean" known to recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        patch.setitem(presets.PRESETS, "lean", LEAN)
        yield


@pytest.fixture(scope="module")
def estimate(small_presets: None) -> MemoryEstimate:
    """The estimate for `RECIPE` without any change that saves memory."""
    return memory.measure_training_memory(RECIPE)


def make_estimate(weights: int) -> MemoryEstimate:
    """An estimate whose bytes are all those of one weight."""
    return MemoryEstimate(
        weights=weights,
        gradients=0,
        moments=0,
        ema=0,
        activations=0,
        num_parameters=1,
        num_trainable=1,
    )


def make_stepper(recipe: Recipe) -> tuple[Stepper, dict[str, Any]]:
    """Return a stepper and a batch of real tensors, with the loss that the estimate also runs."""
    model = make_spear1()
    chunks = draw_actions(recipe.batch_size, TINY.horizon)

    def loss(batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, Mapping]:
        output = model(
            **batch, actions=chunks, flow_samples=recipe.flow_samples, generator=generator
        )
        return output.loss, {}

    batch = memory._make_zero_observations(TINY, recipe.batch_size)
    for view, pixels in batch["pixel_values"].items():
        batch["pixel_values"][view] = torch.randint_like(pixels, 256)
    task = SimpleNamespace(model=model, loss=loss)
    return Stepper(task, recipe.optimization, seed=0), batch


def count_stored_bytes(stepper: Stepper) -> int:
    """Return the bytes of weights, buffers, moments and EMA weights."""
    weights = stepper.model.state_dict().values()
    total = sum(tensor.untyped_storage().nbytes() for tensor in weights)
    for state in stepper.optimizer.state.values():
        total += sum(tensor.nbytes for tensor in state.values())
    return total + sum(tensor.nbytes for tensor in (stepper.ema or {}).values())


def measure_peak_bytes(recipe: Recipe) -> tuple[Stepper, int]:
    """Return a stepper, and the largest number of bytes in use during the stepper's second step.

    The profiler counts the bytes that PyTorch's allocator has given out, beginning from an unknown
    number. So a marker is allocated at the beginning of the step. What is in use at that moment is
    known (`count_stored_bytes`), and the peak is that plus the later increase of the count.
    """
    stepper, batch = make_stepper(recipe)
    stepper(0, [batch])
    stepper.optimizer.zero_grad()
    stored = count_stored_bytes(stepper)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        marker = torch.empty(MARKER_BYTES, dtype=torch.uint8)
        stepper(1, [batch])
    assert marker.nbytes == MARKER_BYTES

    allocations = []  # (bytes of the allocation, bytes in use after it)
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            allocations.append((fields.alloc_size, fields.total_allocated))
    assert len(allocations) > 100  # the profiler saw the whole step
    (total_at_start,) = (total for size, total in allocations if size == MARKER_BYTES)
    peak_total = max(total for _, total in allocations)
    return stepper, stored + peak_total - total_at_start


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        {"frozen": ("vlm",), "frozen_precision": "bf16"},
    ],
)
def test_the_estimate_is_what_the_allocator_gives_out(changes: dict[str, Any]) -> None:
    recipe = RECIPE.with_changes(preset="tiny", **changes)

    planned = memory.measure_training_memory(recipe, with_gpu_layers=False)
    stepper, peak_bytes = measure_peak_bytes(recipe)

    assert planned.total == pytest.approx(peak_bytes, rel=0.05)
    num_trainable = sum(parameter.numel() for parameter in stepper.trainable.values())
    assert planned.num_trainable == num_trainable
    assert planned.num_parameters >= num_trainable
    # Float32 has 4 bytes. The moments are two numbers per parameter; some have no gradient.
    assert planned.ema == 4 * num_trainable
    assert planned.gradients <= 4 * num_trainable
    assert planned.moments == 8 * num_trainable
    weights = [*stepper.model.parameters(), *stepper.model.buffers()]
    assert planned.weights == sum(tensor.nbytes for tensor in weights)


def test_changes_that_save_memory_do(estimate: MemoryEstimate) -> None:
    changes = {"gradient_checkpointing": True, "accumulate": 8, "ema": 0}

    saving = memory.measure_training_memory(RECIPE.with_changes(**changes))

    assert saving.activations < 0.6 * estimate.activations
    assert saving.weights == estimate.weights
    assert saving.moments == estimate.moments
    assert saving.ema == 0
    assert estimate.ema > 0


@pytest.fixture
def instant_estimates(monkeypatch: pytest.MonkeyPatch, estimate: MemoryEstimate) -> None:
    """Replace the measurement, which takes a while, by the estimate of `RECIPE`."""
    monkeypatch.setattr(memory, "measure_training_memory", lambda recipe: estimate)


@pytest.mark.usefixtures("instant_estimates")
def test_savings_are_planned_one_after_the_other() -> None:
    plans = [list(changes) for changes, _ in memory.plan_memory_savings(RECIPE)]

    assert plans == [
        [],
        ["frozen_precision"],
        ["frozen_precision", "gradient_checkpointing"],
        ["frozen_precision", "gradient_checkpointing", "accumulate"],
        ["frozen_precision", "gradient_checkpointing", "accumulate", "ema"],
    ]


@pytest.mark.usefixtures("instant_estimates")
def test_a_batch_is_not_divided_if_its_images_cannot_be_divided_too() -> None:
    # Pieces have eight samples or one, so there would be 6 or 48. The 48 robot steps can be divided
    # into so many pieces, but the 3 images with questions cannot.
    recipe = RECIPE.with_changes(batch_size=48, question_images=3)

    for changes, _ in memory.plan_memory_savings(recipe):
        assert "accumulate" not in changes


@pytest.mark.usefixtures("instant_estimates")
def test_a_small_batch_is_divided_into_its_items() -> None:
    plans = list(memory.plan_memory_savings(RECIPE.with_changes(batch_size=4)))

    last_changes, _ = plans[-1]
    assert last_changes["accumulate"] == 4


def test_lora_adds_weights_of_which_few_learn(estimate: MemoryEstimate) -> None:
    pytest.importorskip("peft")
    frozen = ("vlm.language_model", "vlm.vision_tower")

    lora = memory.measure_training_memory(RECIPE.with_changes(lora_rank=4, frozen=frozen))

    assert lora.num_trainable < estimate.num_trainable
    assert estimate.num_trainable <= estimate.num_parameters
    assert estimate.num_parameters < lora.num_parameters  # LoRA matrices are additional parameters
    assert lora.weights > estimate.weights


def test_questions_add_activations(estimate: MemoryEstimate) -> None:
    with_questions = memory.measure_training_memory(RECIPE.with_changes(question_images=4))

    assert with_questions.weights == estimate.weights
    assert with_questions.activations > estimate.activations


def test_a_vlm_has_fewer_weights_than_a_policy(estimate: MemoryEstimate) -> None:
    vlm = memory.measure_training_memory(RECIPE.with_changes(kind="vlm"))

    assert vlm.weights < estimate.weights


# Words of the command that prints the estimate.
PLAN = ("estimate-memory", "--preset", "lean")
PLAN_LARGE_BATCH = (*PLAN, "--batch-size", "64", "--recipe", "post-train-bridge")


@pytest.mark.usefixtures("instant_estimates")
def test_the_command_shows_what_a_recipe_needs_and_that_it_fits(run_command: Command) -> None:
    output = run_command(PLAN_LARGE_BATCH, "--gpu", "16GB")

    assert "total" in output
    # 4 % may be lost between blocks of memory, and 0.6 GiB are for CUDA itself.
    assert "usable on 16GB: 14.8 GiB" in output  # 16 GiB · (1 - 0.04) - 0.6 GiB
    assert output.endswith("fits\n")


def test_the_command_plans_inference_in_each_precision(
    run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates: list[MemoryEstimate] = []
    measure_inference_memory = memory.measure_inference_memory

    def measure_and_keep(*arguments: Any) -> MemoryEstimate:
        estimates.append(measure_inference_memory(*arguments))
        return estimates[-1]

    monkeypatch.setattr(memory, "measure_inference_memory", measure_and_keep)

    output = run_command(PLAN, "--gpu", "8GB", "--recipe", "inference")

    names = [line.split()[0] for line in output.splitlines()]
    assert names == ["int4", "int8", "bfloat16", "float32"]
    assert output.count("fits on 8GB") == 4
    in_int4, in_int8, in_bfloat16, in_float32 = estimates
    assert in_int4.weights <= in_int8.weights <= in_bfloat16.weights
    assert in_int4.num_parameters == in_bfloat16.num_parameters
    assert in_bfloat16.total == pytest.approx(in_float32.total / 2, rel=0.2)
    assert in_bfloat16.gradients == 0
    assert in_bfloat16.num_trainable == 0


# Options that are refused, and what the error names.
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--recipe nano-depth", "nano-depth"),
        ("--batch-size 3", "batch_size 3"),
        ("--gpu -3GB", "-3GB"),
        ("--recipe inference --batch-size 0", "--batch-size 0"),
        ("--batch-size 64 --set batch_size=8", "batch_size=8"),
    ],
)
def test_the_command_names_what_it_cannot_plan(
    words: str, named: str, run_refused_command: Command
) -> None:
    assert named in run_refused_command(PLAN, words.split())


def test_the_command_names_the_changes_that_make_a_recipe_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU has 50 bytes; the recipe needs 100, 60 with one change, and 50 with two."""
    totals = iter((100, 60, 50))
    monkeypatch.setattr(memory, "estimate_usable_bytes", lambda gpu_memory: 50)
    monkeypatch.setattr(
        memory,
        "measure_training_memory",
        lambda recipe: make_estimate(next(totals)),
    )

    assert main([*PLAN_LARGE_BATCH]) == 1

    message = capsys.readouterr().err
    assert "It fits with --set frozen_precision=bf16 gradient_checkpointing=true (" in message


def test_the_command_says_that_no_change_makes_a_recipe_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "estimate_usable_bytes", lambda gpu_memory: 50)
    monkeypatch.setattr(memory, "measure_training_memory", lambda recipe: make_estimate(51))

    assert main([*PLAN_LARGE_BATCH]) == 1

    assert "does not fit on 24GB, even with --set" in capsys.readouterr().err


def test_the_command_says_that_a_policy_does_not_fit_to_act(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "estimate_usable_bytes", lambda gpu_memory: 50)
    monkeypatch.setattr(memory, "measure_inference_memory", lambda *options: make_estimate(51))

    assert main([*PLAN, "--recipe", "inference"]) == 1

    assert "inference does not fit on 24GB" in capsys.readouterr().err
