"""Published PaliGemma, MoGe and π0 folders become SPEAR-VLM and SPEAR-1, and compute the same.

The published folders here are tiny, with random weights (`published_checkpoints`). The presets
"tiny14" and "linear14" fit them. `plan_backbones(folder, None, "tiny14")` converts a PaliGemma
without a MoGe, and `plan_policy(vlm, expert, "tiny14")` a SPEAR-VLM and a π0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration
from transformers import PI0ForConditionalGeneration as Pi0

from data_tiny import edit_json
from parity import (
    Pi0Inputs,
    compute_logits_of_both,
    draw_pi0_inputs,
    predict_velocities_of_both,
    relative_error,
    sample_actions_of_both,
)
from published_checkpoints import (
    IMAGE_TOKEN,
    NUM_PUBLISHED_TOKENS,
    PALIGEMMA_LAYOUTS,
    PI0_LAYOUTS,
    TINY14,
    make_paligemma,
    make_pi0,
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
from spear.tokens import sample_new_embeddings

WIDTH_PX, HEIGHT_PX = 280, 210
MAX_ERROR = 1e-5  # relative to the largest value
NEW_END = NUM_PUBLISHED_TOKENS + TINY14.bins  # the first id after the 3D tokens
# A weight that a π0.5 has, and a π0 has not.
PI05_WEIGHT = "model.paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight"
SECOND_SHARD = "model-00002-of-00002.safetensors"

# Registers the presets "tiny14" and "linear14".
pytestmark = pytest.mark.usefixtures("tiny_published_presets")


def save_new_vlm(folder: Path) -> Path:
    SpearVLMForConditionalGeneration(build_vlm_config(TINY14)).save_pretrained(folder)
    return folder


@pytest.fixture
def paligemma_folder(tmp_path: Path) -> Path:
    """A PaliGemma of 2024, in two shards, without tokenizer."""
    return publish_paligemma(make_paligemma(), tmp_path / "paligemma", with_tokenizer=False)


@pytest.fixture
def vlm_folder(tmp_path: Path) -> Path:
    """A new SPEAR-VLM."""
    return save_new_vlm(tmp_path / "vlm")


# --- PaliGemma and MoGe ---


class TestPaliGemmaWithoutMoge:
    @pytest.fixture(params=["gemma", "gemma2"])
    def text_type(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture(params=PALIGEMMA_LAYOUTS)
    def folder(self, tmp_path: Path, request: pytest.FixtureRequest, text_type: str) -> Path:
        """A published PaliGemma, with each language model, under each version's names."""
        return publish_paligemma(make_paligemma(text_type), tmp_path / "paligemma", request.param)

    def test_computes_the_logits_of_the_published_model(self, folder: Path) -> None:
        their_model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
        our_model = plan_backbones(folder, None, "tiny14").run()

        logits, expected = compute_logits_of_both(our_model, their_model, WIDTH_PX, HEIGHT_PX)
        our_model.set_attn_implementation("eager")
        eager_logits, _ = compute_logits_of_both(our_model, their_model, WIDTH_PX, HEIGHT_PX)

        assert logits.shape[-1] == NEW_END
        published_logits = logits[:, :NUM_PUBLISHED_TOKENS]  # without the 3D tokens
        assert relative_error(published_logits, expected) < MAX_ERROR
        assert relative_error(eager_logits, logits) < MAX_ERROR

    def test_is_the_same_after_saving_and_loading(self, folder: Path, tmp_path: Path) -> None:
        their_model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
        our_model = plan_backbones(folder, None, "tiny14").run()

        our_model.save_pretrained(tmp_path / "saved")
        loaded = weights.load(SpearVLMForConditionalGeneration, tmp_path / "saved")

        logits, _ = compute_logits_of_both(our_model, their_model, WIDTH_PX, HEIGHT_PX)
        loaded_logits, _ = compute_logits_of_both(loaded, their_model, WIDTH_PX, HEIGHT_PX)
        assert torch.equal(loaded_logits, logits)


