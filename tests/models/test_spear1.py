"""SPEAR-1: block-causal information flow, flow samples, sampling, checkpoints."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from models_tiny import TINY, actions, left_padded, pixels, spear1, text
from refusals import refuses
from spear import flow
from spear.models.presets import build_spear1_config
from spear.models.spear1 import Spear1Config, Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.types import Action

B, H = 3, TINY.horizon


def inputs(
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask = text(B, 6, seed)
    return (
        pixels(B, seed),
        ids,
        mask,
        torch.randn(B, 10, generator=torch.Generator().manual_seed(seed)),
    )


def activations(
    model: Spear1ForActionPrediction, state: torch.Tensor, noisy: Action
) -> dict[str, torch.Tensor]:
    """Every layer's output, of the VLM [B, S, D] and of the expert [B, 1 + H, D]."""
    images, ids, mask, _ = inputs()
    kept: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__ in ("GemmaDecoderLayer", "SiglipEncoderLayer", "Dinov2Layer"):
                keep = lambda m, a, out, name=name: kept.update({name: out.detach().clone()})  # noqa: E731
                hooks.enter_context(module.register_forward_hook(keep))
        model.predict(model.encode_prefix(images, ids, mask), state, noisy, torch.full((B,), 0.3))
    return kept


def test_an_action_changes_no_activation_of_the_prefix_or_the_state_nor_the_state_one_of_the_prefix() -> (
    None
):
    model = spear1()
    state, noisy = inputs()[3], actions(B, H)
    moved = Action(noisy.translation.clone(), noisy.rotation, noisy.gripper)
    moved.translation[:, 2] += 1
    changes = (state, noisy), (state, moved), (state + 1, noisy)
    before, acted, stood = (activations(model, *change) for change in changes)
    for name, value in before.items():
        if name.startswith("expert"):
            assert torch.equal(value[:, 0], acted[name][:, 0]) and not torch.equal(
                value, stood[name]
            ), name
        else:
            assert torch.equal(value, acted[name]) and torch.equal(value, stood[name]), name
    last = f"expert.layers.{len(model.expert.layers) - 1}"
    # Within the chunk attention goes both ways, and all actions see the state.
    for after in (acted, stood):
        assert all(not torch.equal(before[last][:, 1 + h], after[last][:, 1 + h]) for h in range(H))


def test_the_expert_does_not_see_padding_or_a_missing_view() -> None:
    model, gone = spear1(), {"wrist": torch.zeros(B, dtype=torch.bool)}
    images, ids, mask, state = inputs()
    noisy, time = actions(B, H), torch.full((B,), 0.3)
    for padded in ((ids, mask), left_padded(ids, mask)):
        together = model.predict(
            model.encode_prefix(images, *padded, gone), state, noisy, time
        ).to_vector()
        for row in range(B):
            one = slice(row, row + 1)
            prefix = model.encode_prefix(
                {"external": images["external"][one]}, ids[one, : mask[row].sum()]
            )
            alone = model.predict(
                prefix, state[one], Action.from_vector(noisy.to_vector()[one]), time[one]
            )
            torch.testing.assert_close(alone.to_vector(), together[one], rtol=1e-4, atol=1e-5)


def test_flow_samples_that_share_a_prefix_equal_separate_calls() -> None:
    model = spear1()
    images, ids, mask, state = inputs()
    target, counts = (
        actions(B, H),
        torch.rand(B, H, generator=torch.Generator().manual_seed(5)) < 0.7,
    )
    noise, time = (
        actions(B, 4, H, seed=2),
        torch.rand(B, 4, generator=torch.Generator().manual_seed(6)),
    )
    together = model(images, ids, mask, state, target, counts, noise=noise, time=time)
    separate = []
    for k in range(4):
        drawn = {
            "noise": Action.from_vector(noise.to_vector()[:, k : k + 1]),
            "time": time[:, k : k + 1],
        }
        separate.append(model(images, ids, mask, state, target, counts, **drawn).loss)
    torch.testing.assert_close(together.loss, torch.stack(separate).mean(), rtol=1e-5, atol=1e-6)
    losses = []
    for given in ({"noise": noise}, {"time": time}):  # either says how many samples there are
        draw, likewise = (torch.Generator().manual_seed(7) for _ in range(2))
        losses += [model(images, ids, mask, state, target, **given, generator=draw).loss]
        losses += [
            model(
                images, ids, mask, state, target, **given, generator=likewise, flow_samples=4
            ).loss
        ]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_committed_actions_are_given_and_teach_nothing() -> None:
    model = spear1(flow={"rotation_loss": "mse"})
    images, ids, mask, state = inputs()
    target, counts = actions(B, H), torch.arange(H) < torch.tensor([[H], [H - 1], [H]])

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    same = drawn()
    noise = flow.sample_noise((B, 8, H), model.flow, same)
    time = flow.sample_time(B * 8, model.flow, same).view(B, 8)
    plain = model(images, ids, mask, state, target, counts, flow_samples=8, generator=drawn()).loss
    given = model(images, ids, mask, state, target, counts, noise=noise, time=time).loss
    assert torch.equal(plain, given)  # without it, nothing else is drawn

    model.config.committed = 2
    first = torch.randint(3, (B, 8, 1), generator=same)
    held = torch.arange(H) < first
    assert set(first.flatten().tolist()) == {0, 1, 2}
    heard: list[torch.Tensor] = []
    said: list[torch.Tensor] = []
    model.action_in_proj.register_forward_hook(lambda module, given, out: heard.append(given[0]))
    model.action_out_proj.register_forward_hook(lambda module, given, out: said.append(out))
    model.action_out_proj.register_forward_hook(lambda module, given, out: out.retain_grad())
    loss = model(images, ids, mask, state, target, counts, flow_samples=8, generator=drawn()).loss
    demonstrated = Action.from_vector(target.to_vector()[:, None].expand(B, 8, H, 8))
    wanted = flow.perturb_committed(
        demonstrated, held, same, counts[:, None].expand(B, 8, H)
    ).to_vector()
    torch.testing.assert_close(heard[0][held], wanted[held], rtol=0, atol=1e-6)
    loss.backward()
    taught = said[0].grad.reshape(B, 8, H, 8).abs().sum(-1) > 0
    assert torch.equal(taught, ~held & counts[:, None])
    # One action after another, each a chunk of its own at its own time.
    each = [said[0].detach().reshape(B, 8, H, 8), noise.to_vector(), wanted]
    alone = [Action.from_vector(x[taught][:, None]) for x in each]
    times = time[..., None].expand(B, 8, H)[taught]
    torch.testing.assert_close(loss, flow.compute_loss(*alone, times, model.flow)[0])


