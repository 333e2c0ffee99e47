"""SPEAR-1: SPEAR-VLM and an action expert that reads its keys and values and flows noise into actions."""

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
from spear.models.sampling import sample_actions
from spear.models.vlm import LossOutput, Prefix, SpearVLMConfig, SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.types import ACTION_DIM, Action

NUM_STATE_FEATURES = 10
"""Proprioception: position 3 (normalised) + rotation 6D + gripper 1. Six numbers for the rotation because the
quaternion of a gripper that points down sits where its sign flips (our choice)."""
SHARED_WITH_VLM = ("num_hidden_layers", "num_key_value_heads", "head_dim")
"""What of the action expert is as in the VLM, whose keys and values it reads."""


@strict
class Spear1Config(layers.PortableConfig):
    """SPEAR-1's parts.

    vlm_config      SPEAR-VLM's.
    expert_config   the action expert's Gemma, which fits the VLM's (`SHARED`).
    horizon         actions per chunk (the paper: 5, at 5 Hz).
    flow            fields of `spear.flow.FlowConfig`.
    committed       the most actions at a chunk's beginning that may be decided already, as it was trained
                    (`spear.flow.sample_committed`); 0 is the paper's.
    min_period, max_period  of the sinusoids that embed the flow time, which runs over 0 … 1 (π0's).
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
    min_period: float | int = 4e-3
    max_period: float | int = 4.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.flow = dataclasses.asdict(flow.FlowConfig(**(self.flow or {})))
        text, expert = self.vlm_config.text_config, self.expert_config
        for name in SHARED_WITH_VLM:
            if getattr(text, name) != getattr(expert, name):
                apart = f"{name} is {getattr(expert, name)}, the VLM's is {getattr(text, name)}"
                raise SpearError(f"action expert does not fit the VLM: {apart}: they must be equal")


class Spear1ForActionPrediction(PreTrainedModel):
    """SPEAR-1 (the paper, SPEAR-1; π0's architecture).

    [images, instruction] → [proprioception] → [actions], block-wise causal. The first block is the whole
    SPEAR-VLM, which stays usable as `model.vlm`; the other two go through the action expert.
    """

    config: Spear1Config
    base_model_prefix = "spear1"
    _supports_sdpa = True

    def __init__(self, config: Spear1Config) -> None:
        super().__init__(layers.choose_attention(config))
        self.flow = flow.FlowConfig(**(config.flow or {}))
        self.vlm = SpearVLMForConditionalGeneration(config.vlm_config)
        self.expert = layers.build_language_model(config.expert_config)
        self.expert.embed_tokens = None  # type: ignore[assignment]  # it never sees text
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
        # These layers see few features of unit size, so the scale must follow the number of inputs.
        init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        init.zeros_(module.bias)
        if module is self.action_out_proj:
            init.normal_(module.weight, std=0.1 / math.sqrt(module.in_features))
            if self.flow.prediction == "clean":
                # The first guess is to stay: no step, the rotation (1, 0, 0, 0), a gripper half open.
                init.copy_(
                    module.bias, torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0], device=module.bias.device)
                )

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
        """Images and instruction through the VLM, once per observation; arguments as in `forward`."""
        features, valid = self.vlm.encode_images(pixel_values, view_mask)
        prefix = self.vlm.run_language_model(features, valid, input_ids, attention_mask)
        prefix.cache.frozen = True
        return prefix

    def predict(self, prefix: Prefix, state: Tensor, noisy: Action, time: Tensor) -> Action:
        """What the expert says about noisy actions: a velocity or a clean action; rotations not normalised.

        state [B, 10]; noisy [B, H, ·] at time [B], or K chunks per observation: [B, K, H, ·] at time [B, K].
        Each action may have a time of its own: [B, H], or [B, K, H].
        """
        dtype = self.state_proj.weight.dtype
        vector = noisy.to_vector().to(dtype)
        batch, horizon = vector.shape[0], vector.shape[-2]
        samples = vector.shape[:-2].numel() // batch
        chunks = vector.reshape(batch, samples, horizon, ACTION_DIM)
        actions = self._embed_actions(chunks, time.reshape(batch, samples, -1))
        embeds = torch.cat(
            [self.state_proj(state.to(dtype))[:, None], actions.flatten(1, 2)], dim=1
        )
        first = (
            layers.compute_position_ids(prefix.valid)[:, -1:] + 1
        )  # [B, 1], where the state stands
        steps = torch.arange(1, horizon + 1, device=first.device).repeat(samples)
        mask = layers.make_suffix_mask(prefix.valid, horizon, samples)
        output = self.expert(
            inputs_embeds=embeds.to(
                dtype
            ),  # autocast or not, the residual stream is in full precision
            attention_mask=layers.prepare_mask(self.expert, mask, dtype),
            position_ids=torch.cat([first, first + steps], dim=1),
            **{layers.CACHE_ARGUMENT: prefix.cache},
            use_cache=False,
        )
        prediction = self.action_out_proj(output.last_hidden_state[:, 1:])
        return Action.from_vector(prediction.reshape(vector.shape).to(noisy.translation.dtype))

    def _embed_actions(self, actions: Tensor, time: Tensor) -> Tensor:
        """Noisy actions [B, K, H, 8] and their times [B, K, H or 1] -> [B, K, H, width], as in π0."""
        tokens = self.action_in_proj(actions)
        # π0 counts time from the data to the noise: its embedding sees 1 − τ.
        moment = layers.embed_flow_time(
            1 - time, tokens.shape[-1], self.config.min_period, self.config.max_period
        )
        moment = moment.expand_as(tokens).to(tokens.dtype)
        hidden = self.action_time_mlp_in(torch.cat([tokens, moment], dim=-1))
        return self.action_time_mlp_out(nn.functional.silu(hidden))

    def forward(
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor,
        actions: Action,
        action_mask: Tensor | None = None,
        flow_samples: int = 1,
        noise: Action | None = None,
        time: Tensor | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """The flow loss of a batch of demonstrations and its parts, as `spear.flow.compute_loss` gives them.

        pixel_values    view -> [B, 3, h, w] uint8; view_mask: view -> [B] bool, False where it is missing.
        input_ids       [B, L] the instruction, padded on either side; attention_mask [B, L].
        state           [B, 10], see `NUM_STATE_FEATURES`.
        actions         [B, H, ·] in the model's normalised units.
        action_mask     [B, H] bool, the steps that count.
        flow_samples    K draws of noise and time per observation, which share its prefix (our choice), unless
                        noise [B, K, H, ·] or time [B, K] or [B, K, H] is given.

        With `config.committed`, the first actions of each draw are clean, at time 1, and no part of the loss;
        they are a little wrong, and the next one makes up for it (`flow.perturb_committed`).
        """
        batch, horizon = actions.translation.shape[:2]
        device = actions.translation.device
        if noise is None:
            samples = flow_samples if time is None else time.shape[1]
            noise = flow.sample_noise(
                (batch, samples, horizon), self.flow, generator, device=device
            )
        each = actions.to_vector()[:, None].expand(*noise.translation.shape[:3], ACTION_DIM)
        data = Action.from_vector(each)
        if action_mask is not None:
            action_mask = action_mask[:, None].expand(noise.translation.shape[:3])
        if time is None:
            count = noise.translation.shape[:2].numel()
            time = flow.sample_time(count, self.flow, generator, device=device).view(batch, -1)
            if self.config.committed:
                held = flow.sample_committed(
                    (*time.shape, horizon), self.config.committed, generator, device
                )
                time = torch.where(held, 1.0, time[..., None])
                data = flow.perturb_committed(data, held, generator, action_mask)
        noisy, _ = flow.interpolate(noise, data, time, self.flow)
        prefix = self.encode_prefix(pixel_values, input_ids, attention_mask, view_mask)
        prediction = self.predict(prefix, state, noisy, time)
        if time.dim() == 3:
            action_mask = time < 1 if action_mask is None else action_mask & (time < 1)
        loss, parts = flow.compute_loss(prediction, noise, data, time, self.flow, action_mask)
        return LossOutput(loss=loss, parts={k: v.detach() for k, v in parts.items()})

    @torch.no_grad()
    def sample_actions(
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
        """Actions [B, H, ·] by `steps` Euler steps (None: the flow's own) from noise [B, H, ·]
        (`spear.flow.sample_noise`): normalised units, unit canonical rotations.

        Other arguments as in `forward`; attention_mask=None and view_mask=None spare the masks.
        committed: actions that come back as they are, and that the others go on from.
        """
        if (horizon := noise.translation.shape[-2]) != self.config.horizon:
            raise ValueError(f"noise of {horizon} actions: a chunk has {self.config.horizon}")
        inputs = {f"pixels/{view}": pixels for view, pixels in pixel_values.items()}
        inputs |= {f"present/{view}": present for view, present in (view_mask or {}).items()}
        inputs |= {"input_ids": input_ids, "state": state, "noise": noise.to_vector()}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if committed is not None:
            inputs |= {"committed": committed.actions.to_vector(), "held": committed.is_committed}
        return Action.from_vector(
            sample_actions(self, inputs, self.flow.steps if steps is None else steps)
        )


def load_inner_vlm(
    folder: Path, dtype: torch.dtype | None = None
) -> SpearVLMForConditionalGeneration:
    """The SPEAR-VLM in a folder, or inside the policy in it. Raises `SpearError` as `weights.load` does."""
    if weights.read_architecture(folder) == Spear1Config.model_type:
        return weights.load(Spear1ForActionPrediction, folder, dtype).vlm
    return weights.load(SpearVLMForConditionalGeneration, folder, dtype)


AutoConfig.register(Spear1Config.model_type, Spear1Config, exist_ok=True)
AutoModel.register(Spear1Config, Spear1ForActionPrediction, exist_ok=True)
