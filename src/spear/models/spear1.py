"""SPEAR-1: SPEAR-VLM, and an action expert that flows noise to actions.

Letters are those of the paper (arXiv 2511.17411, section "SPEAR-1"). One action is a = [x, q, g]:
x ∈ R³ is the translation, q ∈ S³ the rotation as a unit quaternion, g the gripper opening. A chunk
has H actions.

    τ          flow time, 0 is noise and 1 is data
    ε          noise: N(0, I) for x and g, U(S³) for q
    a_τ        the state of the flow: x_τ = τ x + (1 - τ) ε, q_τ = slerp(q_ε, q; τ)
    u          the velocity of the flow, d a_τ / dτ, which the network learns: x - ε on R³
    v_θ        the network's prediction of u (or of the clean action, see `spear.types.FlowConfig`)

B is the batch size and H the number of actions per chunk. `spear.flow` has the equations, and this
module has the networks.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GemmaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec

from spear import flow
from spear.errors import SpearError
from spear.models import layers
from spear.models.fast.linear import use_fast_linear
from spear.models.sampling import pack_inputs, sample_actions
from spear.models.vlm import LossOutput, Prefix, SpearVLMConfig, SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.types import ACTION_DIM, Action, ActionReference

NUM_STATE_FEATURES = 10
"""The robot's state (proprioception) in 10 numbers: position 3 (normalized), rotation 6, gripper 1.

The rotation is given by the first two columns of its matrix. A canonical quaternion would jump from
q to -q where w = 0, and a gripper that points down has such a rotation."""

SHARED_WITH_VLM = ("num_hidden_layers", "num_key_value_heads", "head_dim")
"""Config fields that must be equal in the action expert and the VLM, because the expert reads the
VLM's keys and values."""


@strict
class Spear1Config(layers.PortableConfig):
    """The parts of SPEAR-1.

    vlm_config     SPEAR-VLM's config.
    expert_config  The config of the action expert's Gemma, which must fit the VLM's
                   (`SHARED_WITH_VLM`).
    horizon        H, the number of actions per chunk (the paper: 5, at 5 Hz).
    flow           Fields of `spear.types.FlowConfig`.
    committed      In training, up to this many actions at the beginning of a chunk are committed
                   (`spear.flow.sample_committed_mask`). The paper has no committed actions, so the
                   default is 0.
    action_reference  From which pose actions are measured: "previous" or "observed"
                   (`spear.data.action_reference`). The normalizer converts actions. The network
                   reads this field for committed actions alone.
    min_period     Shortest period of the waves that embed the flow time, which runs from 0 to 1.
                   The value is π0's.
    max_period     Longest period of these waves. The value is π0's.
    initializer_range  Standard deviation of initial weights, where no other rule applies.
    """

    model_type = "spear1"
    sub_configs_defaults: ClassVar = {
        "vlm_config": SubConfigSpec(config_class=SpearVLMConfig),
        "expert_config": SubConfigSpec(config_class=GemmaConfig),
    }

    vlm_config: Any = None
    expert_config: Any = None
    horizon: int = 5
    flow: dict[str, Any] | None = None
    committed: int = 0
    action_reference: ActionReference = "previous"
    min_period: float | int = 4e-3
    max_period: float | int = 4.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.flow = dataclasses.asdict(flow.FlowConfig(**(self.flow or {})))
        for name in SHARED_WITH_VLM:
            vlm_value = getattr(self.vlm_config.text_config, name)
            expert_value = getattr(self.expert_config, name)
            if vlm_value != expert_value:
                raise SpearError(
                    f"{name} of the action expert is {expert_value}, the VLM's is {vlm_value}. "
                    "Give both the same value."
                )


