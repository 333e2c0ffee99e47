"""A whole π0 becomes a SPEAR-1 that computes the same, before any training.

The published folders here are tiny, with random weights (`published_checkpoints`).
`plan_pi0(pi0, moge, "tiny14")` converts a π0 and a MoGe. The preset "linear14" has π0's flow.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PI0ForConditionalGeneration as Pi0

from data_tiny import edit_json
from models_tiny import TINY
from parity import (
    BATCH,
    Pi0Inputs,
    draw_pi0_inputs,
    predict_velocities_of_both,
    relative_error,
    sample_actions_of_both,
)
from published_checkpoints import (
    IMAGE_TOKEN,
    NUM_PUBLISHED_TOKENS,
    PI0_LAYOUTS,
    TINY14,
    make_paligemma,
    make_pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
    publish_pi05,
)
from refusals import refuses
from spear.models.layers import KVCache
from spear.models.weights.action_expert import plan_policy
from spear.models.weights.load import StoredCheckpoint
from spear.models.weights.pi0_policy import plan_pi0
from spear.types import ACTION_DIM, Action

MAX_ERROR = 1e-5  # relative to the largest value
EMBEDDINGS = "vlm.language_model.embed_tokens.weight"
ROBOT_LAYERS = {
    "state_proj.weight",
    "state_proj.bias",
    "action_in_proj.weight",
    "action_in_proj.bias",
    "action_out_proj.weight",
    "action_out_proj.bias",
}
NEW_EMBEDDINGS = f"{EMBEDDINGS}[{NUM_PUBLISHED_TOKENS}:{NUM_PUBLISHED_TOKENS + TINY14.bins}]"
NEW_WEIGHTS = {
    NEW_EMBEDDINGS,
    "vlm.moge_projector.linear.weight",
    "vlm.moge_projector.linear.bias",
}


# Registers the presets "tiny14" and "linear14".
pytestmark = pytest.mark.usefixtures("tiny_published_presets")


@pytest.fixture(scope="module")
def moge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_moge(tmp_path_factory.mktemp("moge") / "model.pt")


@pytest.fixture(scope="module")
def published_pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A π0 in LeRobot's layout, whose states and actions have 32 numbers, as published."""
    return publish_pi0(make_pi0(state_dim=32, action_dim=32), tmp_path_factory.mktemp("pi0"))


@pytest.fixture
def pi0_folder(published_pi0: Path, tmp_path: Path) -> Path:
    """A copy of `published_pi0`, which a test may change."""
    return shutil.copytree(published_pi0, tmp_path / "pi0")


# --- The same results ---


def compute_prefix_of_pi0(their_model: Any, their_inputs: dict[str, Any]) -> Any:
    """Return the keys and values that π0's VLM computes of images and text."""
    mask = their_inputs["attention_mask"]
    embeddings = their_model.model.embed_prefix(
        their_inputs["input_ids"],
        their_inputs["pixel_values"],
        their_inputs["pixel_attention_mask"],
    )
    output = their_model.model.vlm(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
        use_cache=True,
    )
    return output.cache


