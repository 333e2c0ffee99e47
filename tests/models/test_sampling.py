"""Fast sampling gives the actions that the flow around the plain network gives, whatever the inputs."""

import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import Gemma2Config

from models_tiny import TEXT, TINY, actions, pixels, reference, spear1, text
from parity import relative
from refusals import no_warning
from spear import flow
from spear.errors import Notice
from spear.models import sampling
from spear.models.fast.linear import FastLinear, FusedLinear, linear
from spear.models.fast.stack import LayerStack
from spear.models.presets import build_spear1_config, build_vlm_config
from spear.models.sampling import get_sampler
from spear.models.spear1 import Spear1ForActionPrediction
from spear.types import Action

H = TINY.horizon
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "velocity": {},
    "clean": {"flow": {"prediction": "clean"}},
    "two key-value heads": {"text": GROUPED, "expert": {**GROUPED, "hidden_size": 16}},
    "no MoGe, linear": {"moge": None, "stem": "patch", "flow": {"rotation": "linear"}},
}


def observation(batch: int, views: tuple[str, ...], padded: bool, seed: int = 0) -> dict[str, Any]:
    ids, mask = text(batch, 6, seed)
    state = torch.randn(batch, 10, generator=torch.Generator().manual_seed(seed))
    given = {"pixel_values": pixels(batch, seed, views), "input_ids": ids, "state": state}
    given["attention_mask"] = mask if padded else None
    if padded and "wrist" in views:
        given["view_mask"] = {"wrist": torch.arange(batch) != 1}
    return given


def acted(
    model: Any,
    given: dict[str, Any],
    noise: Action,
    steps: int,
    committed: flow.CommittedPrefix | None = None,
) -> torch.Tensor:
    """The actions [B, H, 8], which must be those of the plain network."""
    found = model.sample_actions(**given, steps=steps, noise=noise, committed=committed).to_vector()
    assert relative(found, reference(model, given, noise, steps, committed)) < 1e-5
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("batch", "views"), [(1, ("external",)), (3, ("external", "wrist")), (3, ("wrist",))]
)
def test_actions_of_the_plain_network(
    shape: str, padded: bool, batch: int, views: tuple[str, ...]
) -> None:
    model, given, noise = (
        spear1(**SHAPES[shape]),
        observation(batch, views, padded),
        actions(batch, H),
    )
    for steps, attention in ((1, "spear"), (4, "spear"), (4, "eager"), (1, "sdpa")):
        model.set_attn_implementation(attention)
        found = acted(model, given, noise, steps)
        assert not found.is_inference() and found.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_committed_actions_come_back(shape: str, padded: bool) -> None:
    model, noise = spear1(**SHAPES[shape]), actions(3, H)
    given, decided = observation(3, ("external", "wrist"), padded), actions(3, H, seed=5)
    free = model.sample_actions(**given, steps=4, noise=noise).to_vector()
    held = torch.arange(H) < torch.tensor([[0], [1], [H - 1]])
    found = acted(model, given, noise, 4, flow.CommittedPrefix(decided, held))
    assert torch.equal(found[held], decided.to_vector()[held])
    # Where nothing is committed it is as without, whatever stands there; elsewhere the others notice.
    assert relative(found[0], free[0]) < 1e-5 and relative(found[1, 1:], free[1, 1:]) > 1e-3


@pytest.mark.parametrize("broken", ["raises", "differs", "no number"])
def test_a_fast_way_that_does_not_agree_is_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, noise = spear1(), actions(3, H)
    given = observation(3, ("external", "wrist"), True)
    true = reference(model, given, noise, 4)

    def wrong(*args: Any) -> torch.Tensor:
        if broken == "raises":
            raise RuntimeError("no kernel")
        return true + (0.01 if broken == "differs" else torch.nan)

    monkeypatch.setattr(sampling, "_sample", wrong)
    with pytest.warns(
        Notice, match={"raises": "no kernel", "differs": "0.0", "no number": "nan"}[broken]
    ):
        first = model.sample_actions(**given, steps=4, noise=noise).to_vector()
    with no_warning():  # said once
        again = model.sample_actions(**given, steps=4, noise=noise).to_vector()
    assert relative(first, true) < 1e-6 and torch.equal(first, again)


def test_three_views_of_one_size_and_bfloat16() -> None:
    model = spear1(image_sizes={name: (32, 32) for name in ("a", "b", "c")})
    given, noise = observation(2, (), True), actions(2, H)
    given["pixel_values"] = {
        v: torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for v in "abc"
    }
    calls: list[int] = []
    model.sample_actions(**given, noise=noise)  # the first goes through the plain network too
    model.vlm.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    exact = model.sample_actions(**given, noise=noise).to_vector()
    assert len(calls) == 1 and relative(exact, reference(model, given, noise, 10)) < 1e-5
    model.to(torch.bfloat16)
    rough = model.sample_actions(**given, noise=noise).to_vector()
    # Both round at every layer, in another order: no further from each other than from float32.
    slow = reference(model, given, noise, 10)
    assert (
        rough.dtype == torch.float32
        and relative(rough, slow) < 0.03
        and relative(rough, exact) < 0.03
    )
    model.float().vlm.to(torch.bfloat16)
    with no_warning():  # a notice would say that the fast way does not work
        mixed = model.sample_actions(**given, noise=noise).to_vector()
    assert relative(mixed, reference(model, given, noise, 10)) < 0.03