class TestReport:
    """The report of PaliGemma and MoGe names every weight of both and of the new model.

    A part of a weight has a name like "name[first:end]".
    """

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return publish_paligemma(make_paligemma(), tmp_path / "paligemma", layout="2025")

    @pytest.fixture
    def moge(self, tmp_path: Path) -> Path:
        return publish_moge(tmp_path / "model.pt")

    def test_has_every_weight_of_the_new_model(self, folder: Path, moge: Path) -> None:
        plan = plan_backbones(folder, moge, "tiny14")

        model = plan.run()

        reported = plan.report.select_by_status("loaded", "new")
        assert {entry.name.split("[")[0] for entry in reported} == set(model.state_dict())
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert plan.report.count_parameters() == num_parameters

    def test_has_every_published_weight(self, folder: Path, moge: Path) -> None:
        report = plan_backbones(folder, moge, "tiny14").report

        # The note of a loaded weight is "SOURCE: published name".
        loaded_names = {entry.note.split(": ")[-1] for entry in report.select_by_status("loaded")}
        left_out_names = {entry.name for entry in report.select_by_status("left out")}
        paligemma_names = set(StoredCheckpoint.open(folder, "PaliGemma").weights)
        moge_names = set(torch.load(moge)["model"])
        assert loaded_names | left_out_names == paligemma_names | moge_names
        assert left_out_names >= {"lm_head.weight", "image_mean", "backbone.mask_token"}

    def test_names_what_is_new(self, folder: Path, moge: Path) -> None:
        report = plan_backbones(folder, moge, "tiny14").report

        assert sorted(entry.name for entry in report.select_by_status("new")) == [
            f"{EMBEDDINGS}[{NUM_PUBLISHED_TOKENS}:{NEW_END}]",
            "moge_projector.linear.bias",
            "moge_projector.linear.weight",
        ]
        assert report.select_by_status("missing", "refused") == []


class TestCoordinateTokens:
    """The 3D tokens follow the tokenizer's tokens, and overwrite the rows of the embeddings there.

    The tokenizer always has `NUM_PUBLISHED_TOKENS` tokens. The embeddings have as many rows, or 64
    more, or one row less (without the image token, which is never embedded).
    """

    @pytest.fixture(
        params=[NUM_PUBLISHED_TOKENS, NUM_PUBLISHED_TOKENS + 64, NUM_PUBLISHED_TOKENS - 1]
    )
    def num_rows_and_start(self, request: pytest.FixtureRequest) -> tuple[int, int]:
        """The number of published embeddings, and the id of the first 3D token."""
        first_id_after_tokenizer = NUM_PUBLISHED_TOKENS
        return request.param, first_id_after_tokenizer

    @pytest.fixture
    def plan(self, tmp_path: Path, num_rows_and_start: tuple[int, int]) -> Any:
        num_rows, _ = num_rows_and_start
        folder = publish_paligemma(make_paligemma(num_rows=num_rows), tmp_path / "paligemma")
        return plan_backbones(folder, None, "tiny14")

    def test_have_the_ids_after_the_tokenizers_own(
        self, plan: Any, num_rows_and_start: tuple[int, int]
    ) -> None:
        num_rows, start = num_rows_and_start

        model = plan.run()

        assert plan.tokenizer.convert_tokens_to_ids("<3d0000>") == start
        assert model.config.coordinate_start == start
        new_num_rows = len(model.language_model.embed_tokens.weight)
        assert new_num_rows == max(num_rows, start + TINY14.bins)
        assert new_num_rows == model.config.text_config.vocab_size

    def test_leave_the_other_rows_as_published(
        self, plan: Any, num_rows_and_start: tuple[int, int]
    ) -> None:
        num_rows, start = num_rows_and_start
        published = make_paligemma(num_rows=num_rows).model.language_model.embed_tokens.weight

        embeddings = plan.run().language_model.embed_tokens.weight

        num_known = min(num_rows, start)
        end = start + TINY14.bins
        assert torch.equal(embeddings[:num_known], published[:num_known])
        assert torch.equal(embeddings[end:], published[end:])

    def test_are_drawn_like_the_known_rows(
        self, plan: Any, num_rows_and_start: tuple[int, int]
    ) -> None:
        num_rows, start = num_rows_and_start
        published = make_paligemma(num_rows=num_rows).model.language_model.embed_tokens.weight
        num_known = min(num_rows, start)
        end = start + TINY14.bins
        generator = torch.Generator().manual_seed(0)
        expected = sample_new_embeddings(published[:num_known], end - num_known, generator)

        embeddings = plan.run().language_model.embed_tokens.weight

        assert torch.equal(embeddings[num_known:end], expected)

    def test_repeat_with_their_seed(self, plan: Any) -> None:
        first, same, other_seed = [
            plan.run(seed=seed).language_model.embed_tokens.weight for seed in (0, 0, 1)
        ]

        assert torch.equal(first, same)
        assert not torch.equal(first, other_seed)