class Spear1ForActionPrediction(PreTrainedModel):
    """SPEAR-1 (the paper, section "SPEAR-1"), in the architecture of π0.

    A sequence consists of three blocks, [images, instruction], [state] and [actions]. Attention is
    block-wise causal: a token sees its own block and the blocks before it. The first block, the
    prefix, runs through SPEAR-VLM, which stays usable as `model.vlm`. The other two blocks, the
    suffix, run through the action expert, whose layer n attends to the keys and values of the VLM's
    layer n.
    """

    config: Spear1Config
    base_model_prefix = "spear1"
    _supports_sdpa = True

    def __init__(self, config: Spear1Config) -> None:
        super().__init__(layers.set_default_attention(config))
        self.flow_config = flow.FlowConfig(**(config.flow or {}))
        self.vlm = SpearVLMForConditionalGeneration(config.vlm_config)
        self.expert = layers.build_language_model(config.expert_config)
        # The expert gets no text, so it needs no token embeddings.
        self.expert.embed_tokens = None  # type: ignore[assignment]
        width = config.expert_config.hidden_size
        self.state_proj = nn.Linear(NUM_STATE_FEATURES, width)
        self.action_in_proj = nn.Linear(ACTION_DIM, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, ACTION_DIM)
        use_fast_linear(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)
            return
        # The inputs of these layers are few and of unit size. With weights of standard deviation
        # 1 / √inputs, outputs have unit size, too.
        init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        init.zeros_(module.bias)
        if module is not self.action_out_proj:
            return
        # The last layer begins with small predictions.
        init.normal_(module.weight, std=0.1 / math.sqrt(module.in_features))
        if self.flow_config.prediction == "clean":
            # An untrained network predicts no motion: translation 0, rotation (1, 0, 0, 0), and
            # gripper 0, the middle of the normalized opening.
            no_motion = [0.0, 0, 0, 1, 0, 0, 0, 0]
            init.copy_(module.bias, torch.tensor(no_motion, device=module.bias.device))

    def get_input_embeddings(self) -> nn.Module:
        """The VLM's token embeddings."""
        return self.vlm.get_input_embeddings()

    def encode_prefix(
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
    ) -> Prefix:
        """Run images and instruction through the VLM, once per observation.

        The arguments are those of `forward`.
        """
        features, valid = self.vlm.encode_images(pixel_values, view_mask)
        prefix = self.vlm.run_language_model(features, valid, input_ids, attention_mask)
        prefix.cache.frozen = True  # the expert only reads these keys and values
        return prefix

    def predict(self, prefix: Prefix, state: Tensor, a_tau: Action, tau: Tensor) -> Action:
        """v_θ(a_τ, τ | prefix, state): the action expert's prediction at flow time τ.

        Args:
            prefix: The keys and values of images and instruction, from `encode_prefix`.
            state: The robot's state [B, 10], see `NUM_STATE_FEATURES`.
            a_tau: The state of the flow, [B, H, ·], or [B, K, H, ·] for K chunks per observation.
            tau: [B], or [B, K] for K chunks. If each action has a flow time of its own, [B, H] or
                [B, K, H].

        Returns:
            A velocity or a clean action, as `config.flow` says, in the shape of `a_tau`. Its
            rotations are not normalized.
        """
        dtype = self.state_proj.weight.dtype
        vector = a_tau.to_vector().to(dtype)
        batch = vector.shape[0]
        horizon = vector.shape[-2]
        num_chunks = vector.shape[:-2].numel() // batch  # K, or 1 if `a_tau` is [B, H, ·]

        # The suffix: one state token, then the action tokens of all chunks.
        chunks = vector.reshape(batch, num_chunks, horizon, ACTION_DIM)
        action_tokens = self._embed_actions(chunks, tau.reshape(batch, num_chunks, -1))
        state_token = self.state_proj(state.to(dtype))[:, None]
        suffix = torch.cat([state_token, action_tokens.flatten(1, 2)], dim=1)

        # The state's position follows the prefix, and action h is h positions after the state. All
        # chunks have the same positions, as if each of them alone continued the prefix.
        state_position = layers.compute_position_ids(prefix.valid)[:, -1:] + 1  # [B, 1]
        offsets = torch.arange(1, horizon + 1, device=state_position.device).repeat(num_chunks)
        position_ids = torch.cat([state_position, state_position + offsets], dim=1)
        mask = layers.make_suffix_mask(prefix.valid, horizon, num_chunks)
        output = self.expert(
            inputs_embeds=suffix.to(dtype),  # under autocast the suffix may have another type
            attention_mask=layers.convert_mask_for_attention(self.expert, mask, dtype),
            position_ids=position_ids,
            use_cache=False,  # Transformers creates no cache; ours is passed in the next argument
            **{layers.CACHE_ARGUMENT: prefix.cache},
        )
        action_outputs = output.last_hidden_state[:, 1:]  # [B, K · H, width]
        prediction = self.action_out_proj(action_outputs).reshape(vector.shape)
        return Action.from_vector(prediction.to(a_tau.translation.dtype))

    def _embed_actions(self, a_tau: Tensor, tau: Tensor) -> Tensor:
        """π0's embedding of actions [B, K, H, 8] at flow times [B, K, H or 1]: [B, K, H, width]."""
        tokens = self.action_in_proj(a_tau)
        # π0 counts the flow time from the data to the noise, so its embedding gets 1 - τ.
        time_embedding = layers.embed_flow_time(
            1 - tau, tokens.shape[-1], self.config.min_period, self.config.max_period
        )
        time_embedding = time_embedding.expand_as(tokens).to(tokens.dtype)
        hidden = self.action_time_mlp_in(torch.cat([tokens, time_embedding], dim=-1))
        return self.action_time_mlp_out(nn.functional.silu(hidden))

    def forward(  # noqa: PLR0913  the inputs of the network
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor,
        actions: Action,
        action_mask: Tensor | None = None,
        flow_samples: int = 1,
        noise: Action | None = None,
        tau: Tensor | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """The flow-matching loss of a batch of demonstrations (the paper, section "SPEAR-1").

        If `config.committed` is not 0, the first actions of a chunk may be committed. The network
        gets these actions without noise, at τ = 1, and they are no part of the loss. Random errors
        are added to them, and the first action after them makes up for the errors
        (`spear.flow.perturb_and_correct`).

        Args:
            pixel_values: View -> [B, 3, h, w] uint8.
            input_ids: [B, L] the instruction, padded on either side.
            attention_mask: [B, L], 0 on padding; None where there is no padding.
            state: [B, 10], see `NUM_STATE_FEATURES`.
            actions: [B, H, ·] in the model's normalized units.
            action_mask: [B, H] bool, True for steps that count.
            flow_samples: K, the number of draws of ε and τ per observation. All K share the
                observation's prefix.
            noise: ε [B, K, H, ·], drawn by default.
            tau: [B, K] or [B, K, H], drawn by default.
            view_mask: View -> [B] bool, False for a missing image. None if no image is missing.
            generator: Source of the random numbers.

        Returns:
            The loss and its parts, as `spear.flow.compute_loss` returns them.
        """
        batch, horizon = actions.translation.shape[:2]
        device = actions.translation.device

        # Noise ε for K chunks per observation, and K copies of the demonstrated chunk.
        if noise is None:
            num_chunks = flow_samples if tau is None else tau.shape[1]
            noise = flow.sample_noise(
                (batch, num_chunks, horizon), self.flow_config, generator, device=device
            )
        chunks_shape = noise.translation.shape[:3]  # [B, K, H]
        copies = actions.to_vector()[:, None].expand(*chunks_shape, ACTION_DIM)
        data = Action.from_vector(copies)
        if action_mask is not None:
            action_mask = action_mask[:, None].expand(chunks_shape)

        # Flow time τ per chunk [B, K]; with committed actions per action [B, K, H], theirs is 1.
        if tau is None:
            num_draws = chunks_shape[:2].numel()  # B · K
            tau = flow.sample_time(num_draws, self.flow_config, generator, device=device)
            tau = tau.view(batch, -1)  # [B, K]
            if self.config.committed:
                is_committed = flow.sample_committed_mask(
                    (*tau.shape, horizon), self.config.committed, generator, device
                )
                tau = torch.where(is_committed, 1.0, tau[..., None])
                data = flow.perturb_and_correct(
                    data, is_committed, self.config.action_reference, generator, action_mask
                )

        # The state of the flow a_τ: x_τ = τ x + (1 - τ) ε, and q_τ = slerp(q_ε, q; τ). From a_τ the
        # network predicts the velocity u or the clean action, as the config says.
        a_tau, _ = flow.interpolate(noise, data, tau, self.flow_config)
        prefix = self.encode_prefix(pixel_values, input_ids, attention_mask, view_mask)
        prediction = self.predict(prefix, state, a_tau, tau)

        # The loss of translation (R³), rotation (S³) and gripper, over all actions that are neither
        # masked nor committed.
        has_tau_per_action = tau.dim() == 3
        if has_tau_per_action:
            is_not_committed = tau < 1
            if action_mask is None:
                action_mask = is_not_committed
            else:
                action_mask = action_mask & is_not_committed
        loss, parts = flow.compute_loss(prediction, noise, data, tau, self.flow_config, action_mask)
        detached_parts = {name: part.detach() for name, part in parts.items()}
        return LossOutput(loss=loss, parts=detached_parts)

    @torch.no_grad()
    def sample_actions(  # noqa: PLR0913  the inputs of the network
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor,
        noise: Action,
        steps: int | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
        committed: flow.CommittedPrefix | None = None,
    ) -> Action:
        """Compute actions from noise, images, instruction and state.

        The actions are those of `sample_plain` up to rounding. `spear.models.sampling` computes
        them in less time.

        Args:
            pixel_values: View -> [B, 3, h, w] uint8.
            input_ids: [B, L] the instruction.
            attention_mask: [B, L], 0 on padding. None is faster, and right where there is no
                padding.
            state: [B, 10], see `NUM_STATE_FEATURES`.
            noise: ε [B, H, ·], from `spear.flow.sample_noise`.
            steps: Number of Euler steps. By default that of `config.flow`.
            view_mask: View -> [B] bool, False for a missing image. None is faster, and right where
                no image is missing.
            committed: The committed prefix, which the other actions of the result continue.

        Returns:
            [B, H, ·] in normalized units; rotations are unit quaternions with w ≥ 0.

        Raises:
            ValueError: If the noise is not a chunk of `config.horizon` actions.
        """
        horizon = noise.translation.shape[-2]
        if horizon != self.config.horizon:
            raise ValueError(
                f"noise of {horizon} actions does not fit a chunk of {self.config.horizon}"
            )
        inputs = pack_inputs(
            pixel_values, input_ids, attention_mask, state, noise, view_mask, committed
        )
        if steps is None:
            steps = self.flow_config.steps
        return Action.from_vector(sample_actions(self, inputs, steps))

    @torch.no_grad()
    def sample_plain(  # noqa: PLR0913  the inputs of the network
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor,
        noise: Action,
        steps: int | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
        committed: flow.CommittedPrefix | None = None,
    ) -> Action:
        """Integrate v_θ from noise (τ = 0) to actions (τ = 1) by Euler steps.

        This runs the same functions of the network as `forward`. Arguments and result are those of
        `sample_actions`.
        """
        prefix = self.encode_prefix(pixel_values, input_ids, attention_mask, view_mask)

        def predict(a_tau: Action, tau: Tensor) -> Action:
            return self.predict(prefix, state, a_tau, tau)

        if steps is None:
            steps = self.flow_config.steps
        return flow.integrate(predict, noise, steps, self.flow_config, committed)


def load_inner_vlm(
    folder: Path, dtype: torch.dtype | None = None
) -> SpearVLMForConditionalGeneration:
    """Load the SPEAR-VLM from a folder, which contains a SPEAR-VLM or a SPEAR-1.

    Raises:
        SpearError: The folder contains neither, or its files are damaged (see `weights.load.load`).
    """
    if weights.read_model_type(folder) == Spear1Config.model_type:
        return weights.load(Spear1ForActionPrediction, folder, dtype).vlm
    return weights.load(SpearVLMForConditionalGeneration, folder, dtype)


AutoConfig.register(Spear1Config.model_type, Spear1Config, exist_ok=True)
AutoModel.register(Spear1Config, Spear1ForActionPrediction, exist_ok=True)
