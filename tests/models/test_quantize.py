"""Quantized weights are near the weights, take less memory, and act almost alike."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, linear

from refusals import refuses
from spear.embodiments import load as load_embodiment
from spear.evaluate.agents import load_agent
from spear.models.presets import build_spear1_config, get_preset
from spear.models.quantize import (
    GROUP_SIZE,
    MAX_FEW_ROWS,
    QUANTIZATIONS,
    Quantization,
    QuantizedLinear,
    can_multiply_int8_exactly,
    check_quantization,
    quantize_model,
)
from spear.models.spear1 import Spear1ForActionPrediction
from spear.policy import Spear1Policy

# Largest error of a weight, as a fraction of the largest weight with the same scale: half a step.
MAX_ERRORS: dict[Quantization, float] = {"int8": 0.5 / 127, "int4": 0.5 / 7}


def make_layer(inputs: int = 64, outputs: int = 48, dtype: torch.dtype = torch.float32) -> Any:
    """Make a linear layer with random weights and bias."""
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype)


@torch.no_grad()
def read_weight(layer: QuantizedLinear) -> torch.Tensor:
    """Return the weight [out, in] that a layer computes with."""
    unit_inputs = torch.eye(layer.in_features)
    output = layer(unit_inputs)
    if layer.bias is not None:
        output = output - layer.bias
    return output.T


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_are_off_by_half_a_step_at_most(quantization: Quantization) -> None:
    layer = make_layer()

    weight = read_weight(QuantizedLinear(layer, quantization))

    group_size = GROUP_SIZE if quantization == "int4" else layer.in_features
    groups = layer.weight.unflatten(1, (-1, group_size))
    errors = (weight.unflatten(1, (-1, group_size)) - groups).abs().amax(-1)
    bounds = MAX_ERRORS[quantization] * groups.abs().amax(-1)
    assert (errors <= bounds * 1.01).all()  # 1 % for rounding in float32


def test_weights_that_are_multiples_of_the_scale_are_exact_in_4_bits() -> None:
    """So the two halves of a row come back in their places."""
    layer = make_layer()
    integers = torch.randint(-7, 8, layer.weight.shape, generator=torch.Generator().manual_seed(0))
    integers[:, ::GROUP_SIZE] = 7  # the largest number of each group
    layer.weight.data = integers.float() / 7

    weight = read_weight(QuantizedLinear(layer, "int4"))

    torch.testing.assert_close(weight, layer.weight.detach(), rtol=0, atol=1e-6)


needs_exact_integers = pytest.mark.skipif(
    not can_multiply_int8_exactly(), reason="this processor's 8-bit products overflow"
)


@needs_exact_integers
def test_integers_are_multiplied_exactly() -> None:
    """Inputs that are integers up to 127 lose nothing when they are rounded to 8 bits."""
    layer = QuantizedLinear(make_layer(), "int8-dynamic")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-126, 127, (3, layer.in_features), generator=generator).float()
    x[:, 0] = 127  # the largest input of each row, so that the row's scale is 1

    output = layer(x)

    weight = layer.quantized.float() * layer.scales[:, None]
    torch.testing.assert_close(output, linear(x, weight, layer.bias), rtol=1e-5, atol=1e-3)


def test_few_and_many_rows_have_the_same_result() -> None:
    layer = QuantizedLinear(make_layer(dtype=torch.bfloat16), "int8")
    x = torch.randn(MAX_FEW_ROWS + 1, layer.in_features).bfloat16()

    many = layer(x)
    few = layer(x[:MAX_FEW_ROWS])

    torch.testing.assert_close(few, many[:MAX_FEW_ROWS], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_rows_of_zeros_stay_zero(quantization: Quantization) -> None:
    layer = nn.Linear(64, 8, bias=False)
    nn.init.zeros_(layer.weight)

    output = QuantizedLinear(layer, quantization)(torch.zeros(2, 64))

    assert output.tolist() == torch.zeros(2, 8).tolist()


def test_inputs_that_do_not_divide_into_groups_get_8_bits() -> None:
    """SigLIP's last layers have 4304 inputs, which are no multiple of 32."""
    layer = QuantizedLinear(make_layer(inputs=GROUP_SIZE + 16), "int4")

    assert layer.quantized.dtype == torch.int8


@pytest.mark.parametrize(("quantization", "max_gb"), [("int8", 4.5), ("int4", 3.0)])
def test_the_weights_of_full_size_fit(quantization: Quantization, max_gb: float) -> None:
    """In bfloat16 they take 7.1 GB."""
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(get_preset("spear1")))
    model = model.to(torch.bfloat16)

    quantize_model(model, quantization)

    assert sum(parameter.nbytes for parameter in model.parameters()) <= max_gb * 1e9


@pytest.mark.parametrize(
    ("quantization", "min_cosine"),
    [
        ("int8", 0.999),
        pytest.param("int8-dynamic", 0.999, marks=needs_exact_integers),
        ("int4", 0.95),
    ],
)
def test_nano_acts_almost_alike(quantization: Quantization, min_cosine: float) -> None:
    """The actions are compared in the model's units, those of all axes together."""
    observations = [{**load_embodiment("generic").example(), "seed": seed} for seed in range(4)]
    vectors = []
    for options in ({}, {"quantize": quantization}):
        policy = Spear1Policy.load("nano", **options)
        actions = policy.predict(policy.prepare_inputs(observations))
        vectors.append(actions.to_vector().flatten())

    assert cosine_similarity(vectors[0], vectors[1], dim=0) >= min_cosine


def test_a_processor_whose_products_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the products are wrong because all of them are 0."""
    monkeypatch.setattr(
        "spear.models.quantize.torch._int_mm", lambda first, second: torch.zeros(32, 32)
    )

    refuses("VNNI", check_quantization, "int8-dynamic", torch.device("cpu"))


@needs_exact_integers
def test_results_of_quantized_policies_do_not_mix_with_others() -> None:
    identities = {load_agent("nano", quantize=name).weights for name in (None, *QUANTIZATIONS)}

    assert len(identities) == 1 + len(QUANTIZATIONS)  # no two are equal


def test_an_unknown_quantization_and_a_device_without_it_are_refused() -> None:
    unknown: Any = "int2"
    refuses("int2", check_quantization, unknown, torch.device("cpu"))
    refuses("--quantize int8", check_quantization, "int8-dynamic", torch.device("cuda"))
