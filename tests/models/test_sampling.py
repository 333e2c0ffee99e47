"""Fast sampling gives the same actions as the plain network, for all kinds of inputs and weights.

The plain network is the network as it is trained: `sample_by_reference` runs it step by step, with
nothing precomputed.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from models_tiny import (
    TEXT_SIZES,
    TINY,
    draw_actions,
    draw_pixels,
    draw_text,
    make_spear1,
    sample_by_reference,
)
from parity import relative_error
from refusals import no_warning
from spear import flow
from spear.errors import Notice
from spear.models import sampling
from spear.models.fast.kv_cache import TokenBlock
from spear.models.fast.linear import FastLinear, FusedLinear, linear
from spear.models.fast.stack import LayerStack
from spear.models.presets import build_spear1_config, build_vlm_config
from spear.models.sampling import get_sampler
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import Action

H = TINY.horizon
DEFAULT_NUM_STEPS = 10  # flow steps of `sample_actions`, if it gets no other number
GROUPED = {**TEXT_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
# Changes of the tiny preset.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "velocity": {},
    "clean": {"flow": {"prediction": "clean"}},
    "two key-value heads": {"text": GROUPED, "expert": {**GROUPED, "hidden_size": 16}},
    "no MoGe, linear": {"moge": None, "stem": "patch", "flow": {"rotation": "linear"}},
}


def observation(batch: int, views: tuple[str, ...], padded: bool, seed: int = 0) -> dict[str, Any]:
    """Random inputs of `sample_actions`, except noise.

    With `padded`, instructions have padding, and row 1 has no wrist image.
    """
    ids, mask = draw_text(rows=batch, length=6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(batch, NUM_STATE_FEATURES, generator=generator)
    inputs = {"pixel_values": draw_pixels(batch, seed, views), "input_ids": ids, "state": state}
    inputs["attention_mask"] = mask if padded else None
    if padded and "wrist" in views:
        inputs["view_mask"] = {"wrist": torch.arange(batch) != 1}
    return inputs


def sample_and_check(
    model: Any,
    inputs: dict[str, Any],
    noise: Action,
    steps: int,
    committed: flow.CommittedPrefix | None = None,
) -> torch.Tensor:
    """Sample actions [B, H, 8], and assert that they are those of the plain network."""
    sampled = model.sample_actions(**inputs, steps=steps, noise=noise, committed=committed)
    vector = sampled.to_vector()
    expected = sample_by_reference(model, inputs, noise, steps, committed)
    assert relative_error(vector, expected) < 1e-5
    return vector


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("batch", "views", "padded"),
    [(1, ("external",), False), (3, ("external", "wrist"), True), (3, ("wrist",), True)],
)
def test_actions_are_those_of_the_plain_network(
    architecture: str, batch: int, views: tuple[str, ...], padded: bool
) -> None:
    model = make_spear1(**ARCHITECTURES[architecture])
    inputs = observation(batch, views, padded)
    noise = draw_actions(batch, H)

    # Numbers of flow steps, and implementations of attention.
    for steps, attention in ((1, "spear"), (4, "spear"), (4, "eager"), (1, "sdpa")):
        model.set_attn_implementation(attention)
        sampled = sample_and_check(model, inputs, noise, steps)
        assert not sampled.is_inference()
        assert sampled.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padded", [False, True])
def test_committed_actions_come_back_and_change_the_others(architecture: str, padded: bool) -> None:
    model = make_spear1(**ARCHITECTURES[architecture])
    inputs = observation(batch=3, views=("external", "wrist"), padded=padded)
    noise = draw_actions(3, H)
    committed = draw_actions(3, H, seed=5)
    num_committed = torch.tensor([[0], [1], [H - 1]])  # of the three rows
    is_committed = torch.arange(H) < num_committed

    free = model.sample_actions(**inputs, steps=4, noise=noise).to_vector()
    prefix = flow.CommittedPrefix(committed, is_committed)
    sampled = sample_and_check(model, inputs, noise, steps=4, committed=prefix)

    assert torch.equal(sampled[is_committed], committed.to_vector()[is_committed])
    # Row 0 commits nothing, so `committed` does not change its actions. In row 1, the committed
    # first action changes the actions after it.
    assert relative_error(sampled[0], free[0]) < 1e-5
    assert relative_error(sampled[1, 1:], free[1, 1:]) > 1e-3


@pytest.mark.parametrize(
    ("failure", "message"), [("raises", "no kernel"), ("differs", "0.0"), ("no number", "nan")]
)
def test_a_fast_path_that_fails_is_not_used(
    failure: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notice has the text of the exception, or the relative error of the result.

    If every number of the result is wrong by 0.01, the relative error begins with "0.0".
    """
    model = make_spear1()
    inputs = observation(batch=3, views=("external", "wrist"), padded=True)
    noise = draw_actions(3, H)
    expected = sample_by_reference(model, inputs, noise, steps=4)

    def broken_sample(*args: Any) -> torch.Tensor:
        if failure == "raises":
            raise RuntimeError("no kernel")
        error = 0.01 if failure == "differs" else torch.nan
        return expected + error

    monkeypatch.setattr(sampling, "_sample", broken_sample)
    with pytest.warns(Notice, match=message):
        first = model.sample_actions(**inputs, steps=4, noise=noise).to_vector()
    with no_warning():  # the notice comes once
        second = model.sample_actions(**inputs, steps=4, noise=noise).to_vector()

    assert relative_error(first, expected) < 1e-6
    assert torch.equal(first, second)


