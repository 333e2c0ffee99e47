"""SPEAR-VLM: fusion of the encoders, masks, loss, decoding, checkpoints."""

import math

import pytest
import torch

from models_tiny import START, TINY, left_padded, pixels, spear1, text, vlm
from refusals import refuses
from spear.models.layers import compute_position_ids, make_prefix_lm_mask
from spear.models.presets import build_spear1_config, build_vlm_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.stage0 import MogeDepthConfig, MogeForDepth
from spear.models.vlm import IGNORE_LABEL, compute_token_loss


def batch(rows: int = 4, length: int = 9, prompt: int = 4) -> dict[str, torch.Tensor]:
    ids, mask = text(rows, length, last=START + TINY.bins)
    answer = (torch.arange(length) >= prompt) & mask.bool()
    labels = ids.masked_fill(~answer, IGNORE_LABEL)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": answer.long(),
        "labels": labels,
    }


def test_visual_tokens_are_the_average_of_both_projections_exactly() -> None:
    model, image = vlm(), pixels(3)["external"]
    siglip = model.vision_tower(image / 127.5 - 1, interpolate_pos_encoding=True).last_hidden_state
    parts = model.multi_modal_projector(siglip), model.moge_projector(model.moge(image))
    (fused,) = model.encode_views(image)
    assert fused.shape == (3, 6, 32)
    torch.testing.assert_close(fused, (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-6)
    plain = vlm(moge=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("moge")})
    torch.testing.assert_close(plain.encode_views(image)[0], parts[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(fused, 0.5 * (plain.encode_views(image)[0] + parts[1]))


def test_prefix_sees_itself_and_answers_see_only_the_past() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    mask = make_prefix_lm_mask(valid, torch.tensor([[0, 0, 1, 1, 0]]).bool())[0, 0].int()
    assert mask[:4].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert compute_position_ids(torch.tensor([[1, 0, 1, 1, 0]]).bool()).tolist() == [
        [0, 0, 1, 2, 2]
    ]


def test_a_missing_view_is_as_if_it_had_no_tokens() -> None:
    model, images = vlm(), pixels(2)
    ids, mask = text(2, 5)
    gone = {"wrist": torch.zeros(2, dtype=torch.bool)}
    without = model({"external": images["external"]}, ids, mask).logits
    swapped = {
        view: images[view] for view in ("wrist", "external")
    }  # the config's order is what counts
    assert torch.equal(model(swapped, ids, mask).logits, model(images, ids, mask).logits)
    torch.testing.assert_close(
        model(images, ids, mask, view_mask=gone).logits, without, rtol=1e-4, atol=1e-5
    )


def test_loss_weighs_3d_tokens_by_lambda() -> None:
    model = vlm()
    images, inputs = pixels(4, views=("external",)), batch()
    labels, result = inputs["labels"], model(images, **inputs)
    log_p = model(images, **{k: v for k, v in inputs.items() if k != "labels"}).logits.log_softmax(
        -1
    )[:, :-1]
    wanted = labels[:, 1:] != IGNORE_LABEL
    each = -log_p.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0][wanted]
    coordinate = labels[:, 1:][wanted] >= START
    weight = 1.0 + coordinate
    torch.testing.assert_close(result.loss, (weight * each).sum() / weight.sum())
    torch.testing.assert_close(result.parts["coordinates"], each[coordinate].mean())
    torch.testing.assert_close(result.parts["text"], each[~coordinate].mean())


def test_smoothing_spreads_a_3d_target_over_its_neighbours() -> None:
    labels = torch.tensor([START + 10, START, 5])
    logits = torch.randn(3, START + TINY.bins, dtype=torch.float64).float()
    bins, target = torch.arange(TINY.bins), torch.zeros_like(logits)
    for row, centre in ((0, 10), (1, 0)):
        gauss = torch.exp(-0.5 * ((bins - centre) / 1.5) ** 2) * ((bins - centre).abs() <= 4)
        target[row, START:] = gauss / gauss.sum()
    target[2, 5] = 1
    each = -(target * logits.log_softmax(-1)).sum(-1)
    loss, _ = compute_token_loss(logits, labels, range(START, START + TINY.bins), 2.0, 1.5)
    torch.testing.assert_close(loss, (2 * each[0] + 2 * each[1] + each[2]) / 5)


def test_gradients_reach_every_weight() -> None:
    model = vlm().train()
    model(pixels(4), **batch()).loss.backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_unknown_views_wrong_images_and_parts_that_do_not_fit_are_refused() -> None:
    model = vlm()
    ids, mask = text(1, 4)
    images = pixels(1)
    refuses(
        r"unknown view 'wrst': did you mean 'wrist'\?", model, {"wrst": images["wrist"]}, ids, mask
    )
    refuses(r"'wrist' is torch\.float32", model, {"wrist": images["wrist"] / 255}, ids, mask)
    refuses("wrong image type", model, {"wrist": images["wrist"][:, :1]}, ids, mask)
    refuses(
        "wrong image size: .* 31×32",
        vlm(stem="patch"),
        {"wrist": images["wrist"][..., 1:]},
        ids,
        mask,
    )
    refuses("no images", model, {}, ids, mask)
    refuses("patch 16, MoGe patch 8", vlm, moge={**(TINY.moge or {}), "patch_size": 8})
    refuses("head_dim is 4, the VLM's is 8", spear1, expert={**TINY.expert, "head_dim": 4})
    refuses("did you mean 'nano'", get_preset, "nanno")


def test_the_loss_of_depth_is_that_of_shape_and_scale_where_it_is_known() -> None:
    """Of a head that says the same of each patch, whose 4 × 4 cells are 4 pixels wide."""
    model = MogeForDepth(MogeDepthConfig(moge_config=build_vlm_config(TINY).moge_config, cells=4))
    image, said, apart = (
        pixels(3)["external"],
        torch.linspace(-1, 1, 16),
        torch.tensor([1.0, -1]).repeat(8),
    )
    depth = said.view(4, 4).kron(torch.ones(4, 4)).exp().repeat(3, 2, 3)
    depth[:, :4, :8], depth[:, 4:6], depth[:, 30, 1] = math.inf, 0, math.nan
    torch.nn.init.zeros_(model.head.weight)
    for scale, shape in ((0, 0), (0.3, 0), (-0.3, 0.2)):
        model.head.bias.data = said + scale + shape * apart
        assert model(image, depth).loss.item() == pytest.approx(abs(scale) + shape, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "vlm_b", "total_b"),
    [("spear1", 3.24, 3.55), ("small", 0.32, 0.38), ("nano", 0.01, 0.01)],
)
def test_presets_have_the_papers_size(name: str, vlm_b: float, total_b: float) -> None:
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(get_preset(name)))
    assert next(model.parameters()).is_meta
    assert sum(p.numel() for p in model.vlm.parameters()) / 1e9 == pytest.approx(vlm_b, abs=0.01)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(total_b, abs=0.01)
    patch = get_preset(name).vision["patch_size"]
    assert all(w % patch == 0 and h % patch == 0 for w, h in get_preset(name).image_sizes.values())


def test_texts_that_share_an_image_and_texts_in_groups_of_similar_length_have_the_same_loss() -> (
    None
):
    model, arguments = vlm(), batch()
    lengths = torch.tensor([int(v) for v in arguments["attention_mask"].sum(1)])
    whole = model(pixels(4), **arguments).loss
    whole.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    for groups in (2, 3, 9):
        model.zero_grad()
        loss = model(pixels(4), **arguments, length_groups=groups).loss
        loss.backward()
        torch.testing.assert_close(loss, whole)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-3)
    assert len(lengths.unique()) > 1
    answers_known = {name: one for name, one in arguments.items() if name != "token_type_ids"}
    torch.testing.assert_close(
        model(pixels(4), **answers_known).loss, whole
    )  # else answers would see themselves
    left = {
        name: left_padded(one, arguments["attention_mask"])[0] for name, one in arguments.items()
    }
    torch.testing.assert_close(model(pixels(4), **left, length_groups=3).loss, whole)
    images, owners = pixels(2), torch.tensor([1, 0, 1, 1])
    each = {view: image[owners] for view, image in images.items()}
    shared = model(images, image_index=owners, **arguments, length_groups=2).loss
    torch.testing.assert_close(shared, model(each, **arguments).loss)
