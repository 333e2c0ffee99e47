"""`guess_weight_roles` finds what weights under unknown names may be, here in `nano`'s SPEAR-1."""

import tomllib

import torch

from spear.models.presets import PRESETS, build_spear1_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.name_rules import read_name_rules
from spear.models.weights.roles import (
    format_mapping,
    group_weights,
    guess_weight_roles,
    insert_numbers,
    mask_numbers,
)


def list_shapes(preset: str = "nano") -> dict[str, tuple[int, ...]]:
    """Name -> shape of each weight of the policy."""
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(PRESETS[preset]))
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

    roles = guess_weight_roles(stored, "nano")

    role = next(r for r in roles if r.group.name == "policy.blocks.*.mlp.up_proj.weight")
    assert role.evidence == "name and shape"
    assert [candidate.name for candidate in role.candidates] == [
        "expert.layers.*.mlp.up_proj.weight"
    ]


def test_a_name_that_says_nothing_is_recognized_by_a_shape_that_occurs_once() -> None:
    shape = list_shapes()["action_time_mlp_in.weight"]

    (role,) = guess_weight_roles({"w17": shape}, "nano")

    assert role.evidence == "shape"
    assert [candidate.name for candidate in role.candidates] == ["action_time_mlp_in.weight"]


def test_of_several_candidates_those_with_as_many_layers_remain() -> None:
    """Norms of the language model have the shape of other vectors, but there are five layers."""
    shapes = list_shapes()
    norm = shapes["vlm.language_model.layers.0.input_layernorm.weight"]

    (role,) = guess_weight_roles({f"n.{layer}.g": norm for layer in range(5)}, "nano")

    assert role.evidence == "shape"
    assert {candidate.count for candidate in role.candidates} == {5}


def test_a_known_name_with_another_shape_is_recognized_by_its_name() -> None:
    (role,) = guess_weight_roles({"model.state_proj.weight": (160, 32)}, "nano")

    assert role.evidence == "name"
    assert [candidate.name for candidate in role.candidates] == ["state_proj.weight"]


def test_an_unknown_name_and_shape_have_no_role() -> None:
    (role,) = guess_weight_roles({"memory.weight": (7, 7, 7)}, "nano")

    assert role.evidence == ""
    assert role.candidates == ()


STACKS = {
    "vlm.vision_tower.encoder.layers.": "a.",
    "vlm.moge.backbone.encoder.layer.": "b.",
    "vlm.language_model.layers.": "c.",
    "expert.layers.": "d.",
}
"""Beginning of the names of a stack's weights -> a beginning that says nothing."""


def disguise_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Give weights names that say nothing but which of them belong to one stack and layer."""
    disguised = {}
    numbers: dict[str, int] = {}  # the end of a name, after stack and layer -> a number
    for name, shape in shapes.items():
        stack = next((stack for stack in STACKS if name.startswith(stack)), None)
        if stack is None:
            disguised[f"x{len(disguised)}"] = shape
            continue
        layer, _, end_of_name = name.removeprefix(stack).partition(".")
        number = numbers.setdefault(end_of_name, len(numbers))
        disguised[f"{STACKS[stack]}{layer}.w_{number}"] = shape
    return disguised


def test_names_that_say_nothing_are_placed_by_the_shapes_of_their_stack_at_full_size() -> None:
    """All four stacks are found, which have 27, 24, 18 and 18 layers, and in them each weight whose
    shape occurs once per layer."""
    roles = guess_weight_roles(disguise_names(list_shapes("spear1")), "spear1")

    by_position = [role for role in roles if role.evidence == "shape and position"]
    stacks = {role.candidates[0].name.split("layer")[0] for role in by_position}
    assert stacks == {
        "vlm.vision_tower.encoder.",
        "vlm.moge.backbone.encoder.",
        "vlm.language_model.",
        "expert.",
    }
    # The expert has 18 layers of width 1,024, with MLPs of width 4,096.
    down = next(r for r in by_position if r.group.shape == (1024, 4096) and r.group.count == 18)
    assert [candidate.name for candidate in down.candidates] == [
        "expert.layers.*.mlp.down_proj.weight"
    ]


def test_a_shape_that_two_stacks_have_is_placed_by_the_other_shapes_of_its_stack() -> None:
    """MoGe's fc2 and the expert's down_proj are both 1024 × 4096 at full size."""
    shapes = disguise_names(list_shapes("spear1"))

    roles = guess_weight_roles(shapes, "spear1")

    named = [role for role in roles if role.group.shape == (1024, 4096)]
    assert {role.candidates[0].name for role in named if role.is_settled} == {
        "vlm.moge.backbone.encoder.layer.*.mlp.fc2.weight",
        "expert.layers.*.mlp.down_proj.weight",
    }


def test_queries_keys_and_values_in_one_weight_are_recognized() -> None:
    """MoGe's own files, and those of some authors, join the three."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in list_shapes().items():
        if "moge" not in name:
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            shape = (3 * shape[0], *shape[1:])
        shapes[name.replace("q_proj", "qkv").replace("vlm.moge.backbone.encoder", "enc")] = shape

    roles = guess_weight_roles(shapes, "nano")

    joined = next(role for role in roles if role.group.name.endswith("qkv.weight"))
    assert joined.evidence == "joined shapes and position"
    assert [group.name.split(".")[-2] for group in joined.candidates] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert not joined.is_settled


def test_rules_for_names_are_applied_before_names_are_compared() -> None:
    shapes = {}
    for name, shape in list_shapes().items():
        renamed = name.replace("expert.", "paligemma_with_expert.gemma_expert.model.")
        shapes[renamed] = shape

    roles = guess_weight_roles(shapes, "nano", read_name_rules("spear1_franka").renamed)

    assert all(role.is_settled for role in roles)


def test_a_candidate_gets_the_number_of_the_weights_layer() -> None:
    assert insert_numbers("expert.layers.*.norm", "blocks.17.n") == "expert.layers.17.norm"
    assert mask_numbers("blocks.17.n") == "blocks.*.n"


def test_the_first_mapping_is_unverified_and_says_what_is_open() -> None:
    shapes = disguise_names(list_shapes())
    shapes['odd "name"'] = (7, 7, 7)

    mapping = tomllib.loads(format_mapping(guess_weight_roles(shapes, "nano"), "./spear1"))

    assert mapping["verified"] is False
    assert "action_time_mlp_in.weight" in mapping["settled"].values()
    # Nothing but names could tell keys from values.
    keys_or_values = [names for names in mapping["open"].values() if len(names) == 2]
    assert any(names[0].endswith("k_proj.weight") for names in keys_or_values)
    assert mapping["unknown"] == {'odd "name"': [7, 7, 7]}


def test_names_that_differ_only_in_numbers_but_not_in_shape_are_mapped_one_by_one() -> None:
    """The convolutions of nano's image encoders have numbers, and a shape each."""
    mapping = tomllib.loads(format_mapping(guess_weight_roles(list_shapes(), "nano"), "./nano"))

    name = "vlm.vision_tower.embeddings.patch_embedding.convs.1.weight"
    assert mapping["settled"][name] == name