class TestThreeViewsOfOneSize:
    @pytest.fixture
    def model(self) -> Spear1ForActionPrediction:
        return make_spear1(image_sizes={name: (32, 32) for name in ("a", "b", "c")})

    @pytest.fixture
    def inputs(self) -> dict[str, Any]:
        inputs = observation(batch=2, views=(), padded=True)
        generator = torch.Generator().manual_seed(0)
        inputs["pixel_values"] = {
            view: torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
            for view in ("a", "b", "c")
        }
        return inputs

    def test_run_through_the_encoder_as_one_batch(
        self, model: Spear1ForActionPrediction, inputs: dict[str, Any]
    ) -> None:
        noise = draw_actions(2, H)
        # The first sample also runs through the plain network, so the second is counted.
        model.sample_actions(**inputs, noise=noise)
        calls: list[int] = []
        layer = model.vlm.vision_tower.encoder.layers[0]
        layer.register_forward_hook(lambda *_: calls.append(1))

        sampled = model.sample_actions(**inputs, noise=noise).to_vector()

        assert len(calls) == 1
        expected = sample_by_reference(model, inputs, noise, DEFAULT_NUM_STEPS)
        assert relative_error(sampled, expected) < 1e-5

    def test_bfloat16_is_no_further_from_the_plain_network_than_from_float32(
        self, model: Spear1ForActionPrediction, inputs: dict[str, Any]
    ) -> None:
        noise = draw_actions(2, H)
        exact = model.sample_actions(**inputs, noise=noise).to_vector()

        model.to(torch.bfloat16)
        rounded = model.sample_actions(**inputs, noise=noise).to_vector()
        # The plain network rounds at every layer, in another order.
        plain = sample_by_reference(model, inputs, noise, DEFAULT_NUM_STEPS)

        assert rounded.dtype == torch.float32
        assert relative_error(rounded, plain) < 0.03
        assert relative_error(rounded, exact) < 0.03

    def test_a_bfloat16_vlm_and_a_float32_expert_agree_with_the_plain_network(
        self, model: Spear1ForActionPrediction, inputs: dict[str, Any]
    ) -> None:
        noise = draw_actions(2, H)
        model.to(torch.bfloat16)
        model.float()
        model.vlm.to(torch.bfloat16)

        with no_warning():  # a notice would mean that fast sampling does not work
            mixed = model.sample_actions(**inputs, noise=noise).to_vector()

        expected = sample_by_reference(model, inputs, noise, DEFAULT_NUM_STEPS)
        assert relative_error(mixed, expected) < 0.03


