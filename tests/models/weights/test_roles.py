"""`guess_roles` finds what weights under unknown names may be. The SPEAR-1 here is `nano`'s."""

import torch

from spear.models.presets import PRESETS, build_spear1_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.roles import group_weights, guess_roles


def list_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of each weight of the policy."""
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(PRESETS["nano"]))
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_weights_of_all_layers_are_one_group() -> None:
    shapes = {"h.0.fc.weight": (4, 2), "h.1.fc.weight": (4, 2), "head.weight": (4, 2)}

    groups = group_weights(shapes)

    assert [(group.name, group.count) for group in groups] == [
        ("h.*.fc.weight", 2),
        ("head.weight", 1),
    ]


def test_other_prefixes_are_recognized_by_the_ends_of_names() -> None:
    stored = {}
    for name, shape in list_shapes().items():
        stored[name.replace("vlm.", "backbone.").replace("expert.layers.", "policy.blocks.")] = (
            shape
        )

    roles = guess_roles(stored, "nano")

    role = next(r for r in roles if r.group.name == "policy.blocks.*.mlp.up_proj.weight")
    assert role.evidence == "name and shape"
    assert [candidate.name for candidate in role.candidates] == [
        "expert.layers.*.mlp.up_proj.weight"
    ]


def test_a_name_that_says_nothing_is_recognized_by_a_shape_that_occurs_once() -> None:
    shape = list_shapes()["action_time_mlp_in.weight"]

    (role,) = guess_roles({"w17": shape}, "nano")

    assert role.evidence == "shape"
    assert [candidate.name for candidate in role.candidates] == ["action_time_mlp_in.weight"]


def test_of_several_candidates_those_with_as_many_layers_remain() -> None:
    """Norms of the language model have the shape of other vectors, but there are five layers."""
    shapes = list_shapes()
    norm = shapes["vlm.language_model.layers.0.input_layernorm.weight"]

    (role,) = guess_roles({f"n.{layer}.g": norm for layer in range(5)}, "nano")

    assert role.evidence == "shape"
    assert {candidate.count for candidate in role.candidates} == {5}


def test_a_known_name_with_another_shape_is_recognized_by_its_name() -> None:
    (role,) = guess_roles({"model.state_proj.weight": (160, 32)}, "nano")

    assert role.evidence == "name"
    assert [candidate.name for candidate in role.candidates] == ["state_proj.weight"]


def test_an_unknown_name_and_shape_have_no_role() -> None:
    (role,) = guess_roles({"memory.weight": (7, 7, 7)}, "nano")

    assert role.evidence == ""
    assert role.candidates == ()
