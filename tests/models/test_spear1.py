"""SPEAR-1: which tokens see which, several flow samples per observation, committed actions,
sampling, and checkpoints."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from models_tiny import TINY, draw_actions, draw_pixels, draw_text, make_spear1, to_left_padded
from refusals import refuses
from spear import flow
from spear.models.presets import build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1Config, Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.types import Action

B = 3  # batch size
H = TINY.horizon
# Classes of the layers of both Gemmas, of SigLIP and of MoGe's encoder.
RECORDED_LAYERS = ("GemmaDecoderLayer", "SiglipEncoderLayer", "Dinov2Layer")


def observation(seed: int = 0) -> dict[str, Any]:
    """Random images, padded instructions and states of B observations."""
    ids, mask = draw_text(rows=B, length=6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(B, NUM_STATE_FEATURES, generator=generator)
    return {
        "pixel_values": draw_pixels(B, seed),
        "input_ids": ids,
        "attention_mask": mask,
        "state": state,
    }


def record_activations(
    model: Spear1ForActionPrediction, state: torch.Tensor, noisy: Action
) -> dict[str, torch.Tensor]:
    """The output of every layer, by the layer's name.

    Args:
        model: The model.
        state: The robot's state.
        noisy: The state of the flow a_τ.

    Returns:
        [B, S, D] for layers of the VLM, and [B, 1 + H, D] for layers of the expert, where the first
        token is that of the robot's state.
    """
    prefix_inputs = observation()
    del prefix_inputs["state"]
    activations: dict[str, torch.Tensor] = {}

    def make_hook(name: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            activations[name] = output.detach().clone()

        return record

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__ in RECORDED_LAYERS:
                hooks.enter_context(module.register_forward_hook(make_hook(name)))
        prefix = model.encode_prefix(**prefix_inputs)
        tau = torch.full((B,), 0.3)
        model.predict(prefix, state, noisy, tau)
    return activations


class TestInformationFlow:
    """The blocks are [images, instruction], [state] and [actions]. A token sees its own block and
    the blocks before it.

    The fixtures are the activations of three runs: the baseline, one with another action, and one
    with another state.
    """

    @pytest.fixture
    def model(self) -> Spear1ForActionPrediction:
        return make_spear1()

    @pytest.fixture
    def baseline(self, model: Spear1ForActionPrediction) -> dict[str, torch.Tensor]:
        return record_activations(model, observation()["state"], draw_actions(B, H))

    @pytest.fixture
    def after_other_action(self, model: Spear1ForActionPrediction) -> dict[str, torch.Tensor]:
        noisy = draw_actions(B, H)
        noisy.translation[:, 2] += 1  # the third action of each chunk
        return record_activations(model, observation()["state"], noisy)

    @pytest.fixture
    def after_other_state(self, model: Spear1ForActionPrediction) -> dict[str, torch.Tensor]:
        return record_activations(model, observation()["state"] + 1, draw_actions(B, H))

    def test_an_action_changes_no_activation_of_prefix_or_state(
        self, baseline: dict[str, torch.Tensor], after_other_action: dict[str, torch.Tensor]
    ) -> None:
        for name, value in baseline.items():
            if name.startswith("expert"):
                state_output = value[:, 0]
                state_output_after = after_other_action[name][:, 0]
                assert torch.equal(state_output, state_output_after), name
            else:
                assert torch.equal(value, after_other_action[name]), name

    def test_the_state_changes_no_activation_of_the_prefix(
        self, baseline: dict[str, torch.Tensor], after_other_state: dict[str, torch.Tensor]
    ) -> None:
        for name, value in baseline.items():
            is_expert = name.startswith("expert")
            is_unchanged = torch.equal(value, after_other_state[name])
            assert is_unchanged == (not is_expert), name

    def test_every_action_sees_the_state_and_all_actions(
        self,
        model: Spear1ForActionPrediction,
        baseline: dict[str, torch.Tensor],
        after_other_action: dict[str, torch.Tensor],
        after_other_state: dict[str, torch.Tensor],
    ) -> None:
        last_layer = f"expert.layers.{len(model.expert.layers) - 1}"
        for changed in (after_other_action, after_other_state):
            for position in range(1, 1 + H):  # position 0 is the state
                is_unchanged = torch.equal(
                    baseline[last_layer][:, position], changed[last_layer][:, position]
                )
                assert not is_unchanged, position


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_expert_does_not_see_padding_or_a_missing_view(side: str) -> None:
    """A batch with padding and masked wrist images gives the same as single rows without them."""
    model = make_spear1()
    inputs = observation()
    images = inputs["pixel_values"]
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    state = inputs["state"]
    noisy = draw_actions(B, H)
    tau = torch.full((B,), 0.3)
    is_present = {"wrist": torch.zeros(B, dtype=torch.bool)}
    if side == "left":
        padded_ids, padded_mask = to_left_padded(ids, mask)
    else:
        padded_ids, padded_mask = ids, mask

    prefix = model.encode_prefix(images, padded_ids, padded_mask, is_present)
    together = model.predict(prefix, state, noisy, tau).to_vector()

    for index in range(B):
        row = slice(index, index + 1)
        image = {"external": images["external"][row]}
        num_tokens = mask[index].sum()
        prefix = model.encode_prefix(image, ids[row, :num_tokens])
        noisy_row = Action.from_vector(noisy.to_vector()[row])
        alone = model.predict(prefix, state[row], noisy_row, tau[row])
        torch.testing.assert_close(alone.to_vector(), together[row], rtol=1e-4, atol=1e-5)


class TestFlowSamples:
    """Several draws of noise and flow time per observation (K in the model's docstrings)."""

    num_chunks = 4

    def draws(self) -> tuple[Action, torch.Tensor]:
        """Noise [B, 4, H, ·] and flow times [B, 4]."""
        noise = draw_actions(B, self.num_chunks, H, seed=2)
        tau = torch.rand(B, self.num_chunks, generator=torch.Generator().manual_seed(6))
        return noise, tau

    def test_samples_that_share_a_prefix_equal_separate_calls(self) -> None:
        model = make_spear1()
        target = draw_actions(B, H)
        action_mask = torch.rand(B, H, generator=torch.Generator().manual_seed(5)) < 0.7
        noise, tau = self.draws()

        together = model(
            **observation(), actions=target, action_mask=action_mask, noise=noise, tau=tau
        ).loss

        separate = []
        for k in range(self.num_chunks):
            chunk = slice(k, k + 1)
            noise_chunk = Action.from_vector(noise.to_vector()[:, chunk])
            output = model(
                **observation(),
                actions=target,
                action_mask=action_mask,
                noise=noise_chunk,
                tau=tau[:, chunk],
            )
            separate.append(output.loss)
        torch.testing.assert_close(together, torch.stack(separate).mean(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("argument", ["noise", "tau"])
    def test_noise_or_tau_determines_how_many_samples_there_are(self, argument: str) -> None:
        """If one of them is given, the argument `flow_samples` has no effect."""
        model = make_spear1()
        noise, tau = self.draws()
        draws: dict[str, Any] = {"noise": noise} if argument == "noise" else {"tau": tau}

        losses = []
        for flow_samples in (1, self.num_chunks):
            generator = torch.Generator().manual_seed(7)
            output = model(
                **observation(),
                actions=draw_actions(B, H),
                **draws,
                generator=generator,
                flow_samples=flow_samples,
            )
            losses.append(output.loss)

        assert losses[0] == losses[1]


class TestCommittedActions:
    """In training, the first actions of a chunk may be committed: they are given at τ = 1."""

    num_chunks = 8  # flow samples per observation
    target = draw_actions(B, H)
    # The last action of the second chunk does not count.
    action_mask = torch.arange(H) < torch.tensor([[H], [H - 1], [H]])

    @pytest.fixture
    def model(self) -> Spear1ForActionPrediction:
        return make_spear1(flow={"rotation_loss": "mse"})

    @pytest.fixture
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(3)

    def loss(self, model: Spear1ForActionPrediction, **arguments: Any) -> torch.Tensor:
        return model(
            **observation(), actions=self.target, action_mask=self.action_mask, **arguments
        ).loss

    def test_without_them_only_noise_and_flow_time_are_drawn(
        self, model: Spear1ForActionPrediction, generator: torch.Generator
    ) -> None:
        noise = flow.sample_noise((B, self.num_chunks, H), model.flow_config, generator)
        tau = flow.sample_time(B * self.num_chunks, model.flow_config, generator)
        tau = tau.view(B, self.num_chunks)

        with_own_draws = self.loss(
            model, flow_samples=self.num_chunks, generator=generator.manual_seed(3)
        )
        with_given_draws = self.loss(model, noise=noise, tau=tau)

        assert torch.equal(with_own_draws, with_given_draws)

    def test_they_are_given_slightly_wrong_and_teach_nothing(
        self, model: Spear1ForActionPrediction, generator: torch.Generator
    ) -> None:
        """The network gets committed actions with the errors of `perturb_and_correct`, and they
        have no gradient. The loss is that of the other actions."""
        # Draw the random numbers that the model will draw, in the same order.
        shape = (B, self.num_chunks, H)
        noise = flow.sample_noise(shape, model.flow_config, generator)
        tau = flow.sample_time(B * self.num_chunks, model.flow_config, generator)
        max_committed = 2
        num_committed = torch.randint(
            max_committed + 1, (B, self.num_chunks, 1), generator=generator
        )
        assert set(num_committed.flatten().tolist()) == {0, 1, 2}  # each case occurs
        is_committed = torch.arange(H) < num_committed
        is_valid = self.action_mask[:, None].expand(shape)
        target = Action.from_vector(self.target.to_vector()[:, None].expand(*shape, 8))
        perturbed = flow.perturb_and_correct(
            target, is_committed, "previous", generator, is_valid
        ).to_vector()

        # Record the actions from which the network makes its tokens, and its predictions.
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        model.action_in_proj.register_forward_hook(lambda layer, args, out: inputs.append(args[0]))
        model.action_out_proj.register_forward_hook(lambda layer, args, out: outputs.append(out))
        model.action_out_proj.register_forward_hook(lambda layer, args, out: out.retain_grad())
        model.config.committed = max_committed

        loss = self.loss(model, flow_samples=self.num_chunks, generator=generator.manual_seed(3))
        loss.backward()

        torch.testing.assert_close(
            inputs[0][is_committed], perturbed[is_committed], rtol=0, atol=1e-6
        )
        prediction = outputs[0].detach().reshape(*shape, 8)
        has_gradient = outputs[0].grad.reshape(*shape, 8).abs().sum(-1) > 0
        assert torch.equal(has_gradient, ~is_committed & is_valid)

        # The loss is that of the other actions, each as a chunk of one action.
        def select(vector: torch.Tensor) -> Action:
            return Action.from_vector(vector[has_gradient][:, None])

        tau_of_actions = tau.view(B, self.num_chunks, 1).expand(shape)[has_gradient]
        expected, _ = flow.compute_loss(
            select(prediction),
            select(noise.to_vector()),
            select(perturbed),
            tau_of_actions,
            model.flow_config,
        )
        torch.testing.assert_close(loss, expected)


def test_gradients_reach_expert_vlm_and_encoders() -> None:
    model = make_spear1().train()

    model(**observation(), actions=draw_actions(B, H), flow_samples=2).loss.backward()

    without_gradient = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().sum() > 0:
            without_gradient.add(name)
    # The expert reads only the keys and values of the VLM's last layer, so the rest of this layer
    # does not learn.
    last_layer = f"vlm.language_model.layers.{len(model.expert.layers) - 1}"
    assert without_gradient == {
        f"{last_layer}.self_attn.q_proj.weight",
        f"{last_layer}.self_attn.o_proj.weight",
        f"{last_layer}.post_attention_layernorm.weight",
        f"{last_layer}.mlp.gate_proj.weight",
        f"{last_layer}.mlp.up_proj.weight",
        f"{last_layer}.mlp.down_proj.weight",
        "vlm.language_model.norm.weight",
    }


@pytest.mark.parametrize(
    ("prediction", "rotation"), [("clean", [1.0, 0, 0, 0]), ("velocity", [0.0, 0, 0, 0])]
)
def test_an_untrained_network_predicts_no_rotation(prediction: str, rotation: list[float]) -> None:
    """The bias of the output layer is the identity for clean actions, and no velocity otherwise."""
    model = make_spear1(flow={"prediction": prediction})

    bias = Action.from_vector(model.action_out_proj.bias.detach())

    assert torch.equal(bias.rotation, torch.tensor(rotation))


@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_sampled_actions_repeat_with_their_seed(prediction: str) -> None:
    model = make_spear1(flow={"prediction": prediction})

    sampled = []
    for seed in (0, 0, 1):
        noise = flow.sample_noise((B, H), model.flow_config, torch.Generator().manual_seed(seed))
        sampled.append(model.sample_actions(**observation(), noise=noise, steps=7).to_vector())

    assert sampled[0].shape == (B, H, 8)
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_noise_of_another_horizon_is_refused() -> None:
    model = make_spear1()
    noise = flow.sample_noise((B, H + 1), model.flow_config)

    with pytest.raises(ValueError, match=f"{H + 1} actions"):
        model.sample_actions(**observation(), noise=noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", ["spear", "transformers"])
def test_saving_and_loading_changes_no_bit(tmp_path: Path, dtype: torch.dtype, loader: str) -> None:
    model = make_spear1(flow={"prediction": "clean", "geodesic_weight": 0.5}).to(dtype)

    model.save_pretrained(tmp_path)
    if loader == "spear":
        loaded = weights.load(Spear1ForActionPrediction, tmp_path)
    else:
        loaded = AutoModel.from_pretrained(tmp_path)

    assert isinstance(loaded, Spear1ForActionPrediction)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.flow_config == model.flow_config
    assert loaded.config.vlm_config.views == model.config.vlm_config.views
    if dtype == torch.float32:
        expected = model.sample_actions(**observation(), noise=draw_actions(B, H)).to_vector()
        sampled = loaded.sample_actions(**observation(), noise=draw_actions(B, H)).to_vector()
        assert torch.equal(sampled, expected)


def test_a_saved_config_is_read_back_and_so_is_one_of_an_older_checkpoint(tmp_path: Path) -> None:
    model = make_spear1(flow={"prediction": "clean", "geodesic_weight": 0.5})

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert Spear1Config(**saved).to_dict() == model.config.to_dict()

    saved["vlm_config"]["image_sizes"] = {"external": [1, 1]}  # a field of older checkpoints
    assert Spear1Config(**saved).to_dict() == model.config.to_dict()


class TestBrokenCheckpoints:
    """The message of the error says what is wrong, and names the weight or the config's field."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        make_spear1().save_pretrained(folder)
        return folder

    @staticmethod
    def message(folder: Path) -> str:
        """The message of the error that loading the folder raises."""
        return refuses("", weights.load, Spear1ForActionPrediction, folder)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        assert "there is no checkpoint" in self.message(tmp_path / "nowhere")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert "config.json cannot be read" in self.message(tmp_path)

    def test_truncated_weights(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        for size in (0, 5, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            assert "is broken" in self.message(folder)

    def test_missing_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert "model.safetensors is missing" in self.message(folder)

    def test_an_unknown_architecture(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "gemma"}')
        message = self.message(folder)
        assert "unknown architecture" in message
        assert "spear1" in message

    @pytest.mark.parametrize(
        "change",
        [{"flow": {"speed": 1}}, {"vlm_config": "x"}, {"expert_config": {"hidden_size": "x"}}],
    )
    def test_a_config_with_a_wrong_part(self, folder: Path, change: dict[str, Any]) -> None:
        config = {**build_spear1_config(TINY).to_dict(), **change}
        (folder / "config.json").write_text(json.dumps(config))
        assert "config.json is broken" in self.message(folder)

    @pytest.mark.parametrize(
        ("field", "value", "names_field"),
        [
            ("horizon", "five", True),
            ("committed", 7.5, True),
            ("flow", [], True),
            ("max_period", 0, True),
            ("dtype", [], False),
            ("vlm_config.views", "external", True),
            ("vlm_config.coordinate_start", None, True),
            ("flow.steps", "5", True),
            ("vlm_config.coordinate_smoothing", -1, True),
            ("vlm_config.text_config", 0, False),
        ],
    )
    def test_a_config_field_of_a_wrong_value(
        self, folder: Path, field: str, value: Any, names_field: bool
    ) -> None:
        """`field` may be in a section of the config, as "section.name". `names_field` says whether
        the message names the field, or only the file."""
        config = build_spear1_config(TINY).to_dict()
        section, _, name = field.rpartition(".")
        fields = config[section] if section else config
        fields[name] = value
        (folder / "config.json").write_text(json.dumps(config))

        message = self.message(folder)

        assert str(folder / "config.json") in message
        if names_field:
            assert name in message

    @pytest.mark.parametrize(
        ("index", "expected"),
        [
            ([], "contains no JSON object"),
            ({"weight_map": {"head": 5}}, "is broken"),
        ],
    )
    def test_a_broken_index(self, folder: Path, index: Any, expected: str) -> None:
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(index))

        message = self.message(folder)

        assert str(file) in message
        assert expected in message

    def test_an_index_that_names_a_file_elsewhere(self, folder: Path) -> None:
        index = {"weight_map": {"head": "../other/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "outside this folder" in self.message(folder)

    def test_a_missing_key(self, tmp_path: Path) -> None:
        model = make_spear1()
        state = model.state_dict()
        del state["state_proj.bias"]
        model.save_pretrained(tmp_path, state_dict=state)
        assert "missing keys, first state_proj.bias" in self.message(tmp_path)

    def test_an_unexpected_key(self, tmp_path: Path) -> None:
        model = make_spear1()
        state = {**model.state_dict(), "tail.weight": torch.ones(2)}
        model.save_pretrained(tmp_path, state_dict=state)
        assert "unexpected keys, first tail.weight" in self.message(tmp_path)

    def test_a_weight_of_another_shape(self, tmp_path: Path) -> None:
        config = build_spear1_config(TINY)
        config.vlm_config.text_config.vocab_size += 1
        make_spear1().save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        message = self.message(tmp_path)
        assert "mismatched keys, first vlm.language_model.embed_tokens.weight" in message