class TestBfloat16:
    @pytest.fixture
    def half(self, paligemma_folder: Path, tmp_path: Path) -> Any:
        """The SPEAR-VLM of PaliGemma and MoGe, converted in bfloat16."""
        plan = plan_backbones(paligemma_folder, publish_moge(tmp_path / "model.pt"), "tiny14")
        return plan.run(torch.bfloat16)

    def test_weights_are_the_rounded_ones(
        self, half: Any, paligemma_folder: Path, tmp_path: Path
    ) -> None:
        full = plan_backbones(paligemma_folder, tmp_path / "model.pt", "tiny14").run()

        assert full.dtype == torch.float32
        expected = full.state_dict()
        for name, weight in half.state_dict().items():
            assert weight.dtype == torch.bfloat16
            is_new = "moge_projector" in name or name == EMBEDDINGS
            if not is_new:
                assert torch.equal(weight, expected[name].to(torch.bfloat16)), name

    def test_a_policy_takes_the_precision_of_its_vlm(self, half: Any, tmp_path: Path) -> None:
        half.save_pretrained(tmp_path / "half")

        assert plan_policy(tmp_path / "half", size="tiny14").dtype == torch.bfloat16

    def test_one_weight_in_it_does_not_round_the_others(self, vlm_folder: Path) -> None:
        file = vlm_folder / "model.safetensors"
        state = load_file(file)
        save_file({**state, EMBEDDINGS: state[EMBEDDINGS].bfloat16()}, file)

        assert plan_policy(vlm_folder, size="tiny14").dtype == torch.float32


# --- π0 ---


class TestPolicyWithPi0:
    """A SPEAR-1 with the weights of a π0 computes the same as the π0 in Transformers.

    The VLM inside the SPEAR-1 is made from the VLM of the π0.
    """

    @pytest.fixture(params=PI0_LAYOUTS)
    def layout(self, request: pytest.FixtureRequest) -> str:
        """Which of `PI0_LAYOUTS` the published folder has."""
        return request.param

    @pytest.fixture
    def models(self, tmp_path: Path, layout: str) -> tuple[Any, Any]:
        """The SPEAR-1 and the π0."""
        their_model = make_pi0()
        # Only the folders of two layouts have Transformers' config. For these, the field
        # `rms_norm_eps` is not the default, so that a conversion that ignores the field fails.
        has_config = layout in ("transformers", "saved")
        their_model.config.dit_config.rms_norm_eps = 1e-2 if has_config else 1e-6
        paligemma = make_paligemma()
        paligemma.model.load_state_dict(their_model.model.vlm.state_dict())
        folder = publish_paligemma(paligemma, tmp_path / "paligemma", with_tokenizer=False)
        plan_backbones(folder, None, "tiny14").save(tmp_path / "vlm")
        expert = publish_pi0(their_model, tmp_path / "pi0", layout)
        our_model = plan_policy(tmp_path / "vlm", expert, "linear14").run()
        # The layers of `their_model` still have the old `rms_norm_eps`, because they were made
        # before it changed. So the π0 is read from the folder, whose config has the new value.
        if has_config:
            their_model = Pi0.from_pretrained(expert).eval()
        return our_model, their_model

    @pytest.fixture
    def inputs(self) -> Pi0Inputs:
        return draw_pi0_inputs(IMAGE_TOKEN)

    @torch.no_grad()
    def test_predicts_the_same_velocity(self, models: tuple[Any, Any], inputs: Pi0Inputs) -> None:
        predicted, expected = predict_velocities_of_both(*models, inputs)

        assert relative_error(predicted, expected) < MAX_ERROR

    def test_samples_the_same_actions(self, models: tuple[Any, Any], inputs: Pi0Inputs) -> None:
        predicted, expected = sample_actions_of_both(*models, inputs)

        assert relative_error(predicted.translation, expected.translation) < MAX_ERROR
        assert relative_error(predicted.rotation, expected.rotation) < MAX_ERROR
        assert relative_error(predicted.gripper, expected.gripper) < MAX_ERROR