class DoubledLinear(torch.nn.Linear):
    """A user's class of a layer, whose output is doubled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def use_another_class(layer: Any) -> None:
    layer.__class__ = DoubledLinear


def add_forward_hook(layer: Any) -> None:
    layer.register_forward_hook(lambda layer, args, output: 3 * output)


def add_forward_pre_hook(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda layer, args: (args[0] / 5,))


@pytest.mark.parametrize("change", [use_another_class, add_forward_hook, add_forward_pre_hook])
@pytest.mark.parametrize(
    "name", ["action_in_proj", "action_time_mlp_in", "expert.layers.0.mlp.down_proj"]
)
def test_changes_of_a_layer_by_a_user_take_effect(name: str, change: Callable[[Any], None]) -> None:
    model = make_spear1()
    inputs = observation(batch=2, views=("external",), padded=False)
    noise = draw_actions(2, H)
    sampled_before = sample_and_check(model, inputs, noise, steps=2)

    change(model.get_submodule(name))
    sampled_after = sample_and_check(model, inputs, noise, steps=2)

    assert relative_error(sampled_after, sampled_before) > 1e-3


def test_all_changes_of_a_layer_take_effect_together() -> None:
    model = make_spear1()
    inputs = observation(batch=2, views=("external",), padded=False)
    noise = draw_actions(2, H)
    layer = model.get_submodule("expert.layers.0.mlp.down_proj")
    sampled_before = sample_and_check(model, inputs, noise, steps=2)

    for change in (use_another_class, add_forward_hook, add_forward_pre_hook):
        change(layer)
        sampled_after = sample_and_check(model, inputs, noise, steps=2)
        assert relative_error(sampled_after, sampled_before) > 1e-3
        sampled_before = sampled_after


@pytest.mark.parametrize("padded", [False, True])
def test_actions_of_a_model_with_gemma2_are_those_of_the_plain_network(padded: bool) -> None:
    torch.manual_seed(0)
    vlm_config = build_vlm_config(TINY)
    vlm_config.text_config = Gemma2Config(
        **TEXT_SIZES,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=3.0,
        sliding_window=4096,
        vocab_size=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Spear1ForActionPrediction(build_spear1_config(TINY, vlm_config)).eval()

    inputs = observation(batch=2, views=("external",), padded=padded)

    sample_and_check(model, inputs, draw_actions(2, H), steps=3)


class TestChangedWeights:
    """The `Sampler` precomputes products of weights. When weights change, a new sampler is made.

    The methods before the tests change a model's weights in one way each.
    """

    def scale_in_place(self, model: Any) -> None:
        """Change weights as an optimizer does."""
        with torch.no_grad():
            for parameter in model.expert.parameters():
                parameter.mul_(1.3)

    def load_state(self, model: Any) -> None:
        model.load_state_dict(make_spear1(seed=3).state_dict())

    def assign_state(self, model: Any) -> None:
        model.load_state_dict(make_spear1(seed=4).state_dict(), assign=True)

    def replace_data(self, model: Any) -> None:
        model.action_in_proj.weight.data = torch.randn_like(model.action_in_proj.weight)

    def copy_into_data(self, model: Any) -> None:
        """Change weights as training does to put EMA weights in place."""
        other_model = make_spear1(seed=5)
        for parameter, other in zip(model.parameters(), other_model.parameters(), strict=True):
            parameter.data.copy_(other.data)

    @pytest.mark.parametrize(
        "change",
        ["scale_in_place", "load_state", "assign_state", "replace_data", "copy_into_data"],
    )
    def test_are_noticed(self, change: str) -> None:
        packed = True  # the argument with which `sample_actions` gets its sampler
        model = make_spear1()
        inputs = observation(batch=1, views=("external",), padded=False)
        noise = draw_actions(1, H)
        sampled_before = sample_and_check(model, inputs, noise, steps=2)
        sampler = get_sampler(model, packed)
        assert get_sampler(model, packed) is sampler

        change_weights = getattr(self, change)
        change_weights(model)

        assert get_sampler(model, packed) is not sampler
        sampled_after = sample_and_check(model, inputs, noise, steps=2)
        assert relative_error(sampled_after, sampled_before) > 1e-4

    @pytest.mark.parametrize(
        "part", ["vlm.vision_tower", "vlm.moge", "state_proj", "action_out_proj"]
    )
    def test_moved_weights_are_noticed(self, part: str) -> None:
        """A CUDA graph would still read the weights' old addresses."""
        packed = True
        model = make_spear1()
        sampler = get_sampler(model, packed)

        weight = next(model.get_submodule(part).parameters())
        weight.data = weight.clone()

        assert get_sampler(model, packed) is not sampler

    def test_of_a_network_made_in_inference_mode_are_noticed(self) -> None:
        """Weights made in inference mode have no version that counts writes."""
        inputs = observation(batch=1, views=("external",), padded=False)
        noise = draw_actions(1, H)
        with torch.inference_mode():
            model = make_spear1()
            sample_and_check(model, inputs, noise, steps=2)

            model.action_in_proj.weight.mul_(1.3)

            sample_and_check(model, inputs, noise, steps=2)