class Twice(torch.nn.Linear):
    """What a user makes of a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_users_add_to_layers_is_not_left_out() -> None:
    given, noise = observation(2, ("external",), False), actions(2, H)
    for name in ("action_in_proj", "action_time_mlp_in", "expert.layers.0.mlp.down_proj"):
        model = spear1()
        before = acted(model, given, noise, 2)
        layer, found = model.get_submodule(name), [before]
        layer.__class__ = Twice
        found.append(acted(model, given, noise, 2))
        layer.register_forward_hook(lambda layer, given, made: 3 * made)
        found.append(acted(model, given, noise, 2))
        layer.register_forward_pre_hook(lambda layer, given: (given[0] / 5,))
        found.append(acted(model, given, noise, 2))
        assert min(relative(found[i], found[i - 1]) for i in range(4)) > 1e-3


def test_gemma2_layers_too() -> None:
    config = {
        **TEXT,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "sliding_window": 4096,
    }
    torch.manual_seed(0)
    inner = build_vlm_config(TINY)
    inner.text_config = Gemma2Config(
        **config, vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=2
    )
    model = Spear1ForActionPrediction(build_spear1_config(TINY, inner)).eval()
    for padded in (False, True):
        acted(model, observation(2, ("external",), padded), actions(2, H), 3)


def test_changed_weights_are_noticed() -> None:
    model, given, noise = spear1(), observation(1, ("external",), False), actions(1, H)
    acted(model, given, noise, 2)
    kept = get_sampler(model, True)
    assert get_sampler(model, True) is kept
    with torch.no_grad():  # as an optimiser does it
        for parameter in model.expert.parameters():
            parameter.mul_(1.3)
    acted(model, given, noise, 2)
    assert get_sampler(model, True) is not kept
    model.load_state_dict(spear1(seed=3).state_dict())
    acted(model, given, noise, 2)
    model.load_state_dict(spear1(seed=4).state_dict(), assign=True)
    acted(model, given, noise, 2)
    model.action_in_proj.weight.data = torch.randn_like(model.action_in_proj.weight)
    acted(model, given, noise, 2)
    for parameter, other in zip(model.parameters(), spear1(seed=5).parameters(), strict=True):
        parameter.data.copy_(other.data)  # as averages of weights are put in place
    acted(model, given, noise, 2)
    for part in (model.vlm.vision_tower, model.vlm.moge, model.state_proj, model.action_out_proj):
        kept, weight = get_sampler(model, True), next(part.parameters())
        weight.data = weight.clone()  # a graph would go on reading where it was
        assert get_sampler(model, True) is not kept


def test_a_network_that_inference_mode_made_acts_and_its_changes_are_noticed() -> None:
    given, noise = observation(1, ("external",), False), actions(1, H)
    with torch.inference_mode():
        model = spear1()
        for _ in range(2):
            acted(model, given, noise, 2)
            model.action_in_proj.weight.mul_(1.3)


def test_lora_is_part_of_the_fast_path() -> None:
    pytest.importorskip("peft")
    from spear.train.optimize import add_adapters

    model, given, noise = spear1(), observation(1, ("external",), False), actions(1, H)
    before = model.sample_actions(**given, steps=2, noise=noise).to_vector()
    add_adapters(model, rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    assert relative(acted(model, given, noise, 2), before) > 1e-3


def test_sampling_leaves_weights_and_training_alone() -> None:
    model, given, noise = spear1(), observation(2, ("external",), True), actions(2, H)
    before = {
        name: (weight.clone(), weight.data_ptr()) for name, weight in model.state_dict().items()
    }
    model.sample_actions(**given, noise=noise)
    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == before[name][1] and torch.equal(weight, before[name][0])
    model.train()
    model(**given, actions=actions(2, H)).loss.backward()
    assert model.expert.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("packed", [False, True])
def test_fused_layers_say_what_each_says(dtype: torch.dtype, far: float, packed: bool) -> None:
    torch.manual_seed(0)
    layers = [FastLinear(24, rows).to(dtype) for rows in (8, 3, 40)]
    x = torch.randn(2, 5, 24).to(dtype)
    with torch.no_grad():
        for one, layer in zip(FusedLinear(*layers, packed=packed)(x), layers, strict=True):
            exact = torch.nn.functional.linear(
                x.double(), layer.weight.double(), layer.bias.double()
            )
            torch.testing.assert_close(one.double(), exact, rtol=far, atol=far)
            alone = linear(x, layer.weight, layer.bias).double()
            torch.testing.assert_close(alone, exact, rtol=far, atol=far)
    assert linear(x, layers[0].weight).requires_grad  # with gradients PyTorch's own, which has them


def test_what_is_compiled_for_one_layer_serves_all() -> None:
    model = spear1(text={**TEXT, "num_hidden_layers": 3}, expert={**TEXT, "num_hidden_layers": 3})
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    plain, compiled = LayerStack(model.vlm.language_model), LayerStack(model.vlm.language_model)
    for name, place in (("_project", "_before"), ("_finish", "_after")):
        setattr(
            compiled,
            place,
            torch.compile(getattr(LayerStack, name), backend=backend, fullgraph=True),
        )
    with torch.inference_mode():
        x, places = torch.randn(2, 7, TEXT["hidden_size"]), torch.arange(7).expand(2, 7)
        results = []
        for layers in (plain, compiled):
            cache = layers.cache(2, 7, x.dtype, x.device)
            results.append(
                layers(x, layers.rotations(places, x.dtype), cache.window(0, [(3, 3), (4, 7)]))
            )
            results.append(torch.stack(cache.layers))
    torch.testing.assert_close(results[:2], results[2:])
    assert len(graphs) == 2
    gone = weakref.ref(compiled)
    del compiled, layers
    assert gone() is None  # at once: its weights and graphs fill a GPU
