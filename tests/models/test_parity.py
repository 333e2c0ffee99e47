"""The same numbers as Transformers' PaliGemma and π0, with the same random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PI0Config
from transformers import PI0ForConditionalGeneration as Pi0
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from models_tiny import TEXT, TINY
from parity import logits, relative
from spear.models.gemma import FastRMSNorm
from spear.models.layers import grouped_attention
from spear.models.presets import spear1_config, vlm_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.types import Action

IMAGE_TOKEN = 41
PLAIN = dataclasses.replace(TINY, stem="patch", moge=None, flow={"rotation": "linear"})
B, H = 2, PLAIN.horizon


def paligemma_config() -> PaliGemmaConfig:
    ours = vlm_config(PLAIN)
    vision = {**PLAIN.vision, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {k: v for k, v in ours.text_config.to_dict().items() if k in {**TEXT, "vocab_size": 0}}
    return PaliGemmaConfig(
        vision_config=vision,
        text_config={**text, "model_type": "gemma", "pad_token_id": 0},
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_id=IMAGE_TOKEN,
        vocab_size=text["vocab_size"],
    )


def copy_vlm(ours: SpearVLMForConditionalGeneration, reference: Any) -> None:
    missing, surplus = ours.load_state_dict(reference.state_dict(), strict=False)
    assert missing == [] and set(surplus) <= {"lm_head.weight"}


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (280 // 14 * 16, 210 // 14 * 16)])
def test_without_moge_the_logits_are_paligemmas(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = PaliGemmaForConditionalGeneration(paligemma_config()).eval()
    ours = SpearVLMForConditionalGeneration(vlm_config(PLAIN)).eval()
    copy_vlm(ours, theirs.model)
    mine, expected = logits(ours, theirs, *size)
    assert relative(mine, expected) < 1e-5


def pi0_pair() -> tuple[Spear1ForActionPrediction, Pi0]:
    """SPEAR-1 and π0 with the same weights. π0 flows from data (0) to noise (1): velocities are negated."""
    torch.manual_seed(1)
    expert = GemmaConfig(**PLAIN.expert)
    config = PI0Config(
        vlm_config=paligemma_config(), dit_config=expert, chunk_size=H, max_state_dim=10, max_action_dim=8
    )
    theirs = Pi0(config).eval()
    ours = Spear1ForActionPrediction(spear1_config(PLAIN)).eval()
    copy_vlm(ours.vlm, theirs.model.vlm)
    ours.expert.load_state_dict({k: v for k, v in theirs.model.dit.state_dict().items() if "embed" not in k})
    embed = theirs.embed_action_time
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out"):
        getattr(ours, name).load_state_dict(getattr(embed, name).state_dict())
    ours.action_out_proj.load_state_dict({k: -v for k, v in theirs.action_out_proj.state_dict().items()})
    return ours, theirs


def observation() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The same two square images, instruction and state, as SPEAR-1 and as π0 take them."""
    images = torch.randint(0, 256, (B, 2, 3, 32, 32), dtype=torch.uint8)
    ids, state = torch.randint(3, 40, (B, 6)), torch.randn(B, 10)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    before = torch.ones(B, 8, dtype=torch.long)
    ours = {
        "pixel_values": {"external": images[:, 0], "wrist": images[:, 1]},
        "input_ids": ids,
        "attention_mask": mask,
    }
    theirs = {
        "pixel_values": images / 127.5 - 1,
        "pixel_attention_mask": torch.ones(B, 2, dtype=torch.bool),
        "input_ids": torch.cat([before * IMAGE_TOKEN, ids], dim=1),
        "attention_mask": torch.cat([before, mask], dim=1),
    }
    return ours, theirs, state


def test_with_linear_rotations_the_velocity_is_pi0s() -> None:
    ours, theirs = pi0_pair()
    inputs, reference, state = observation()
    noisy, time = torch.randn(B, H, 8), torch.tensor([0.2, 0.9])
    expected = -theirs(state=state, noise=noisy, timestep=1 - time, **reference).logits
    velocity = ours.predict(ours.prefix(**inputs), state, Action.from_vector(noisy), time).to_vector()
    assert relative(velocity, expected) < 1e-5


def test_with_linear_rotations_the_sampled_actions_are_pi0s() -> None:
    ours, theirs = pi0_pair()
    inputs, reference, state = observation()
    noise = torch.randn(B, H, 8)
    expected = Action.from_vector(theirs.sample_actions(state=state, noise=noise, num_steps=10, **reference))
    sampled = ours.sample_actions(**inputs, state=state, steps=10, noise=Action.from_vector(noise))
    assert relative(sampled.translation, expected.translation) < 1e-5
    assert relative(sampled.gripper, expected.gripper) < 1e-5
    # Ours end as unit quaternions with w >= 0.
    unit = torch.nn.functional.normalize(expected.rotation, dim=-1)
    unit = unit * torch.where(unit[..., :1] < 0, -1.0, 1.0)
    assert relative(sampled.rotation, unit) < 1e-5


def test_fast_norm_is_gemmas_gradients_included() -> None:
    torch.manual_seed(0)
    theirs, ours = GemmaRMSNorm(24), FastRMSNorm(24)
    with torch.no_grad():
        theirs.weight.normal_()
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(3, 5, 24) + 0.5, torch.randn(3, 5, 24)
    results = []
    for norm in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_is_attention(groups: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 7, 8), torch.randn(2, groups, 7, 8)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    full = [x.repeat_interleave(4 // groups, dim=1) for x in (key, value)]
    for allowed in (mask, None):
        expected = torch.nn.functional.scaled_dot_product_attention(query, *full, attn_mask=allowed)
        out, _ = grouped_attention(torch.nn.Identity(), query, key, value, allowed)
        torch.testing.assert_close(out.transpose(1, 2), expected)
