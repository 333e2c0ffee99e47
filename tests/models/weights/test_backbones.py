"""Published PaliGemma, MoGe and π0 folders become SPEAR-VLM and SPEAR-1, and compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration
from transformers import PI0ForConditionalGeneration as Pi0

from data_tiny import edit
from models_tiny import TINY
from parity import compute_logits_of_both, relative_error
from published_checkpoints import (
    IMAGE_TOKEN,
    LAYOUTS,
    ROWS,
    TINY14,
    paligemma,
    pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
)
from refusals import refuses
from spear.models.presets import build_vlm_config
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.action_expert import plan_policy
from spear.models.weights.backbones import EMBEDDINGS, plan_backbones
from spear.models.weights.folders import is_simulator_only
from spear.models.weights.load import StoredCheckpoint
from spear.tokens import init_new_embeddings
from spear.types import Action

B, H = 2, TINY.horizon
SPEAR_VLM = SpearVLMForConditionalGeneration
pytestmark = pytest.mark.usefixtures("known_sizes")


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_moge_the_logits_are_those_of_the_same_folder(
    tmp_path: Path, layout: str, text: str
) -> None:
    folder = publish_paligemma(paligemma(text), tmp_path / "paligemma", layout)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    ours = plan_backbones(folder, None, "tiny14").run()
    mine, expected = compute_logits_of_both(ours, theirs, 280, 210)
    assert mine.shape[-1] == ROWS + TINY14.bins and relative_error(mine[:, :ROWS], expected) < 1e-5
    ours.save_pretrained(again := tmp_path / "saved")
    assert torch.equal(
        compute_logits_of_both(weights.load(SPEAR_VLM, again), theirs, 280, 210)[0], mine
    )
    ours.set_attn_implementation("eager")
    assert relative_error(compute_logits_of_both(ours, theirs, 280, 210)[0], mine) < 1e-5


def test_every_weight_is_accounted_for(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma", "2025")
    moge = publish_moge(tmp_path / "model.pt")
    plan = plan_backbones(folder, moge, "tiny14")
    report, model = plan.report, plan.run()
    assert {key.name.split("[")[0] for key in report.with_status("loaded", "new")} == set(
        model.state_dict()
    )
    assert report.num_parameters() == sum(p.numel() for p in model.parameters())
    published = set(StoredCheckpoint.open(folder, "PaliGemma").weights) | set(
        torch.load(moge)["model"]
    )
    left = {key.name for key in report.with_status("left out")}
    assert {key.note.split(": ")[-1] for key in report.with_status("loaded")} | left == published
    assert left >= {"lm_head.weight", "image_mean", "backbone.mask_token"}
    assert sorted(key.name for key in report.with_status("new")) == [
        f"{EMBEDDINGS}[{ROWS}:{ROWS + TINY14.bins}]",
        "moge_projector.linear.bias",
        "moge_projector.linear.weight",
    ]
    assert report.with_status("missing", "refused") == []


@pytest.mark.parametrize(("rows", "start"), [(ROWS, ROWS), (ROWS + 64, ROWS), (ROWS - 1, ROWS)])
def test_3d_tokens_follow_the_tokenizer(tmp_path: Path, rows: int, start: int) -> None:
    published = paligemma(rows=rows)
    plan = plan_backbones(publish_paligemma(published, tmp_path / "paligemma"), None, "tiny14")
    model = plan.run()
    table = model.language_model.embed_tokens.weight
    assert (
        plan.tokenizer.convert_tokens_to_ids("<3d0000>") == start == model.config.coordinate_start
    )
    assert len(table) == max(rows, start + TINY14.bins) == model.config.text_config.vocab_size
    known = published.model.language_model.embed_tokens.weight
    keep = min(rows, start)
    assert torch.equal(table[:keep], known[:keep])
    assert torch.equal(table[start + TINY14.bins :], known[start + TINY14.bins :])
    end = start + TINY14.bins
    drawn = init_new_embeddings(known[:keep], end - keep, torch.Generator().manual_seed(0))
    assert torch.equal(table[keep:end], drawn)
    assert torch.equal(plan.run().language_model.embed_tokens.weight, table)
    assert not torch.equal(plan.run(seed=1).language_model.embed_tokens.weight, table)


def test_bfloat16_weights_are_the_rounded_ones(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma", tokenizer=False)
    moge = publish_moge(tmp_path / "model.pt")
    full, half = (
        plan_backbones(folder, moge, "tiny14").run(dtype) for dtype in (None, torch.bfloat16)
    )
    expected = full.state_dict()
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16
        if "moge_projector" not in name and name != EMBEDDINGS:
            assert torch.equal(weight, expected[name].to(torch.bfloat16)), name
    assert full.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert plan_policy(tmp_path / "half", size="tiny14").dtype == torch.bfloat16


def a_vlm(folder: Path) -> Path:
    SPEAR_VLM(build_vlm_config(TINY14)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["lerobot", "openpi", "transformers"])
def test_with_pi0s_expert_the_velocity_and_the_actions_are_pi0s(
    tmp_path: Path, layout: str
) -> None:
    theirs = pi0()
    theirs.config.dit_config.rms_norm_eps = 1e-2 if layout == "transformers" else 1e-6
    published = paligemma()
    published.model.load_state_dict(theirs.model.vlm.state_dict())
    folder = publish_paligemma(published, tmp_path / "paligemma", tokenizer=False)
    plan_backbones(folder, None, "tiny14").save(tmp_path / "vlm")
    expert = publish_pi0(theirs, tmp_path / "pi0", layout)
    ours = plan_policy(tmp_path / "vlm", expert, "linear14").run()
    if layout == "transformers":
        theirs = Pi0.from_pretrained(expert).eval()
    images = torch.randint(0, 256, (B, 2, 3, 224, 224), dtype=torch.uint8)
    ids, state = torch.randint(3, 40, (B, 6)), torch.randn(B, 10)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    before = torch.ones(B, 2 * 256, dtype=torch.long)
    views = {"external": images[:, 0], "wrist": images[:, 1]}
    mine: dict[str, Any] = {"pixel_values": views, "input_ids": ids, "attention_mask": mask}
    reference = {
        "pixel_values": images / 127.5 - 1,
        "pixel_attention_mask": torch.ones(B, 2, dtype=torch.bool),
        "input_ids": torch.cat([before * IMAGE_TOKEN, ids], dim=1),
        "attention_mask": torch.cat([before, mask], dim=1),
    }
    noisy, time = torch.randn(B, H, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected = -theirs(state=state, noise=noisy, timestep=1 - time, **reference).logits
        velocity = ours.predict(
            ours.encode_prefix(**mine), state, Action.from_vector(noisy), time
        ).to_vector()
    assert relative_error(velocity, expected) < 1e-5
    goal = Action.from_vector(
        theirs.sample_actions(state=state, noise=noisy, num_steps=4, **reference)
    )
    sampled = ours.sample_actions(**mine, state=state, steps=4, noise=Action.from_vector(noisy))
    assert relative_error(sampled.translation, goal.translation) < 1e-5
    assert relative_error(sampled.gripper, goal.gripper) < 1e-5
    unit = torch.nn.functional.normalize(
        goal.rotation, dim=-1
    )  # ours end as unit quaternions with w >= 0
    assert relative_error(sampled.rotation, unit * torch.where(unit[..., :1] < 0, -1.0, 1.0)) < 1e-5


def test_of_a_pi0_for_other_robots_the_layers_that_take_states_and_actions_are_new(
    tmp_path: Path,
) -> None:
    expert = publish_pi0(pi0(state=32, action=32), tmp_path / "pi0")
    plan = plan_policy(a_vlm(tmp_path / "vlm"), expert, "tiny14")
    model = plan.run()
    ends = ("state_proj", "action_in_proj", "action_out_proj")
    new = {f"{end}.{part}" for end in ends for part in ("weight", "bias")}
    assert {key.name for key in plan.report.with_status("new")} == new
    left = {key.name: key.note for key in plan.report.with_status("left out")}
    assert left["model.state_proj.weight"] == "its states and actions mean other numbers"
    assert "normalize_inputs.buffer_observation_state.mean" in left
    stored = (StoredCheckpoint.open(folder, "one") for folder in (tmp_path / "vlm", expert))
    assert len(plan.report.with_status("loaded", "left out")) == sum(
        len(one.weights) for one in stored
    )
    assert plan.report.with_status("missing", "refused") == []
    published = pi0(state=32, action=32)
    layers = (model.expert.layers[1], published.model.dit.layers[1])
    assert torch.equal(*(layer.mlp.up_proj.weight for layer in layers))
    assert torch.equal(
        model.action_time_mlp_in.weight, published.embed_action_time.action_time_mlp_in.weight
    )


def test_a_new_expert_is_drawn_as_the_model_draws_it_and_repeats(tmp_path: Path) -> None:
    folder = a_vlm(tmp_path / "vlm")
    plan = plan_policy(folder, size="tiny14")
    plan.save(tmp_path / "before")
    (folder / "recipe.json").write_text('{"simulator_only": true}')
    plan.save(tmp_path / "after")
    assert is_simulator_only(tmp_path / "after") and not is_simulator_only(tmp_path / "before")
    models = [plan.run(seed=seed) for seed in (0, 0, 1)]
    for key in plan.report.with_status("new"):
        drawn, same, other = (model.state_dict()[key.name] for model in models)
        assert torch.equal(drawn, same)
        if key.note.startswith("N("):
            assert not torch.equal(drawn, other), key.name
        else:
            assert torch.equal(drawn, other) and not drawn.any(), key.name
    out = models[0].action_time_mlp_in.weight.detach()
    assert float(out.std()) == pytest.approx(out.shape[1] ** -0.5, rel=0.1)


def test_one_weight_in_bfloat16_does_not_round_the_others(tmp_path: Path) -> None:
    folder = a_vlm(tmp_path)
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({**state, EMBEDDINGS: state[EMBEDDINGS].bfloat16()}, file)
    assert plan_policy(folder, size="tiny14").dtype == torch.float32
    save_file({}, file)
    refuses("holds no weights", plan_policy, folder, None, "tiny14")


def test_checkpoints_of_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma", tokenizer=False)
    vlm = a_vlm(tmp_path / "vlm")
    refuses("PaliGemma not found", plan_backbones, tmp_path / "nowhere", None, "tiny14")
    refuses("'paligemma'.*spear_vlm", plan_policy, folder)
    refuses("holds no action expert", plan_policy, vlm, folder, "tiny14")
    refuses("does not fit: its external images of 192×128", plan_backbones, folder, None, "nano")
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    refuses("not tied", plan_backbones, folder, None, "tiny14")
    edit(folder / "config.json", lambda config: config.update(model_type="llava"))
    refuses("says 'llava': give a PaliGemma 1 or 2", plan_backbones, folder, None, "tiny14")
    (folder / "config.json").write_text("{")
    refuses("config.json", plan_backbones, folder, None, "tiny14")
    expert = publish_pi0(pi0(), tmp_path / "pi0")
    state = load_file(expert / "model.safetensors")
    name = "model.paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight"
    save_file({**state, name: torch.zeros(3)}, expert / "model.safetensors")
    refuses("π0.5", plan_policy, vlm, expert, "tiny14")


def test_incomplete_and_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma", tokenizer=False)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuses(f"broken checkpoint: .*{shard.name}", plan_backbones, folder, None, "tiny14")
    shard.unlink()
    refuses(f"incomplete: .*{shard.name} is missing", plan_backbones, folder, None, "tiny14")
    shard.write_bytes(whole)
    state = load_file(shard)
    name = sorted(state)[0]

    def with_state(**changes: torch.Tensor) -> Any:
        kept = {k: v for k, v in state.items() if k != name or name not in changes}
        save_file({**kept, **{k: v for k, v in changes.items() if v.numel()}}, shard)
        return plan_backbones(folder, None, "tiny14")

    plan = with_state(**{name: torch.zeros(0)})
    assert [key.status for key in plan.report.keys].count("missing") == 1
    refuses("weights missing: 1, first ", plan.run)
    refuses(
        "weights refused: 1, first .*its shape is", with_state(**{name: torch.zeros(2, 3)}).check
    )
    foreign = with_state(**{"tail.weight": torch.ones(2)})
    refuses("weights refused: 1, first tail.weight .*no such", foreign.run)
    foreign = {name: state[name].to(torch.int8)}
    refuses(r"wrong dtype: .* is I8: use a checkpoint in float32", with_state, **foreign)


def test_what_would_be_loaded_and_be_wrong_is_refused(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma", "2025")
    one, two = sorted(folder.glob("*.safetensors"))
    state, head = load_file(one), "lm_head.weight"
    norm = next(name for name in state if "norm" in name)
    for name, change, dtype in (
        (head, 1, None),
        (norm, torch.nan, None),
        (norm, 1e6, torch.float16),
    ):
        save_file({**state, name: state[name] + change}, one)
        refuses(name.removeprefix("model."), plan_backbones(folder, None, "tiny14").run, dtype)
    rest = load_file(two)
    for name in (
        norm,
        norm.removeprefix("model."),
    ):  # stored twice; or under two names that become one
        save_file({**rest, name: state[norm]}, two)
        refuses(norm, plan_backbones, folder, None, "tiny14")
    save_file(state, folder / "model.safetensors")
    refuses("/model.safetensors.index.json", plan_backbones, folder, None, "tiny14")
    vlm = a_vlm(tmp_path / "vlm")
    state = load_file(vlm / "model.safetensors")
    endless = {**state, EMBEDDINGS: state[EMBEDDINGS] * torch.inf}
    save_file(endless, vlm / "model.safetensors", {"format": "pt"})
    refuses(EMBEDDINGS, weights.load, SPEAR_VLM, vlm)


def test_vocabularies_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = publish_paligemma(paligemma(rows=ROWS - 40), tmp_path / "short")
    sizes = "tokenizer has 1312 tokens, its embeddings 1272"
    refuses(f"vocabulary mismatch: .*{sizes}", plan_backbones, folder, None)
    folder = publish_paligemma(paligemma(), tmp_path / "paligemma")
    plan = plan_backbones(folder, None, "tiny14")
    edit(folder / "config.json", lambda config: config["text_config"].update(vocab_size=7))
    refuses(
        "its config says 7 tokens, its embeddings have 1312", plan_backbones, folder, None, "tiny14"
    )
    edit(folder / "config.json", lambda config: config["text_config"].update(vocab_size=ROWS))
    plan.tokenizer.save_pretrained(folder)
    refuses("has 3D tokens already", plan_backbones, folder, None, "tiny14")
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace("<loc", "<place"))
    refuses("<loc0000>", plan_backbones, folder, None, "tiny14")


def test_names_on_the_hub_are_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    said = "cannot get google/absent .*or give a local folder"
    refuses(said, plan_backbones, "google/absent", None, "tiny14")
    cached = tmp_path / "models--google--tiny"
    publish_paligemma(paligemma(), cached / "snapshots" / "0123456789", tokenizer=False)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789")
    plan = plan_backbones("google/tiny", None, "tiny14")
    assert plan.sources == {"PaliGemma": "google/tiny@0123456789"}
    assert plan.report.with_status("missing", "refused") == []