class TestPi0OfAnotherRobot:
    """A π0 whose states and actions have 32 numbers, instead of our 10 and 8.

    The layers whose inputs or outputs are states or actions (robot layers) are new.
    """

    @pytest.fixture
    def expert(self, tmp_path: Path) -> Path:
        return publish_pi0(make_pi0(state_dim=32, action_dim=32), tmp_path / "pi0")

    def test_its_robot_layers_are_new(self, vlm_folder: Path, expert: Path) -> None:
        report = plan_policy(vlm_folder, expert, "tiny14").report

        expected = set()
        for layer in ("state_proj", "action_in_proj", "action_out_proj"):
            expected |= {f"{layer}.weight", f"{layer}.bias"}
        assert {entry.name for entry in report.select_by_status("new")} == expected

    def test_every_stored_weight_is_loaded_or_left_out(
        self, vlm_folder: Path, expert: Path
    ) -> None:
        report = plan_policy(vlm_folder, expert, "tiny14").report

        reasons = {entry.name: entry.note for entry in report.select_by_status("left out")}
        assert reasons["model.state_proj.weight"] == "its states and actions mean other numbers"
        assert "normalize_inputs.buffer_observation_state.mean" in reasons
        num_stored = 0
        for folder in (vlm_folder, expert):
            num_stored += len(StoredCheckpoint.open(folder, "one").weights)
        assert len(report.select_by_status("loaded", "left out")) == num_stored
        assert report.select_by_status("missing", "refused") == []

    def test_its_other_layers_are_loaded(self, vlm_folder: Path, expert: Path) -> None:
        published = make_pi0(state_dim=32, action_dim=32)

        model = plan_policy(vlm_folder, expert, "tiny14").run()

        assert torch.equal(
            model.expert.layers[1].mlp.up_proj.weight,
            published.model.dit.layers[1].mlp.up_proj.weight,
        )
        assert torch.equal(
            model.action_time_mlp_in.weight, published.embed_action_time.action_time_mlp_in.weight
        )


class TestNewExpert:
    def test_is_drawn_anew_with_each_seed(self, vlm_folder: Path) -> None:
        """Weights with a normal initialization depend on the seed; all others are 0."""
        plan = plan_policy(vlm_folder, size="tiny14")

        first, same, other_seed = [plan.run(seed=seed).state_dict() for seed in (0, 0, 1)]

        for entry in plan.report.select_by_status("new"):
            assert torch.equal(first[entry.name], same[entry.name])
            if entry.note.startswith("N("):
                assert not torch.equal(first[entry.name], other_seed[entry.name]), entry.name
            else:
                assert torch.equal(first[entry.name], other_seed[entry.name])
                assert not first[entry.name].any(), entry.name

    def test_has_the_spread_that_the_report_says(self, vlm_folder: Path) -> None:
        model = plan_policy(vlm_folder, size="tiny14").run()

        # The report says N(0, 1 / inputs).
        weight = model.action_time_mlp_in.weight.detach()
        num_inputs = weight.shape[1]
        assert float(weight.std()) == pytest.approx(num_inputs**-0.5, rel=0.1)

    def test_policy_is_simulator_only_like_its_vlm(self, vlm_folder: Path, tmp_path: Path) -> None:
        plan = plan_policy(vlm_folder, size="tiny14")

        plan.save(tmp_path / "of unknown data")
        (vlm_folder / "recipe.json").write_text('{"simulator_only": true}')
        plan.save(tmp_path / "of the simulator")

        assert not is_simulator_only(tmp_path / "of unknown data")
        assert is_simulator_only(tmp_path / "of the simulator")


# --- Refusals, each with a message of one line ---


