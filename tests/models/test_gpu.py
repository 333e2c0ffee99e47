"""On a GPU, CUDA graphs and compiled layers give the results of the plain network.

The plain network is the network as it is trained: `sample_by_reference` runs it step by step.
"""

import pytest
import torch

from models_tiny import (
    FIRST_COORDINATE_ID,
    TINY,
    draw_actions,
    draw_pixels,
    draw_text,
    make_spear1,
    make_vlm,
    sample_by_reference,
)
from parity import relative_error
from refusals import no_warning
from spear import flow
from spear.models.decode import decode_greedily, get_layer_stack
from spear.models.fast.stack import can_compile
from spear.models.spear1 import NUM_STATE_FEATURES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
H = TINY.horizon
NUMBER = (FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + TINY.bins)  # the range of 3D tokens' ids


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_actions_from_graphs_are_those_of_the_plain_network(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Two kinds of inputs are each sampled twice: the graph is recorded, then replayed."""
    model = make_spear1().to("cuda", dtype)
    with no_warning():  # a notice would say that a graph cannot be recorded
        for batch, padded in ((1, False), (3, True), (1, False), (3, True)):
            ids, mask = draw_text(rows=batch, length=6)
            inputs = {
                "pixel_values": {view: image.cuda() for view, image in draw_pixels(batch).items()},
                "input_ids": ids.cuda(),
                "attention_mask": mask.cuda() if padded else None,
                "state": torch.randn(batch, NUM_STATE_FEATURES, device="cuda"),
            }
            noise = draw_actions(batch, H).to("cuda")
            committed = None
            if padded:
                is_committed = torch.arange(H, device="cuda").expand(batch, H) < 2
                committed_actions = draw_actions(batch, H, seed=5).to("cuda")
                committed = flow.CommittedPrefix(committed_actions, is_committed)

            sampled = model.sample_actions(**inputs, steps=4, noise=noise, committed=committed)

            expected = sample_by_reference(model, inputs, steps=4, noise=noise, committed=committed)
            assert relative_error(sampled.to_vector(), expected) < tolerance


def test_answers_from_graphs_are_those_of_the_cpu() -> None:
    """The answers are decoded twice on the GPU: the graph is recorded, then replayed."""
    model = make_vlm()
    ids, mask = draw_text(rows=3, length=6)
    images = draw_pixels(3, views=("external",))
    grammar = [NUMBER, (7, 8), NUMBER]
    on_cpu = decode_greedily(model, images, ids, mask, max_new_tokens=8, grammar=grammar)

    model.cuda()
    images = {view: image.cuda() for view, image in images.items()}
    with no_warning():
        for _ in range(2):
            on_gpu = decode_greedily(
                model, images, ids.cuda(), mask.cuda(), max_new_tokens=8, grammar=grammar
            )
            assert torch.equal(on_gpu.cpu(), on_cpu)


def test_only_answers_of_a_known_length_are_recorded_as_a_graph() -> None:
    """An answer whose grammar is a sequence is recorded, free text is not."""
    model = make_vlm().cuda()
    ids, mask = draw_text(rows=3, length=6)
    ids = ids.cuda()
    mask = mask.cuda()
    images = {view: image.cuda() for view, image in draw_pixels(3, views=("external",)).items()}

    decode_greedily(model, images, ids, mask, max_new_tokens=8, grammar=[NUMBER, (7, 8), NUMBER])
    free_text = decode_greedily(model, images, ids, mask, max_new_tokens=12)

    assert free_text.shape[1] <= 12  # tokens
    packed = True
    stack = get_layer_stack(model.language_model, packed, can_compile(model.device))
    assert len(stack.run_as_graph._graphs) == 1
