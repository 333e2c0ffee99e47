"""SPEAR-VLM: fusion of the encoders, masks, the loss, refused inputs, and sizes of presets; and the
depth loss of stage 0."""

import math
from typing import Any

import pytest
import torch

from models_tiny import (
    FIRST_COORDINATE_ID,
    TINY,
    draw_pixels,
    draw_text,
    make_spear1,
    make_vlm,
    to_left_padded,
)
from refusals import refuses
from spear.models.layers import compute_position_ids, make_prefix_lm_mask
from spear.models.presets import build_spear1_config, build_vlm_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.stage0 import MogeDepthConfig, MogeForDepth
from spear.models.vlm import IGNORE_LABEL, compute_weighted_cross_entropy


def make_batch(rows: int = 4, length: int = 9, prompt_length: int = 4) -> dict[str, torch.Tensor]:
    """Prompts, each with an answer of one of several lengths, and labels on the answers."""
    ids, mask = draw_text(rows=rows, length=length, last=FIRST_COORDINATE_ID + TINY.bins)
    is_answer = (torch.arange(length) >= prompt_length) & mask.bool()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": is_answer.long(),
        "labels": ids.masked_fill(~is_answer, IGNORE_LABEL),
    }


class TestVisualTokens:
    def test_are_the_average_of_both_projections(self) -> None:
        model = make_vlm()
        image = draw_pixels(3)["external"]
        pixels = image / 127.5 - 1  # SigLIP takes values from -1 to 1
        siglip = model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        siglip_tokens = model.multi_modal_projector(siglip)
        moge_tokens = model.moge_projector(model.moge(image))

        tokens = model.encode_views(image)[0]

        assert tokens.shape == (3, 6, 32)  # batch, 3 × 2 patches of 16 pixels, text width
        average = (siglip_tokens + moge_tokens) / 2
        torch.testing.assert_close(tokens, average, rtol=1e-5, atol=1e-6)

    def test_without_moge_are_siglips_exactly(self) -> None:
        """Two models with the same SigLIP, of which one has a MoGe."""
        model = make_vlm()
        image = draw_pixels(3)["external"]
        moge_tokens = model.moge_projector(model.moge(image))
        without_moge = make_vlm(moge=None)
        siglip_weights = {
            name: weight
            for name, weight in model.state_dict().items()
            if not name.startswith("moge")
        }
        without_moge.load_state_dict(siglip_weights)

        siglip_tokens = without_moge.encode_views(image)[0]

        assert torch.equal(model.encode_views(image)[0], 0.5 * (siglip_tokens + moge_tokens))

    def test_of_a_missing_view_are_not_seen(self) -> None:
        model = make_vlm()
        images = draw_pixels(2)
        ids, mask = draw_text(rows=2, length=5)
        is_present = {"wrist": torch.zeros(2, dtype=torch.bool)}

        masked = model(images, ids, mask, view_mask=is_present).logits
        absent = model({"external": images["external"]}, ids, mask).logits

        torch.testing.assert_close(masked, absent, rtol=1e-4, atol=1e-5)

    def test_are_in_the_order_of_the_config(self) -> None:
        model = make_vlm()
        images = draw_pixels(2)
        ids, mask = draw_text(rows=2, length=5)
        swapped = {"wrist": images["wrist"], "external": images["external"]}
        assert torch.equal(model(swapped, ids, mask).logits, model(images, ids, mask).logits)


def test_the_prefix_sees_itself_and_answers_see_only_the_past() -> None:
    """Two tokens of a prefix, two of an answer, and one of padding."""
    valid = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    causal = torch.tensor([[0, 0, 1, 1, 0]]).bool()

    mask = make_prefix_lm_mask(valid, causal)[0, 0].int()

    assert mask[:4].tolist() == [  # row: the token that sees; column: the token that is seen
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
    ]


def test_padding_takes_no_position() -> None:
    valid = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    assert compute_position_ids(valid).tolist() == [[0, 0, 1, 2, 2]]


