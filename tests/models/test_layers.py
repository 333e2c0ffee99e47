"""Shared layers: norms and attention as Transformers computes them; gradient checkpointing."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from models_tiny import TINY, draw_actions, draw_pixels, draw_text, make_spear1, make_vlm
from spear.models.layers import FastRMSNorm, grouped_attention, set_gradient_checkpointing
from spear.models.spear1 import NUM_STATE_FEATURES


def flow_loss(model: torch.nn.Module) -> torch.Tensor:
    """The loss of a SPEAR-1 for random demonstrations."""
    ids, mask = draw_text(rows=2, length=6)
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, NUM_STATE_FEATURES, generator=generator)
    actions = draw_actions(2, TINY.horizon)
    output = model(draw_pixels(2), ids, mask, state, actions, flow_samples=2, generator=generator)
    return output.loss


def answer_loss(model: torch.nn.Module) -> torch.Tensor:
    """The loss of a SPEAR-VLM for random answers without prompts."""
    ids, mask = draw_text(rows=2, length=6)
    return model(draw_pixels(2), ids, mask, token_type_ids=mask, labels=ids).loss


class Step(NamedTuple):
    """The results of one forward and backward pass.

    saved_bytes  The memory of tensors that autograd saves for the backward pass, without weights.
    """

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    saved_bytes: int


def run_step(
    model: torch.nn.Module, compute_loss: Callable[[torch.nn.Module], torch.Tensor]
) -> Step:
    """Run one forward and backward pass."""
    weight_addresses = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    bytes_by_address: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weight_addresses:
            bytes_by_address[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = compute_loss(model)
    loss.backward()

    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    model.zero_grad()
    return Step(loss.detach(), gradients, sum(bytes_by_address.values()))


@pytest.mark.parametrize(
    ("build", "compute_loss"), [(make_spear1, flow_loss), (make_vlm, answer_loss)]
)
class TestGradientCheckpointing:
    def test_changes_neither_loss_nor_gradients(
        self, build: Callable[[], torch.nn.Module], compute_loss: Callable
    ) -> None:
        model = build().train()
        expected = run_step(model, compute_loss)

        set_gradient_checkpointing(model)
        step = run_step(model, compute_loss)

        assert torch.equal(step.loss, expected.loss)
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert torch.equal(step.gradients[name], gradient), name

    def test_reaches_the_keys_of_the_language_model(
        self, build: Callable[[], torch.nn.Module], compute_loss: Callable
    ) -> None:
        """Keys leave a layer through the KV cache, where they could lose their gradient."""
        model = build().train()
        set_gradient_checkpointing(model)

        gradients = run_step(model, compute_loss).gradients

        assert len(gradients) > 50  # weights that learn, of all parts of the model
        assert any("language_model" in n and n.endswith("k_proj.weight") for n in gradients)

    def test_saves_memory_until_it_is_turned_off(
        self, build: Callable[[], torch.nn.Module], compute_loss: Callable
    ) -> None:
        model = build().train()
        bytes_without = run_step(model, compute_loss).saved_bytes

        set_gradient_checkpointing(model)
        # A checkpointed layer saves its input alone. What is outside of the layers stays.
        assert run_step(model, compute_loss).saved_bytes < 0.7 * bytes_without

        set_gradient_checkpointing(model, enabled=False)
        assert run_step(model, compute_loss).saved_bytes == bytes_without


class TestFastRMSNorm:
    @pytest.fixture
    def norms(self) -> tuple[GemmaRMSNorm, FastRMSNorm]:
        """Gemma's norm and ours, with the same random weight."""
        torch.manual_seed(0)
        reference = GemmaRMSNorm(24)
        torch.nn.init.normal_(reference.weight)
        fast = FastRMSNorm(24)
        fast.load_state_dict(reference.state_dict())
        return reference, fast

    def test_is_gemmas_gradients_included(self, norms: tuple[GemmaRMSNorm, FastRMSNorm]) -> None:
        x = torch.randn(3, 5, 24) + 0.5
        output_gradient = torch.randn(3, 5, 24)

        results = []
        for norm in norms:
            leaf = x.clone().requires_grad_()
            output = norm(leaf)
            output.backward(output_gradient)
            results.append((output, leaf.grad, norm.weight.grad))

        expected, actual = results
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_returns_the_lower_precision_under_autocast(
        self, norms: tuple[GemmaRMSNorm, FastRMSNorm]
    ) -> None:
        _, fast = norms
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(torch.randn(3, 5, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_attention_is_attention(num_kv_heads: int, has_mask: bool) -> None:
    """It agrees with PyTorch's attention, for which keys and values are copied for each of the 4
    query heads."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8)  # [B, heads, queries, head_dim]
    key = torch.randn(2, num_kv_heads, 7, 8)  # [B, key-value heads, keys, head_dim]
    value = torch.randn(2, num_kv_heads, 7, 8)
    mask = None
    if has_mask:
        is_first_key = torch.arange(7) == 0  # all queries see it, so that no row is empty
        mask = (torch.rand(2, 1, 5, 7) < 0.6) | is_first_key

    output, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask)

    heads_per_kv_head = 4 // num_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(heads_per_kv_head, dim=1),
        value.repeat_interleave(heads_per_kv_head, dim=1),
        attn_mask=mask,
    )
    torch.testing.assert_close(output.transpose(1, 2), expected)