def record_hidden_states(expert: Any) -> list[torch.Tensor]:
    """Return a list to which each layer of the expert, and its last norm, adds its output."""
    outputs: list[torch.Tensor] = []

    def record(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for module in [*expert.layers, expert.norm]:
        module.register_forward_hook(record)
    return outputs


class TestParityWithTransformers:
    """Same weights and inputs, same results. States and actions have our sizes here."""

    @pytest.fixture(scope="class", params=PI0_LAYOUTS)
    def layout(self, request: pytest.FixtureRequest) -> str:
        """Where the names of weights in the published folder are from."""
        return request.param

    @pytest.fixture(scope="class")
    def models(
        self, tmp_path_factory: pytest.TempPathFactory, moge: Path, layout: str
    ) -> tuple[Any, Any]:
        """The SPEAR-1, with a MoGe, and the π0."""
        their_model = make_pi0()
        folder = publish_pi0(their_model, tmp_path_factory.mktemp("pi0"), layout)
        return plan_pi0(folder, moge, "linear14").run(), their_model

    @pytest.fixture
    def inputs(self) -> Pi0Inputs:
        return draw_pi0_inputs(IMAGE_TOKEN)

    @torch.no_grad()
    def test_keys_and_values_of_the_prefix(
        self, models: tuple[Any, Any], inputs: Pi0Inputs
    ) -> None:
        our_model, their_model = models
        our_inputs, their_inputs = inputs

        expected = compute_prefix_of_pi0(their_model, their_inputs)
        cache = our_model.encode_prefix(**our_inputs).cache

        is_valid = their_inputs["attention_mask"].bool()  # keys of padding are never read
        num_layers = TINY.text["num_hidden_layers"]
        assert len(cache.keys) == num_layers
        for layer in range(num_layers):
            pairs = (
                (cache.keys[layer], expected.layers[layer].keys),
                (cache.values[layer], expected.layers[layer].values),
            )
            for our_vectors, their_vectors in pairs:
                our_valid = our_vectors.transpose(1, 2)[is_valid]
                their_valid = their_vectors.transpose(1, 2)[is_valid]
                assert relative_error(our_valid, their_valid) < MAX_ERROR

    @torch.no_grad()
    def test_hidden_states_of_the_expert_and_velocities(
        self, models: tuple[Any, Any], inputs: Pi0Inputs
    ) -> None:
        our_model, their_model = models
        their_hidden_states = record_hidden_states(their_model.model.dit)
        our_hidden_states = record_hidden_states(our_model.expert)

        our_velocity, their_velocity = predict_velocities_of_both(our_model, their_model, inputs)

        assert len(our_hidden_states) == TINY.expert["num_hidden_layers"] + 1
        for our_output, their_output in zip(our_hidden_states, their_hidden_states, strict=True):
            assert relative_error(our_output, their_output) < MAX_ERROR
        assert relative_error(our_velocity, their_velocity) < MAX_ERROR

    def test_sampled_actions(self, models: tuple[Any, Any], inputs: Pi0Inputs) -> None:
        ours, theirs = sample_actions_of_both(*models, inputs)

        assert relative_error(ours.translation, theirs.translation) < MAX_ERROR
        assert relative_error(ours.rotation, theirs.rotation) < MAX_ERROR
        assert relative_error(ours.gripper, theirs.gripper) < MAX_ERROR


def test_the_expert_of_a_pi0_with_wider_states_and_actions_computes_the_same(
    pi0_folder: Path, moge: Path
) -> None:
    """States and actions of this π₀ have 32 numbers, and ours have fewer.

    So our layers that turn them into tokens are new, and the experts of both models get the same
    random tokens here.
    """
    their_model = make_pi0(state_dim=32, action_dim=32)
    our_model = plan_pi0(pi0_folder, moge, "tiny14").run()
    our_inputs, their_inputs = draw_pi0_inputs(IMAGE_TOKEN)
    their_cache = compute_prefix_of_pi0(their_model, their_inputs)
    tokens = torch.randn(BATCH, 1 + TINY.horizon, TINY.expert["hidden_size"])
    num_tokens = tokens.shape[1]

    with torch.no_grad():
        expected = their_model.model(
            action_embeds=tokens, attention_mask=their_inputs["attention_mask"], cache=their_cache
        )
        prefix = our_model.encode_prefix(**our_inputs)
        hidden = run_expert(our_model, prefix, tokens)

    assert hidden.shape == (BATCH, num_tokens, TINY.expert["hidden_size"])
    assert relative_error(hidden, expected.last_hidden_state) < MAX_ERROR


def run_expert(model: Any, prefix: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run SPEAR-1's expert on tokens in place of the embedded state and actions."""
    # The first token stands for the state, the others for the actions.
    model.state_proj = torch.nn.Identity()
    model._embed_actions = lambda *_: tokens[:, None, 1:]  # [BATCH, 1 chunk, H, width]
    outputs = record_hidden_states(model.expert)
    noise = Action.from_vector(torch.zeros(BATCH, TINY.horizon, ACTION_DIM))
    model.state_proj.weight = torch.zeros(1)  # the type in which the model computes
    model.predict(prefix, tokens[:, 0], noise, torch.zeros(BATCH))
    return outputs[-1]


# --- MoGe changes nothing at first ---


class TestMogeJoins:
    @pytest.fixture
    def pixels(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        width, height = TINY14.image_sizes["external"]
        shape = (BATCH, 3, height, width)
        return {"external": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}

    def test_visual_tokens_are_those_without_it(
        self, pi0_folder: Path, moge: Path, pixels: dict[str, torch.Tensor]
    ) -> None:
        with_moge = plan_pi0(pi0_folder, moge, "tiny14").run()
        without_moge = plan_pi0(pi0_folder, None, "tiny14").run()

        tokens, _ = with_moge.vlm.encode_images(pixels)
        expected, _ = without_moge.vlm.encode_images(pixels)

        assert with_moge.vlm.moge is not None
        assert without_moge.vlm.moge is None
        assert torch.equal(tokens, expected)

    def test_its_projection_learns(
        self, pi0_folder: Path, moge: Path, pixels: dict[str, torch.Tensor]
    ) -> None:
        """A zero matrix has a gradient, because MoGe's features are not zero."""
        model = plan_pi0(pi0_folder, moge, "tiny14").run()

        tokens, _ = model.vlm.encode_images(pixels)
        tokens.square().sum().backward()

        weight = model.vlm.moge_projector.linear.weight
        assert not weight.any()
        assert weight.grad.abs().max() > 0

    def test_a_new_vlm_has_its_projection_at_random(self, tmp_path: Path, moge: Path) -> None:
        """`convert backbones` makes a VLM as the paper does, for a first stage of training."""
        from spear.models.weights.backbones import plan_backbones

        folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma")

        vlm = plan_backbones(folder, moge, "tiny14").run()

        assert vlm.moge_projector.linear.weight.any()


# --- What becomes of each weight ---


class TestReport:
    def test_has_every_stored_weight(self, pi0_folder: Path, moge: Path) -> None:
        report = plan_pi0(pi0_folder, moge, "tiny14").report

        # The note of a loaded weight is "SOURCE: published name, what is done to it".
        loaded_notes = [entry.note.split(": ")[1] for entry in report.select_by_status("loaded")]
        reported_names = {note.split(",")[0] for note in loaded_notes}
        reported_names |= {entry.name for entry in report.select_by_status("left out")}
        stored_names = set(StoredCheckpoint.open(pi0_folder, "π0").weights)
        assert stored_names <= reported_names
        assert report.select_by_status("missing", "refused") == []

    def test_has_every_weight_of_the_new_model(self, pi0_folder: Path, moge: Path) -> None:
        plan = plan_pi0(pi0_folder, moge, "tiny14")

        model = plan.run()

        # Rows of the embeddings are reported one by one, such as "….embed_tokens.weight[:40]".
        reported = plan.report.select_by_status("loaded", "new")
        assert {entry.name.split("[")[0] for entry in reported} == set(model.state_dict())

    def test_names_what_is_new(self, pi0_folder: Path, moge: Path) -> None:
        report = plan_pi0(pi0_folder, moge, "tiny14").report

        assert {
            entry.name for entry in report.select_by_status("new")
        } == NEW_WEIGHTS | ROBOT_LAYERS

    def test_with_our_sizes_only_the_3d_parts_are_new(self, tmp_path: Path, moge: Path) -> None:
        folder = publish_pi0(make_pi0(state_dim=10, action_dim=8), tmp_path / "pi0")

        report = plan_pi0(folder, moge, "tiny14").report

        assert {entry.name for entry in report.select_by_status("new")} == NEW_WEIGHTS

    def test_says_that_siglips_projection_is_doubled(self, pi0_folder: Path, moge: Path) -> None:
        report = plan_pi0(pi0_folder, moge, "tiny14").report

        doubled_names = {entry.name for entry in report.entries if "doubled" in entry.note}
        assert doubled_names == {
            "vlm.multi_modal_projector.linear.weight",
            "vlm.multi_modal_projector.linear.bias",
        }

    def test_without_moge_nothing_is_doubled(self, pi0_folder: Path) -> None:
        report = plan_pi0(pi0_folder, None, "tiny14").report

        assert not [entry for entry in report.entries if "doubled" in entry.note]


def test_3d_tokens_follow_the_tokens_of_paligemmas_tokenizer(
    pi0_folder: Path, tmp_path: Path
) -> None:
    tokenizer = publish_paligemma(make_paligemma(), tmp_path / "paligemma")

    plan = plan_pi0(pi0_folder, None, "tiny14", tokenizer)

    assert plan.tokenizer.convert_tokens_to_ids("<3d0000>") == NUM_PUBLISHED_TOKENS
    assert plan.config.vlm_config.coordinate_start == NUM_PUBLISHED_TOKENS


def test_of_a_tokenizer_on_the_hub_no_weights_are_downloaded(
    pi0_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma")
    downloads = []

    def download(name: str, **options: Any) -> str:
        downloads.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("spear.models.weights.load.check_hub_reachable_or_cached", lambda *_: None)

    plan = plan_pi0(pi0_folder, None, "tiny14", "google/paligemma-3b-pt-224")

    assert downloads == [("google/paligemma-3b-pt-224", ["*.json", "tokenizer.model", "*.jinja"])]
    assert plan.tokenizer is not None


def test_the_seed_changes_new_weights_only(pi0_folder: Path, moge: Path) -> None:
    plan = plan_pi0(pi0_folder, moge, "tiny14")

    first = plan.run(seed=0).state_dict()
    second = plan.run(seed=1).state_dict()

    changed_names = {name for name in first if not torch.equal(first[name], second[name])}
    # The other new weights, biases and MoGe's projection, are zero.
    random_names = {"state_proj.weight", "action_in_proj.weight", "action_out_proj.weight"}
    assert changed_names == {EMBEDDINGS, *random_names}


# --- π0.5 ---


class TestPi05:
    """Of a π0.5, the VLM is loaded, and of its expert the attention and the MLPs."""

    @pytest.fixture(scope="class", params=["lerobot", "openpi"])
    def folder(
        self, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
    ) -> Path:
        return publish_pi05(tmp_path_factory.mktemp("pi05"), request.param)

    @torch.no_grad()
    def test_its_vlm_computes_the_same_keys_and_values(self, folder: Path, moge: Path) -> None:
        their_model = make_pi0(state_dim=32, action_dim=32)  # with the VLM of the π0.5
        our_model = plan_pi0(folder, moge, "tiny14").run()
        our_inputs, their_inputs = draw_pi0_inputs(IMAGE_TOKEN)

        expected = compute_prefix_of_pi0(their_model, their_inputs)
        cache: KVCache = our_model.encode_prefix(**our_inputs).cache

        is_valid = their_inputs["attention_mask"].bool()
        for layer, keys in enumerate(cache.keys):
            keys_per_token = keys.transpose(1, 2)[is_valid]
            expected_per_token = expected.layers[layer].keys.transpose(1, 2)[is_valid]
            assert relative_error(keys_per_token, expected_per_token) < MAX_ERROR

    def test_attention_and_mlps_of_its_expert_are_loaded(self, folder: Path) -> None:
        published = make_pi0(state_dim=32, action_dim=32).model.dit

        expert = plan_pi0(folder, None, "tiny14").run().expert

        expected = published.state_dict()
        for name, weight in expert.state_dict().items():
            if "proj" in name:
                assert torch.equal(weight, expected[name]), name

    def test_norms_of_its_expert_begin_with_a_scale_of_1(self, folder: Path) -> None:
        expert = plan_pi0(folder, None, "tiny14").run().expert

        norms = [w for name, w in expert.state_dict().items() if name.endswith("norm.weight")]
        # There are two norms per layer, and one at the end.
        assert len(norms) == 2 * TINY.expert["num_hidden_layers"] + 1
        for weight in norms:
            assert not weight.any()  # Gemma's norms multiply by 1 + weight

    def test_names_what_is_new(self, folder: Path) -> None:
        report = plan_pi0(folder, None, "tiny14").report

        expected = {NEW_EMBEDDINGS, *ROBOT_LAYERS, "expert.norm.weight"}
        for layer in ("action_time_mlp_in", "action_time_mlp_out"):
            expected |= {f"{layer}.weight", f"{layer}.bias"}
        for index in range(TINY.expert["num_hidden_layers"]):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                expected.add(f"expert.layers.{index}.{norm}.weight")
        assert {entry.name for entry in report.select_by_status("new")} == expected

    def test_every_weight_that_is_not_used_has_a_reason(self, folder: Path) -> None:
        report = plan_pi0(folder, None, "tiny14").report

        assert report.select_by_status("missing", "refused") == []
        left_out = report.select_by_status("left out")
        reasons = {entry.name.removeprefix("model."): entry.note for entry in left_out}
        norm = "paligemma_with_expert.gemma_expert.model.layers.1.input_layernorm.dense.weight"
        assert reasons[norm].startswith("adaRMS")
        assert reasons["time_mlp_in.bias"].startswith("adaRMS")
        assert reasons["action_out_proj.bias"] == "its states and actions mean other numbers"

    def test_its_expert_joins_a_spear_vlm(self, folder: Path, tmp_path: Path) -> None:
        from spear.models.spear1 import load_inner_vlm

        plan_pi0(folder, None, "tiny14").save(tmp_path / "policy")
        load_inner_vlm(tmp_path / "policy").save_pretrained(tmp_path / "vlm")

        report = plan_policy(tmp_path / "vlm", folder, "tiny14").report

        report.check("")  # raises SpearError if a weight is missing or refused
        assert "expert.norm.weight" in {entry.name for entry in report.select_by_status("new")}


# --- Refusals ---


class TestWrongCheckpointsAreRefused:
    def remove_weights(self, folder: Path, name_part: str) -> None:
        """Remove the weights whose names contain `name_part`."""
        file = folder / "model.safetensors"
        weights = load_file(file)
        save_file({name: w for name, w in weights.items() if name_part not in name}, file)

    def test_a_paligemma(self, tmp_path: Path) -> None:
        folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma")

        refuses("contains no action expert", plan_pi0, folder, None, "tiny14")

    def test_an_expert_without_its_vlm(self, pi0_folder: Path) -> None:
        self.remove_weights(pi0_folder, ".paligemma.")

        refuses("has no vlm.* Copy it again", plan_pi0, pi0_folder, None, "tiny14")

    def test_a_missing_weight_of_the_vlm(self, pi0_folder: Path) -> None:
        self.remove_weights(pi0_folder, "layers.1.layer_norm1.bias")

        plan = plan_pi0(pi0_folder, None, "tiny14")

        refuses("1 weight missing, first vlm.vision_tower.*layer_norm1.bias", plan.run)

    def test_an_unknown_weight(self, pi0_folder: Path) -> None:
        file = pi0_folder / "model.safetensors"
        save_file({**load_file(file), "model.memory.weight": torch.ones(2)}, file)

        plan = plan_pi0(pi0_folder, None, "tiny14")

        refuses("1 weight refused, first model.memory.weight", plan.run)

    def test_a_broken_config_of_the_vlm(self, tmp_path: Path) -> None:
        folder = publish_pi0(make_pi0(), tmp_path / "pi0", "transformers")
        edit_json(folder / "config.json", lambda config: config.update(vlm_config=[7]))

        refuses("vlm_config in .* is broken", plan_pi0, folder, None, "tiny14")

    def test_a_tokenizer_of_another_vocabulary(self, tmp_path: Path, pi0_folder: Path) -> None:
        folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma")
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace("<loc", "<place"))

        refuses("<loc0000>", plan_pi0, pi0_folder, None, "tiny14", folder)


def test_a_loaded_transformers_pi0_is_the_published_one(tmp_path: Path) -> None:
    """LeRobot's names are those that Transformers itself reads as its π0."""
    published = make_pi0()
    folder = publish_pi0(published, tmp_path / "pi0", "openpi")
    published.config.save_pretrained(folder)

    loaded = Pi0.from_pretrained(folder)

    expected = published.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name