def test_the_loss_weighs_3d_tokens_by_lambda() -> None:
    model = make_vlm()
    images = draw_pixels(4, views=("external",))
    inputs = make_batch()

    output = model(images, **inputs)

    # The logits at a position predict the next token.
    labels = inputs.pop("labels")
    log_p = model(images, **inputs).logits.log_softmax(-1)[:, :-1]
    next_labels = labels[:, 1:]
    is_learned = next_labels != IGNORE_LABEL
    label_log_p = log_p.gather(-1, next_labels.clamp_min(0)[..., None])[..., 0]  # [texts, L - 1]
    losses = -label_log_p[is_learned]
    is_coordinate = next_labels[is_learned] >= FIRST_COORDINATE_ID
    weights = torch.where(is_coordinate, 2.0, 1.0)  # λ is 2
    torch.testing.assert_close(output.loss, (weights * losses).sum() / weights.sum())
    torch.testing.assert_close(output.parts["coordinates"], losses[is_coordinate].mean())
    torch.testing.assert_close(output.parts["text"], losses[~is_coordinate].mean())


def test_smoothing_spreads_the_target_of_a_3d_token_over_its_neighbors() -> None:
    """The labels are the 3D token of an inner bin, that of the first bin, and a token of text."""
    sigma = 1.5
    inner_bin = 10
    text_id = 5
    labels = torch.tensor([FIRST_COORDINATE_ID + inner_bin, FIRST_COORDINATE_ID, text_id])
    coordinate_ids = range(FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + TINY.bins)
    logits = torch.randn(3, coordinate_ids.stop, dtype=torch.float64).float()

    loss, _ = compute_weighted_cross_entropy(
        logits, labels, coordinate_ids, coordinate_weight=2.0, smoothing=sigma
    )

    bins = torch.arange(TINY.bins)
    target = torch.zeros_like(logits)
    for row, center in ((0, inner_bin), (1, 0)):
        is_near = (bins - center).abs() <= 4  # 3σ, rounded
        gaussian = torch.exp(-0.5 * ((bins - center) / sigma) ** 2) * is_near
        target[row, FIRST_COORDINATE_ID:] = gaussian / gaussian.sum()
    target[2, text_id] = 1
    losses = -(target * logits.log_softmax(-1)).sum(-1)
    # The mean with the weights 2, 2 and 1.
    torch.testing.assert_close(loss, (2 * losses[0] + 2 * losses[1] + losses[2]) / 5)


def test_gradients_reach_every_weight() -> None:
    model = make_vlm().train()

    model(draw_pixels(4), **make_batch()).loss.backward()

    without_gradient = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().sum() > 0:
            without_gradient.append(name)
    assert without_gradient == []


class TestRefusals:
    inputs = draw_text(rows=1, length=4)
    wrist = draw_pixels(1)["wrist"]

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ({"wrst": wrist}, r"unknown view 'wrst'\. Did you mean 'wrist'\?"),
            ({"wrist": wrist / 255}, r"'wrist' is torch\.float32"),
            ({"wrist": wrist[:, :1]}, "Pass uint8 tensors"),
            ({}, "there are no images"),
        ],
    )
    def test_of_images(self, images: dict[str, torch.Tensor], message: str) -> None:
        refuses(message, make_vlm(), images, *self.inputs)

    def test_of_parts_of_patches(self) -> None:
        images = {"wrist": self.wrist[..., 1:]}  # without the first column
        model = make_vlm(stem="patch")  # with patches of 16 pixels
        refuses("is 31×32. Use multiples of", model, images, *self.inputs)

    def test_of_encoders_with_other_patches(self) -> None:
        moge = {**(TINY.moge or {}), "patch_size": 8}
        refuses("patch of SigLIP is 16, that of MoGe 8", make_vlm, moge=moge)

    def test_of_an_expert_that_does_not_fit_the_vlm(self) -> None:
        expert = {**TINY.expert, "head_dim": 4}
        refuses("head_dim of the action expert is 4, the VLM's is 8", make_spear1, expert=expert)

    def test_of_an_unknown_preset(self) -> None:
        refuses("Did you mean 'nano'", get_preset, "nanno")


