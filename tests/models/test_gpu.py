"""The fast paths on a GPU: CUDA graphs and compiled layers give what the plain network gives there."""

import pytest
import torch

from models_tiny import START, TINY, actions, pixels, reference, spear1, text, vlm
from refusals import no_warning
from spear import flow
from spear.models.decode import decode_greedily, get_layer_stack
from spear.models.fast.stack import can_compile
from spear.types import Action

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
H = TINY.horizon


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_actions_from_graphs(dtype: torch.dtype, most: float) -> None:
    model = spear1().to("cuda", dtype)
    with no_warning():  # a graph that cannot be recorded is said by a warning
        for batch, padded in ((1, False), (3, True), (1, False), (3, True)):
            ids, mask = (x.cuda() for x in text(batch, 6))
            images = {view: image.cuda() for view, image in pixels(batch).items()}
            state = torch.randn(batch, 10, device="cuda")
            noise = Action.from_vector(actions(batch, H).to_vector().cuda())
            masks, held = (
                mask if padded else None,
                torch.arange(H, device="cuda").expand(batch, H) < 2,
            )
            begun = (
                flow.CommittedPrefix(actions(batch, H, seed=5).to("cuda"), held) if padded else None
            )
            given = {
                "pixel_values": images,
                "input_ids": ids,
                "attention_mask": masks,
                "state": state,
            }
            how = {"steps": 4, "noise": noise, "committed": begun}
            found = model.sample_actions(**given, **how).to_vector()
            plain = reference(model, given, **how)
            assert float((found - plain).abs().max() / plain.abs().max()) < most


def test_answers_from_graphs() -> None:
    model = vlm()
    number = (START, START + TINY.bins)
    ids, mask = text(3, 6)
    images, grammar = pixels(3, views=("external",)), [number, (7, 8), number]
    on_cpu = decode_greedily(model, images, ids, mask, max_new_tokens=8, grammar=grammar)
    model.cuda()
    moved = {view: image.cuda() for view, image in images.items()}
    with no_warning():
        for _ in range(2):
            found = decode_greedily(
                model, moved, ids.cuda(), mask.cuda(), max_new_tokens=8, grammar=grammar
            )
            assert torch.equal(found.cpu(), on_cpu)
    assert decode_greedily(model, moved, ids.cuda(), mask.cuda(), max_new_tokens=12).shape[1] <= 12
    assert (
        len(get_layer_stack(model.language_model, True, can_compile(model.device)).replay._graphs)
        == 1
    )