def test_gradients_reach_expert_vlm_and_encoders() -> None:
    model = spear1().train()
    model(*inputs(), actions(B, H), flow_samples=2).loss.backward()
    lacking = {
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    # Of the VLM's last layer only the keys and values are read; nothing after them can learn.
    last = f"vlm.language_model.layers.{len(model.expert.layers) - 1}"
    dead = ["self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm"]
    dead += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert lacking == {f"{last}.{name}.weight" for name in dead} | {
        "vlm.language_model.norm.weight"
    }


@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_sampled_actions_repeat_with_their_seed(prediction: str) -> None:
    model = spear1(flow={"prediction": prediction})
    first = Action.from_vector(
        model.action_out_proj.bias.detach()
    )  # of a clean action: not to turn
    assert torch.equal(first.rotation, torch.eye(4)[0] * (prediction == "clean"))
    noise = (
        flow.sample_noise((B, H), model.flow, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    one, same, other = (
        model.sample_actions(*inputs(), drawn, steps=7).to_vector() for drawn in noise
    )
    with pytest.raises(ValueError, match=f"{H + 1} actions"):
        model.sample_actions(*inputs(), flow.sample_noise((B, H + 1), model.flow))
    assert one.shape == (B, H, 8) and torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = spear1(flow={"prediction": "clean", "geodesic_weight": 0.5}).to(dtype)
    model.save_pretrained(tmp_path)
    for again in (
        weights.load(Spear1ForActionPrediction, tmp_path),
        AutoModel.from_pretrained(tmp_path),
    ):
        assert isinstance(again, Spear1ForActionPrediction)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert (
            again.flow == model.flow
            and again.config.vlm_config.views == model.config.vlm_config.views
        )
        if dtype == torch.float32:
            same = [m.sample_actions(*inputs(), noise=actions(B, H)) for m in (model, again)]
            assert torch.equal(same[0].to_vector(), same[1].to_vector())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert Spear1Config(**saved).to_dict() == model.config.to_dict()
    saved["vlm_config"]["image_sizes"] = {"external": [1, 1]}  # of older ones, which nothing reads
    assert Spear1Config(**saved).to_dict() == model.config.to_dict()


def broken(folder: Path) -> str:
    return refuses("", weights.load, Spear1ForActionPrediction, folder)


def test_broken_checkpoints_say_what_is_wrong_and_of_which_weight(tmp_path: Path) -> None:
    assert "checkpoint not found" in broken(tmp_path / "nowhere")
    assert "no JSON object can be read" in broken(tmp_path)
    folder, model = tmp_path / "model", spear1()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "broken checkpoint" in broken(folder)
    file.unlink()
    assert "model.safetensors is missing" in broken(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    assert "unknown architecture" in broken(folder) and "spear1" in broken(folder)
    for wrong in (
        {"flow": {"speed": 1}},
        {"vlm_config": "x"},
        {"expert_config": {"hidden_size": "x"}},
    ):
        (folder / "config.json").write_text(
            json.dumps({**build_spear1_config(TINY).to_dict(), **wrong})
        )
        assert "broken config" in broken(folder)
    unfit: dict[str, Any] = {
        "horizon": "five",
        "committed": 7.5,
        "flow": [],
        "max_period": 0,
        "dtype": [],
    }
    unfit |= {
        "vlm_config.views": "external",
        "vlm_config.coordinate_start": None,
        "flow.steps": "5",
    }
    for key, value in {
        **unfit,
        "vlm_config.coordinate_smoothing": -1,
        "vlm_config.text_config": 0,
    }.items():
        part, _, name = key.rpartition(".")
        changed = build_spear1_config(TINY).to_dict()
        (changed[part] if part else changed)[name] = value
        (folder / "config.json").write_text(json.dumps(changed))
        said = broken(folder)
        assert str(folder / "config.json") in said and (
            name in said or name in ("dtype", "text_config")
        )
    for wrong in ([], {"weight_map": {"head": 5}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(wrong))
        assert "broken checkpoint" in broken(folder)
    state = model.state_dict()
    without = {k: v for k, v in state.items() if k != "state_proj.bias"}
    model.save_pretrained(tmp_path / "less", state_dict=without)
    assert "missing keys, first state_proj.bias" in broken(tmp_path / "less")
    model.save_pretrained(tmp_path / "more", state_dict={**state, "tail.weight": torch.ones(2)})
    assert "unexpected keys, first tail.weight" in broken(tmp_path / "more")
    config = build_spear1_config(TINY)
    config.vlm_config.text_config.vocab_size += 1
    model.save_pretrained(tmp_path / "other")
    config.save_pretrained(tmp_path / "other")
    assert "mismatched keys, first vlm.language_model.embed_tokens.weight" in broken(
        tmp_path / "other"
    )
