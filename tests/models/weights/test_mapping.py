"""A SPEAR-1 whose weights have other names is loaded by a mapping file.

The SPEAR-1 here is tiny and has random weights. The tests rename its weights, and load them again.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from published_checkpoints import TINY14, make_paligemma, publish_paligemma
from refusals import refuses
from spear.models.presets import build_spear1_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.mapping import AUTHORS_MAPPING, plan_mapped, read_mapping
from spear.models.weights.roles import format_mapping, guess_weight_roles

OPAQUE_PREFIXES = {
    "vlm.vision_tower.encoder.layers.": "a.",
    "vlm.moge.backbone.encoder.layer.": "b.",
    "vlm.language_model.layers.": "c.",
    "expert.layers.": "d.",
}
"""Beginning of our names of the weights of a stack of layers -> one that says nothing."""

# Registers the preset "tiny14".
pytestmark = pytest.mark.usefixtures("tiny_published_presets")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The weights of a tiny SPEAR-1 by our names."""
    torch.manual_seed(0)
    model = Spear1ForActionPrediction(build_spear1_config(TINY14))
    return {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}


def save(weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Write a checkpoint that has nothing but weights."""
    folder.mkdir()
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors")
    return folder


def save_mapping(path: Path, text: str = "", **tables: Any) -> Path:
    """Write a mapping file of these tables."""
    lines = [text]
    for table_name, table in tables.items():
        lines.append(f"[{table_name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    path.write_text("\n".join(lines))
    return path


def assert_same_weights(model: Any, expected: Mapping[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name


def make_names_opaque(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map our names to names that say only which weights belong to one layer of one stack."""
    opaque_names = {}
    numbers: dict[str, int] = {}  # the end of a name, after stack and layer -> a number
    for name in weights:
        stack = next((prefix for prefix in OPAQUE_PREFIXES if name.startswith(prefix)), None)
        if stack is None:
            opaque_names[name] = f"x{len(opaque_names)}"
            continue
        layer, _, end_of_name = name.removeprefix(stack).partition(".")
        number = numbers.setdefault(end_of_name, len(numbers))
        opaque_names[name] = f"{OPAQUE_PREFIXES[stack]}{layer}.w_{number}"
    return opaque_names


def choose_open_names(mapping: dict[str, Any], opaque_names: Mapping[str, str]) -> None:
    """Choose for every open name, as somebody does who knows the program that saved the weights."""
    our_names = {opaque: name for name, opaque in opaque_names.items()}
    for pattern in list(mapping.pop("open")):
        first_name = pattern.replace("*", "0", 1)
        our_name = our_names[first_name]
        if "*" in pattern:
            stack = next(prefix for prefix in OPAQUE_PREFIXES if our_name.startswith(prefix))
            our_name = f"{stack}*{our_name.removeprefix(f'{stack}0')}"
        mapping["settled"][pattern] = our_name


class TestRoundTrip:
    """Every weight comes back, bit for bit."""

    def test_by_the_file_that_roles_writes_once_its_open_names_are_chosen(
        self, weights: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        opaque_names = make_names_opaque(weights)
        renamed = {opaque_names[name]: weight for name, weight in weights.items()}
        folder = save(renamed, tmp_path / "theirs")
        shapes = {name: tuple(weight.shape) for name, weight in renamed.items()}
        mapping = tomllib.loads(format_mapping(guess_weight_roles(shapes, "tiny14"), "theirs"))
        choose_open_names(mapping, opaque_names)
        del mapping["verified"]
        file = save_mapping(tmp_path / "names.toml", **mapping)

        model = plan_mapped(folder, file, "tiny14").run()

        assert_same_weights(model, weights)

    def test_by_the_authors_mapping(self, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """The names are those that its rules expect, those of openpi's π0."""
        renamed = {}
        for name, weight in weights.items():
            their_name = name
            if name.startswith("vlm."):
                their_name = (
                    f"model.paligemma_with_expert.paligemma.model.{name.removeprefix('vlm.')}"
                )
            if name.startswith("expert."):
                inner_name = name.removeprefix("expert.")
                their_name = f"model.paligemma_with_expert.gemma_expert.model.{inner_name}"
            renamed[their_name] = weight
        renamed["normalize_inputs.mean"] = torch.zeros(8)
        folder = save(renamed, tmp_path / "theirs")

        plan = plan_mapped(folder, AUTHORS_MAPPING, "tiny14")

        assert_same_weights(plan.run(), weights)
        left_out = plan.report.select_by_status("left out")
        assert [entry.name for entry in left_out] == ["normalize_inputs.mean"]

    def test_of_queries_keys_and_values_that_are_joined(
        self, weights: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        """MoGe's own files have the three in one weight, row after row."""
        renamed = dict(weights)
        attention = "vlm.moge.backbone.encoder.layer.{}.attention"
        projections = ("q_proj", "k_proj", "v_proj")
        assert TINY14.moge is not None
        for layer in range(TINY14.moge["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                names = [
                    f"{attention.format(layer)}.{projection}.{kind}" for projection in projections
                ]
                rows = [renamed.pop(name) for name in names]
                renamed[f"enc.{layer}.qkv.{kind}"] = torch.cat(rows)
        folder = save(renamed, tmp_path / "theirs")
        joined = {}
        for kind in ("weight", "bias"):
            joined[f"enc.*.qkv.{kind}"] = [
                f"{attention.format('*')}.{projection}.{kind}" for projection in projections
            ]
        file = save_mapping(tmp_path / "names.toml", joined=joined)

        model = plan_mapped(folder, file, "tiny14").run()

        assert_same_weights(model, weights)


def test_a_tokenizer_gets_the_3d_tokens(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = save(weights, tmp_path / "theirs")
    tokenizer = publish_paligemma(make_paligemma(), tmp_path / "paligemma")

    plan = plan_mapped(folder, None, "tiny14", tokenizer)

    first_id = plan.config.vlm_config.coordinate_start
    assert plan.tokenizer.convert_tokens_to_ids("<3d0000>") == first_id


class TestIsRefused:
    @pytest.fixture
    def folder(self, weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
        """A checkpoint with our names."""
        return save(weights, tmp_path / "theirs")

    def test_a_missing_weight(self, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
        del weights["state_proj.bias"]
        folder = save(weights, tmp_path / "theirs")

        plan = plan_mapped(folder, None, "tiny14")

        refuses("1 weight missing, first state_proj.bias", plan.run)

    def test_an_unknown_weight(self, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
        folder = save({**weights, "memory.weight": torch.ones(2)}, tmp_path / "theirs")

        plan = plan_mapped(folder, None, "tiny14")

        refuses("1 weight refused, first memory.weight", plan.run)

    def test_a_joined_weight_of_another_shape(
        self, weights: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        del weights["action_in_proj.bias"]
        folder = save(weights, tmp_path / "theirs")
        joined = {"state_proj.bias": ["state_proj.bias", "action_in_proj.bias"]}
        file = save_mapping(tmp_path / "names.toml", joined=joined)

        plan = plan_mapped(folder, file, "tiny14")

        refuses("state_proj.bias .*joined ours are", plan.run)

    def test_a_joined_weight_of_names_that_are_not_ours(self, folder: Path, tmp_path: Path) -> None:
        joined = {"state_proj.bias": ["state.bias", "more.bias"]}
        file = save_mapping(tmp_path / "names.toml", joined=joined)

        plan = plan_mapped(folder, file, "tiny14")

        refuses("SPEAR-1 has no state.bias", plan.run)

    def test_two_weights_of_one_name(self, folder: Path, tmp_path: Path) -> None:
        settled = {"action_in_proj.bias": "state_proj.bias"}
        file = save_mapping(tmp_path / "names.toml", settled=settled)

        refuses("are both state_proj.bias", plan_mapped, folder, file, "tiny14")

    def test_an_open_choice(self, tmp_path: Path) -> None:
        choices = {"c.*.w_7": ["vlm.k_proj", "vlm.v_proj"]}
        file = save_mapping(tmp_path / "names.toml", open=choices)

        refuses(r"1 name open, first c\.\*\.w_7 \(vlm.k_proj or vlm.v_proj\)", read_mapping, file)

    def test_a_misspelled_table(self, tmp_path: Path) -> None:
        file = save_mapping(tmp_path / "names.toml", setled={"a": "b"})

        refuses("'settled'", read_mapping, file)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("settled = 3", "settled"),
            ("renamed = [['model.']]", "renamed"),
            ("[settled", "Expected"),
        ],
    )
    def test_a_broken_file(self, text: str, reason: str, tmp_path: Path) -> None:
        file = save_mapping(tmp_path / "names.toml", text)

        refuses(f"is no mapping of names .*{reason}", read_mapping, file)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        refuses("No such file", read_mapping, tmp_path / "names.toml")

    def test_a_tokenizer_of_another_size(self, folder: Path, tmp_path: Path) -> None:
        tokenizer = publish_paligemma(make_paligemma(), tmp_path / "paligemma")
        config_file = tokenizer / "tokenizer.json"
        content = json.loads(config_file.read_text())
        last_token = content["added_tokens"][-1]
        content["added_tokens"].append({**last_token, "id": last_token["id"] + 1, "content": "<x>"})
        config_file.write_text(json.dumps(content))

        refuses("as token", plan_mapped, folder, None, "tiny14", tokenizer)
