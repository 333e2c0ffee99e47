"""What the networks share: norms and attention as Transformers computes them; gradient checkpointing."""

from collections.abc import Callable

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from models_tiny import actions, pixels, spear1, text, vlm
from spear.models.layers import FastRMSNorm, grouped_attention, set_gradient_checkpointing


def act(model: torch.nn.Module) -> torch.Tensor:
    ids, mask = text(2, 6)
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, 10, generator=generator)
    return model(
        pixels(2), ids, mask, state, actions(2, 5), flow_samples=2, generator=generator
    ).loss


def answer(model: torch.nn.Module) -> torch.Tensor:
    ids, mask = text(2, 6)
    return model(pixels(2), ids, mask, token_type_ids=mask, labels=ids).loss


def step(
    model: torch.nn.Module, task: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, dict, int]:
    """Loss, gradients, and the bytes (without weights) kept for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task(model)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(("make", "task"), [(spear1, act), (vlm, answer)])
def test_loss_and_gradients_are_the_same(
    make: Callable[[], torch.nn.Module], task: Callable
) -> None:
    model = make().train()
    loss, gradients, kept = step(model, task)
    set_gradient_checkpointing(model)
    again, recomputed, less = step(model, task)
    assert (
        torch.equal(loss, again) and gradients.keys() == recomputed.keys() and len(gradients) > 50
    )
    assert all(torch.equal(gradients[n], recomputed[n]) for n in gradients)
    assert (
        any(n.endswith("k_proj.weight") and "language_model" in n for n in gradients)
        and less < 0.7 * kept
    )
    set_gradient_checkpointing(model, enabled=False)
    assert step(model, task)[2] == kept


def test_fast_norm_is_gemmas_gradients_included() -> None:
    torch.manual_seed(0)
    theirs, ours = GemmaRMSNorm(24), FastRMSNorm(24)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(3, 5, 24) + 0.5, torch.randn(3, 5, 24)
    results = []
    for norm in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_is_attention(groups: int) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 5, 8),
        torch.randn(2, groups, 7, 8),
        torch.randn(2, groups, 7, 8),
    )
    mask = (torch.rand(2, 1, 5, 7) < 0.6) | (torch.arange(7) == 0)
    full = [x.repeat_interleave(4 // groups, dim=1) for x in (key, value)]
    for allowed in (mask, None):
        expected = torch.nn.functional.scaled_dot_product_attention(query, *full, attn_mask=allowed)
        out, _ = grouped_attention(torch.nn.Identity(), query, key, value, allowed)
        torch.testing.assert_close(out.transpose(1, 2), expected)