@pytest.mark.parametrize(("log_scale_error", "shape_error"), [(0, 0), (0.3, 0), (-0.3, 0.2)])
def test_the_depth_loss_is_that_of_shape_and_of_scale(
    log_scale_error: float, shape_error: float
) -> None:
    """The head predicts the same 16 log depths for each patch, because its weight is 0.

    A patch of 16 pixels has 4 × 4 cells of 4 pixels. The true depth differs from the prediction by
    a factor, and by an error that alternates between cells. Some true depths are unknown.
    """
    config = MogeDepthConfig(moge_config=build_vlm_config(TINY).moge_config, cells=4)
    model = MogeForDepth(config)
    log_depth = torch.linspace(-1, 1, 16)  # of the cells of a patch
    alternating = torch.tensor([1.0, -1]).repeat(8)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = log_depth + log_scale_error + shape_error * alternating
    patch_depth = log_depth.view(4, 4).kron(torch.ones(4, 4)).exp()  # [16, 16] pixels
    depth = patch_depth.repeat(3, 2, 3)  # 3 images of 2 × 3 patches
    # Unknown depths: two whole cells, half of each cell in the second row of cells, and one pixel.
    depth[:, :4, :8] = math.inf
    depth[:, 4:6] = 0
    depth[:, 30, 1] = math.nan

    loss = model(draw_pixels(3)["external"], depth).loss.item()

    assert loss == pytest.approx(abs(log_scale_error) + shape_error, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "vlm_billions", "total_billions"),
    [("spear1", 3.24, 3.55), ("small", 0.32, 0.38), ("nano", 0.01, 0.01)],
)
def test_presets_have_their_stated_size(
    name: str, vlm_billions: float, total_billions: float
) -> None:
    """The size of spear1 is the paper's."""
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(get_preset(name)))

    assert next(model.parameters()).is_meta
    num_vlm = sum(parameter.numel() for parameter in model.vlm.parameters())
    num_total = sum(parameter.numel() for parameter in model.parameters())
    assert num_vlm / 1e9 == pytest.approx(vlm_billions, abs=0.01)
    assert num_total / 1e9 == pytest.approx(total_billions, abs=0.01)


@pytest.mark.parametrize("name", ["spear1", "small", "nano"])
def test_images_of_presets_are_whole_patches(name: str) -> None:
    preset = get_preset(name)
    patch = preset.vision["patch_size"]
    for width, height in preset.image_sizes.values():
        assert width % patch == 0
        assert height % patch == 0


class TestLossOfSeveralTexts:
    @pytest.fixture
    def single_group(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and the gradients of all texts in one group."""
        model = make_vlm()
        loss = model(draw_pixels(4), **make_batch()).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return loss.detach(), gradients

    @pytest.mark.parametrize("length_groups", [2, 3, 9])
    def test_does_not_depend_on_groups_of_similar_length(
        self, single_group: tuple[torch.Tensor, dict[str, Any]], length_groups: int
    ) -> None:
        model = make_vlm()
        inputs = make_batch()
        lengths = inputs["attention_mask"].sum(1)
        assert len(lengths.unique()) > 1
        expected_loss, expected_gradients = single_group

        loss = model(draw_pixels(4), **inputs, length_groups=length_groups).loss
        loss.backward()

        torch.testing.assert_close(loss.detach(), expected_loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, expected_gradients[name], atol=1e-5, rtol=1e-3
            )

    def test_does_not_depend_on_the_side_of_the_padding(
        self, single_group: tuple[torch.Tensor, dict[str, Any]]
    ) -> None:
        inputs = make_batch()
        mask = inputs["attention_mask"]
        # The padding of ids, labels and of the mask itself moves from the right to the left.
        left_padded = {name: to_left_padded(tensor, mask)[0] for name, tensor in inputs.items()}

        loss = make_vlm()(draw_pixels(4), **left_padded, length_groups=3).loss

        expected_loss, _ = single_group
        torch.testing.assert_close(loss.detach(), expected_loss)

    def test_takes_tokens_with_labels_as_the_answer(
        self, single_group: tuple[torch.Tensor, dict[str, Any]]
    ) -> None:
        """Without `token_type_ids`, the tokens that have labels are the answer.

        A token of the answer sees only the tokens before it. If the tokens counted as a part of the
        prompt, all would see each other, and the loss would differ.
        """
        inputs = make_batch()
        del inputs["token_type_ids"]

        loss = make_vlm()(draw_pixels(4), **inputs).loss

        expected_loss, _ = single_group
        torch.testing.assert_close(loss.detach(), expected_loss)

    def test_of_texts_that_share_an_image_is_that_of_texts_with_copies_of_it(self) -> None:
        model = make_vlm()
        inputs = make_batch()
        images = draw_pixels(2)
        image_index = torch.tensor([1, 0, 1, 1])
        copies = {view: image[image_index] for view, image in images.items()}

        shared = model(images, image_index=image_index, **inputs, length_groups=2).loss

        torch.testing.assert_close(shared, model(copies, **inputs).loss)