def test_lora_takes_effect() -> None:
    """The adapters begin with zeros in `lora_B`, and have an effect once these are set."""
    pytest.importorskip("peft")
    from spear.train.optimize import add_adapters

    model = make_spear1()
    inputs = observation(batch=1, views=("external",), padded=False)
    noise = draw_actions(1, H)
    sampled_before = model.sample_actions(**inputs, steps=2, noise=noise).to_vector()

    add_adapters(model, rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    sampled_after = sample_and_check(model, inputs, noise, steps=2)

    assert relative_error(sampled_after, sampled_before) > 1e-3


def test_sampling_neither_moves_nor_changes_weights() -> None:
    model = make_spear1()
    weights_before = {name: weight.clone() for name, weight in model.state_dict().items()}
    addresses = {name: weight.data_ptr() for name, weight in model.state_dict().items()}

    inputs = observation(batch=2, views=("external",), padded=True)
    model.sample_actions(**inputs, noise=draw_actions(2, H))

    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == addresses[name]
        assert torch.equal(weight, weights_before[name])


def test_a_model_learns_after_sampling() -> None:
    model = make_spear1()
    inputs = observation(batch=2, views=("external",), padded=True)
    model.sample_actions(**inputs, noise=draw_actions(2, H))

    model.train()
    model(**inputs, actions=draw_actions(2, H)).loss.backward()

    assert model.expert.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
class TestLinearLayers:
    def layers_and_input(self, dtype: torch.dtype) -> tuple[list[FastLinear], torch.Tensor]:
        """Three layers of different widths, and an input [2, 5, 24] for all of them."""
        torch.manual_seed(0)
        layers = [FastLinear(24, out_width).to(dtype) for out_width in (8, 3, 40)]
        return layers, torch.randn(2, 5, 24).to(dtype)

    def exact(self, layer: FastLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, computed in double precision."""
        return torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())

    @pytest.mark.parametrize("packed", [False, True])
    def test_fused_layers_compute_what_each_computes(
        self, dtype: torch.dtype, tolerance: float, packed: bool
    ) -> None:
        layers, x = self.layers_and_input(dtype)
        with torch.no_grad():
            outputs = FusedLinear(*layers, packed=packed)(x)
            for output, layer in zip(outputs, layers, strict=True):
                expected = self.exact(layer, x)
                torch.testing.assert_close(
                    output.double(), expected, rtol=tolerance, atol=tolerance
                )

    def test_linear_is_exact(self, dtype: torch.dtype, tolerance: float) -> None:
        layers, x = self.layers_and_input(dtype)
        with torch.no_grad():
            for layer in layers:
                output = linear(x, layer.weight, layer.bias).double()
                expected = self.exact(layer, x)
                torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)

    def test_linear_has_gradients(self, dtype: torch.dtype, tolerance: float) -> None:
        layers, x = self.layers_and_input(dtype)
        assert linear(x, layers[0].weight).requires_grad


def run_aot_eager(graph: Any, inputs: Any) -> Any:
    """Compile with PyTorch's backend "aot_eager".

    It is imported here, because importing it takes seconds in which other tests could run.
    """
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(graph, inputs)


class TestCompiledStack:
    """A `LayerStack` whose parts before and after attention are compiled, as they are on a GPU."""

    num_layers = 3

    @pytest.fixture
    def language_model(self) -> Any:
        fields = {**TEXT_SIZES, "num_hidden_layers": self.num_layers}
        return make_spear1(text=fields, expert=fields).vlm.language_model

    @staticmethod
    def compile_stack(stack: LayerStack, backend: Callable[..., Any]) -> None:
        """Compile a stack by a backend that runs on a CPU."""
        torch._dynamo.reset()
        for function, attribute in (
            ("_norm_and_project_qkv", "_run_before_attention"),
            ("_finish_layer", "_run_after_attention"),
        ):
            compiled = torch.compile(getattr(LayerStack, function), backend=backend, fullgraph=True)
            setattr(stack, attribute, compiled)

    @staticmethod
    def run(stack: LayerStack) -> list[torch.Tensor]:
        """Run 7 tokens, and return the output of the last layer, and all keys and values.

        The tokens are in two blocks: the first 3 see themselves, the other 4 see all.
        """
        torch.manual_seed(0)
        with torch.inference_mode():
            x = torch.randn(2, 7, TEXT_SIZES["hidden_size"])
            positions = torch.arange(7).expand(2, 7)
            cache = stack.allocate_cache(2, 7, x.dtype, x.device)
            rotations = stack.compute_rotary_factors(positions, x.dtype)
            blocks = [
                TokenBlock(num_tokens=3, visible_end=3),
                TokenBlock(num_tokens=4, visible_end=7),
            ]
            window = cache.make_window(0, blocks)
            output = stack(x, rotations, window)
            return [output, torch.stack(cache.layers)]

    def test_what_is_compiled_for_one_layer_serves_all(self, language_model: Any) -> None:
        graphs: list[int] = []

        def count_graphs(graph: Any, inputs: Any) -> Any:
            graphs.append(1)
            return run_aot_eager(graph, inputs)

        compiled = LayerStack(language_model)
        self.compile_stack(compiled, count_graphs)

        torch.testing.assert_close(self.run(compiled), self.run(LayerStack(language_model)))
        assert len(graphs) == 2  # what runs before attention, and what runs after it

    def test_a_stack_is_freed_at_once(self, language_model: Any) -> None:
        """It does not wait for the garbage collector, because weights and graphs fill a GPU."""
        compiled = LayerStack(language_model)
        self.compile_stack(compiled, run_aot_eager)
        self.run(compiled)
        reference_to_stack = weakref.ref(compiled)

        del compiled

        assert reference_to_stack() is None