class TestWrongCheckpointsAreRefused:
    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        refuses("there is no PaliGemma", plan_backbones, tmp_path / "nowhere", None, "tiny14")

    def test_a_paligemma_as_vlm(self, paligemma_folder: Path) -> None:
        refuses("'paligemma'.*spear_vlm", plan_policy, paligemma_folder)

    def test_a_paligemma_as_expert(self, vlm_folder: Path, paligemma_folder: Path) -> None:
        refuses("contains no action expert", plan_policy, vlm_folder, paligemma_folder, "tiny14")

    def test_a_preset_with_other_patches(self, paligemma_folder: Path) -> None:
        """The images of nano are no multiples of the checkpoint's patches of 14 pixels."""
        message = "external images of preset nano, 192×128"
        refuses(message, plan_backbones, paligemma_folder, None, "nano")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tie_word_embeddings": False}, "not tied"),
            ({"model_type": "llava"}, "architecture 'llava'. Give a PaliGemma 1 or 2"),
        ],
    )
    def test_a_config_of_another_model(
        self, paligemma_folder: Path, changes: dict[str, Any], message: str
    ) -> None:
        edit_json(paligemma_folder / "config.json", lambda config: config.update(changes))

        refuses(message, plan_backbones, paligemma_folder, None, "tiny14")

    def test_a_config_that_is_no_json(self, paligemma_folder: Path) -> None:
        (paligemma_folder / "config.json").write_text("{")

        refuses("config.json", plan_backbones, paligemma_folder, None, "tiny14")

    def test_an_expert_with_the_norms_of_both_pi0_and_pi05(
        self, vlm_folder: Path, tmp_path: Path
    ) -> None:
        expert = publish_pi0(make_pi0(), tmp_path / "pi0")
        state = load_file(expert / "model.safetensors")
        save_file({**state, PI05_WEIGHT: torch.zeros(3)}, expert / "model.safetensors")

        plan = plan_policy(vlm_folder, expert, "tiny14")

        # The 5 norms, and the 4 weights of the layers that join actions and flow time, are a π0's.
        refuses("9 weights refused, .*no such weight", plan.run)

    def test_a_file_without_weights(self, vlm_folder: Path) -> None:
        save_file({}, vlm_folder / "model.safetensors")

        refuses("contains no weights", plan_policy, vlm_folder, None, "tiny14")


class TestIncompleteFilesAreRefused:
    @pytest.fixture
    def shard(self, paligemma_folder: Path) -> Path:
        return paligemma_folder / SECOND_SHARD

    def test_a_truncated_file(self, paligemma_folder: Path, shard: Path) -> None:
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])

        message = f"{shard.name} is broken"
        refuses(message, plan_backbones, paligemma_folder, None, "tiny14")

    def test_a_missing_file(self, paligemma_folder: Path, shard: Path) -> None:
        shard.unlink()

        message = f"{shard.name} is missing"
        refuses(message, plan_backbones, paligemma_folder, None, "tiny14")

    def test_a_missing_weight(self, paligemma_folder: Path, shard: Path) -> None:
        state = load_file(shard)
        del state[min(state)]
        save_file(state, shard)

        plan = plan_backbones(paligemma_folder, None, "tiny14")

        assert len(plan.report.select_by_status("missing")) == 1
        refuses("1 weight missing, first ", plan.run)

    def test_a_weight_of_another_shape(self, paligemma_folder: Path, shard: Path) -> None:
        state = load_file(shard)
        save_file({**state, min(state): torch.zeros(2, 3)}, shard)

        plan = plan_backbones(paligemma_folder, None, "tiny14")

        refuses("1 weight refused, first .*its shape is", plan.check)

    def test_a_weight_of_another_model(self, paligemma_folder: Path, shard: Path) -> None:
        save_file({**load_file(shard), "tail.weight": torch.ones(2)}, shard)

        plan = plan_backbones(paligemma_folder, None, "tiny14")

        refuses("1 weight refused, first tail.weight .*no such", plan.run)

    def test_a_quantized_weight(self, paligemma_folder: Path, shard: Path) -> None:
        state = load_file(shard)
        name = min(state)
        save_file({**state, name: state[name].to(torch.int8)}, shard)

        message = "is I8. Use a checkpoint in float32"
        refuses(message, plan_backbones, paligemma_folder, None, "tiny14")


class TestWrongWeightsAreRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return publish_paligemma(make_paligemma(), tmp_path / "paligemma", layout="2025")

    @pytest.fixture
    def shards(self, folder: Path) -> tuple[Path, Path]:
        """The two files of weights."""
        first, second = sorted(folder.glob("*.safetensors"))
        return first, second

    @pytest.fixture
    def norm_name(self, shards: tuple[Path, Path]) -> str:
        """The name of a norm's weight in the first file."""
        return next(name for name in load_file(shards[0]) if "norm" in name)

    def change(self, file: Path, name: str, addend: float) -> None:
        """Add a number to all values of a weight."""
        state: Mapping[str, torch.Tensor] = load_file(file)
        save_file({**state, name: state[name] + addend}, file)

    def test_a_head_that_differs_from_the_embeddings(
        self, folder: Path, shards: tuple[Path, Path]
    ) -> None:
        self.change(shards[0], "lm_head.weight", addend=1)

        refuses("lm_head.weight", plan_backbones(folder, None, "tiny14").run)

    @pytest.mark.parametrize(
        ("addend", "dtype"), [(torch.nan, None), (1e6, torch.float16)], ids=["nan", "overflow"]
    )
    def test_a_weight_that_is_not_finite(
        self,
        folder: Path,
        shards: tuple[Path, Path],
        norm_name: str,
        addend: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.change(shards[0], norm_name, addend)

        plan = plan_backbones(folder, None, "tiny14")

        refuses(norm_name.removeprefix("model."), plan.run, dtype)

    def test_a_weight_in_two_files(
        self, folder: Path, shards: tuple[Path, Path], norm_name: str
    ) -> None:
        norm = load_file(shards[0])[norm_name]
        save_file({**load_file(shards[1]), norm_name: norm}, shards[1])

        refuses(norm_name, plan_backbones, folder, None, "tiny14")

    def test_a_weight_under_two_names(
        self, folder: Path, shards: tuple[Path, Path], norm_name: str
    ) -> None:
        """The same weight has its present name in one file, and its name of 2024 in the other."""
        norm = load_file(shards[0])[norm_name]
        old_name = norm_name.removeprefix("model.")
        save_file({**load_file(shards[1]), old_name: norm}, shards[1])

        refuses(norm_name, plan_backbones, folder, None, "tiny14")

    def test_two_checkpoints_in_one_folder(self, folder: Path, shards: tuple[Path, Path]) -> None:
        save_file(load_file(shards[0]), folder / "model.safetensors")

        refuses("/model.safetensors.index.json", plan_backbones, folder, None, "tiny14")

    def test_infinite_weights_when_loading(self, vlm_folder: Path) -> None:
        file = vlm_folder / "model.safetensors"
        state = load_file(file)
        infinite = {**state, EMBEDDINGS: state[EMBEDDINGS] * torch.inf}
        save_file(infinite, file, {"format": "pt"})

        refuses(EMBEDDINGS, weights.load, SpearVLMForConditionalGeneration, vlm_folder)


class TestVocabulariesThatDoNotFitAreRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return publish_paligemma(make_paligemma(), tmp_path / "paligemma")

    def test_fewer_embeddings_than_tokens(self, tmp_path: Path) -> None:
        """The tokenizer has NUM_PUBLISHED_TOKENS = 1312 tokens."""
        published = make_paligemma(num_rows=NUM_PUBLISHED_TOKENS - 40)
        folder = publish_paligemma(published, tmp_path / "short")

        message = "tokenizer in .* has 1312 tokens, its embeddings 1272 rows"
        refuses(message, plan_backbones, folder, None)

    def test_a_config_with_another_number_of_tokens(self, folder: Path) -> None:
        edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=7))

        message = "config of .* says 7 tokens, its embeddings have 1312"
        refuses(message, plan_backbones, folder, None, "tiny14")

    def test_a_tokenizer_that_has_3d_tokens(self, folder: Path) -> None:
        plan_backbones(folder, None, "tiny14").tokenizer.save_pretrained(folder)

        refuses("has 3D tokens already", plan_backbones, folder, None, "tiny14")

    def test_a_tokenizer_without_location_tokens(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace("<loc", "<place"))

        refuses("<loc0000>", plan_backbones, folder, None, "tiny14")


# --- Names on the Hub ---


@pytest.fixture
def offline_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache of the Hub, while the Hub itself cannot be reached."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_name_on_the_hub_is_read_from_the_cache(offline_hub_cache: Path) -> None:
    repository = offline_hub_cache / "models--google--tiny"
    snapshot = repository / "snapshots" / "0123456789"
    publish_paligemma(make_paligemma(), snapshot, with_tokenizer=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")

    plan = plan_backbones("google/tiny", None, "tiny14")

    assert plan.sources == {"PaliGemma": "google/tiny@0123456789"}
    assert plan.report.select_by_status("missing", "refused") == []


@pytest.mark.usefixtures("offline_hub_cache")
def test_a_name_that_is_not_in_the_cache_is_refused() -> None:
    message = "cannot get google/absent .*or give a local folder"
    refuses(message, plan_backbones, "google/absent", None, "tiny14")
