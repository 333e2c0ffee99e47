"""Fast sampling of actions from a SPEAR-1.

Sampling has two parts. First the VLM runs the prefix (images and instruction) once, and writes its
keys and values into static buffers. Then the action expert runs once per flow step: its tokens (one
for the robot's state, one for each action) attend to these keys and values.

The result is that of `Spear1ForActionPrediction.sample_plain`, up to rounding. Two pieces of work
are skipped, because their results are not needed. The VLM's last layer computes only its keys and
values. The state token runs through the expert in the first flow step only, because its keys and
values do not depend on the actions.

`sample_actions` is the entrance. It calls `sample_fast`. For the first sample of each kind of
inputs it also calls `sample_plain`, which runs the network as in training, and compares the two.
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from spear import flow
from spear.errors import notice, summarize_error
from spear.models.fast.cuda_graphs import Inputs
from spear.models.fast.kv_cache import TokenBlock
from spear.models.fast.linear import (
    FusedLinear,
    LayerEvents,
    ModuleCache,
    is_capturing_graph,
    is_plain_linear,
    linear,
    parallel_branch,
)
from spear.models.fast.small import make_small_stack
from spear.models.fast.stack import (
    LayerStack,
    PrefilledCache,
    can_compile,
    prefill,
    select_image_inputs,
)
from spear.models.layers import embed_flow_time
from spear.models.vision import fuse_attention_projections
from spear.types import Action

MAX_RELATIVE_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far `sample_fast` may be from `sample_plain`, measured by `relative_difference`.

The bound of float32 is for networks that are float32 throughout, the bound of bfloat16 for all
others (docs/results/speed.md has measured differences)."""


def pack_inputs(
    pixel_values: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: Tensor,
    noise: Action,
    view_mask: Mapping[str, Tensor] | None,
    committed: flow.CommittedPrefix | None,
) -> Inputs:
    """The arguments of `Spear1ForActionPrediction.sample_actions` as named tensors.

    A CUDA graph is recorded for each set of names, shapes and types. An argument that is None gets
    no name. The names are:

    "pixels/VIEW"     [B, 3, h, w] uint8
    "present/VIEW"    [B] bool, False for a missing image; optional
    "input_ids"       [B, L]
    "attention_mask"  [B, L], 0 on padding; optional
    "state"           [B, 10]
    "noise"           [B, H, 8]
    "committed"       [B, H, 8]; optional, together with "is_committed"
    "is_committed"    [B, H] bool, which of these actions are committed
    """
    inputs = {f"pixels/{view}": pixels for view, pixels in pixel_values.items()}
    if view_mask is not None:
        inputs |= {f"present/{view}": present for view, present in view_mask.items()}
    inputs["input_ids"] = input_ids
    inputs["state"] = state
    inputs["noise"] = noise.to_vector()
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if committed is not None:
        inputs["committed"] = committed.actions.to_vector()
        inputs["is_committed"] = committed.is_committed
    return inputs


def sample_actions(model: Any, inputs: Inputs, steps: int) -> Tensor:
    """Sample actions [B, H, 8] in normalized units, with unit canonical quaternions.

    The first inputs of each kind run through `sample_plain`, too. If the results differ, or
    `sample_fast` raises, a notice says so, and all further inputs of that kind run through
    `sample_plain`.

    Args:
        model: A `Spear1ForActionPrediction`.
        inputs: The named tensors of `pack_inputs`.
        steps: Number of Euler steps.
    """
    # `Sampler` multiplies the weights of these two layers in advance, and would miss an adapter
    # (LoRA) in them.
    has_adapter = not (
        is_plain_linear(model.action_in_proj) and is_plain_linear(model.action_time_mlp_in)
    )
    if has_adapter:
        return sample_plain(model, inputs, steps)

    is_autocast = torch.is_autocast_enabled(inputs["noise"].device.type)
    packed = not is_autocast  # autocast cannot cast packed weights
    sampler = get_sampler(model, packed)
    kind = _get_input_kind(inputs, is_autocast)
    # Fake tensors, which only measure memory, have no values that could be compared.
    has_values = not isinstance(inputs["noise"], FakeTensor)
    if kind not in sampler.agreements and has_values:
        return _sample_and_compare(model, sampler, kind, inputs, steps)
    is_fast_right = sampler.agreements.get(kind, True)  # True also for what cannot be compared
    if is_fast_right:
        return sample_fast(model, sampler, inputs, steps)
    return sample_plain(model, inputs, steps)


def sample_plain(model: Any, inputs: Inputs, steps: int) -> Tensor:
    """Sample like `sample_actions`, by `Spear1ForActionPrediction.sample_plain`."""
    pixels, present = select_image_inputs(inputs)
    actions = model.sample_plain(
        pixels,
        inputs["input_ids"],
        inputs.get("attention_mask"),
        inputs["state"],
        Action.from_vector(inputs["noise"]),
        steps,
        view_mask=present,
        committed=_unpack_committed(inputs),
    )
    vector: Tensor = actions.to_vector()
    return vector


def _get_input_kind(inputs: Inputs, is_autocast: bool) -> Hashable:
    """The properties of the inputs that decide which code runs: names, types and autocast.

    On a GPU also the shapes belong to the kind, because each set of shapes has its own CUDA graph.
    """
    is_on_gpu = inputs["noise"].device.type == "cuda"
    signature = []
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape) if is_on_gpu else None
        signature.append((name, tensor.dtype, shape))
    return tuple(signature), is_autocast


def _sample_and_compare(
    model: Any, sampler: "Sampler", kind: Hashable, inputs: Inputs, steps: int
) -> Tensor:
    """Sample both ways, remember whether the results agree, and give a notice if they do not.

    Returns the actions of `sample_fast` if the results agree, otherwise those of `sample_plain`.
    """
    expected = sample_plain(model, inputs, steps)
    try:
        actions = sample_fast(model, sampler, inputs, steps)
        difference = relative_difference(actions, expected)
    except Exception as error:  # whatever a compiler may raise
        failure = summarize_error(error)
    else:
        is_float32 = {weight.dtype for weight in model.parameters()} == {torch.float32}
        if torch.is_autocast_enabled(expected.device.type):
            is_float32 = False
        bound = MAX_RELATIVE_DIFFERENCE[torch.float32 if is_float32 else torch.bfloat16]
        is_near = difference <= bound  # False if the difference is NaN
        failure = "" if is_near else f"{difference:.2g} from the plain network"

    sampler.agreements[kind] = not failure
    if not failure:
        return actions
    notice(
        f"fast sampling does not work here ({failure}), so acting is slower from now on."
        " `spear doctor` says more."
    )
    return expected


def relative_difference(actions: Tensor, expected: Tensor) -> float:
    """The largest difference of two results [B, H, 8], divided by the largest number of `expected`.

    The quaternions q and -q count as equal.
    """
    difference = (actions - expected).float()
    # The quaternions are columns 3 to 6. Of their two differences we take the smaller one.
    same_sign = actions[..., 3:7] - expected[..., 3:7]
    opposite_sign = actions[..., 3:7] + expected[..., 3:7]
    max_same_sign = same_sign.abs().amax(-1, keepdim=True)  # [B, H, 1]
    max_opposite_sign = opposite_sign.abs().amax(-1, keepdim=True)
    is_same_sign = max_same_sign <= max_opposite_sign
    difference[..., 3:7] = torch.where(is_same_sign, same_sign, opposite_sign).float()
    return float(difference.abs().max() / expected.float().abs().max())


class Sampler:
    """What sampling computes in advance from the weights of a SPEAR-1.

    π0 embeds a noisy action a at flow time τ as W₂ silu(W₁ [W a + b, t(τ)] + b₁) + b₂, where t(τ)
    are sine and cosine waves. Split W₁ in its columns for the action and for the time, W₁ₐ and W₁ₜ:
    then W₁ [W a + b, t] + b₁ = (W₁ₐ W) a + (W₁ₜ t + W₁ₐ b + b₁). The matrix W₁ₐ W is computed here,
    once. The second summand does not depend on the action, and `compute_time_embeddings` computes
    it once for each flow step.

    Args:
        model: A `Spear1ForActionPrediction`.
        packed: Whether the weights may be copied into the layout of the CPU's fast kernels.

    Attributes:
        expert: The action expert's layers, as functions of tokens and a KV cache.
        vlm: The layers of the VLM's language model, likewise.
        dtype: Precision of the layers around the expert (`state_proj`, `action_out_proj`, …).
        width: Width of the embedding of an action.
        agreements: Kind of inputs -> whether fast and plain sampling agree.
    """

    def __init__(self, model: Any, packed: bool) -> None:
        action_in = model.action_in_proj
        time_mlp_in = model.action_time_mlp_in
        device = action_in.weight.device
        compiled = can_compile(device)
        if device.type != "cpu":
            # This moves weights, so it must happen before a CUDA graph is recorded.
            fuse_attention_projections(model.vlm)

        # A network that is small enough gets a stack for the CPU that needs fewer calls.
        small_expert = make_small_stack(model.expert) if packed else None
        self.expert = small_expert or LayerStack(model.expert, packed, compiled)

        # A small stack computes in float32, so the VLM gets one only if its weights are float32.
        language = model.vlm.language_model
        is_small_float32 = (
            small_expert is not None and language.embed_tokens.weight.dtype == torch.float32
        )
        small_vlm = make_small_stack(language) if is_small_float32 else None
        self.vlm = small_vlm or LayerStack(language, compiled=compiled)

        self.dtype = time_mlp_in.weight.dtype
        self.width = action_in.out_features
        # The two halves of W₁ in the docstring, W₁ₐ and W₁ₜ, then W and b.
        action_half, time_half = time_mlp_in.weight.detach().float().split(self.width, dim=1)
        action_in_weight = action_in.weight.detach().float()
        action_in_bias = action_in.bias.detach().float()
        self._action_weight = (action_half @ action_in_weight).to(self.expert.dtype)  # W₁ₐ W
        self._time_weight = time_half  # W₁ₜ
        time_mlp_in_bias = time_mlp_in.bias.detach().float()  # b₁
        self._bias = action_half @ action_in_bias + time_mlp_in_bias  # W₁ₐ b + b₁
        # The layers of a small float32 network multiply plain weights. This layer does so, too.
        is_packed = packed and not is_small_float32
        self._mlp_out = FusedLinear(model.action_time_mlp_out, packed=is_packed)
        self._min_period = model.config.min_period
        self._max_period = model.config.max_period

        # Between two passes of the expert, an Euler step launches some fifty small kernels on a
        # GPU. Compiled, the Euler step launches only a few.
        self.euler_step: Any = torch.compile(flow.euler_step) if compiled else flow.euler_step
        self._time_embeddings: dict[int, Tensor] = {}  # number of steps -> [steps, width]
        # The embedding of the time of committed actions, which are at τ = 1.
        self.time_embedding_at_one = self._embed_time(
            torch.ones(1, device=device, dtype=torch.float32)
        )
        self.agreements: dict[Hashable, bool] = {}

    def compute_time_embeddings(self, steps: int) -> Tensor:
        """W₁ₜ t + W₁ₐ b + b₁ (see the class) for the time τ of each Euler step: [steps, width]."""
        if steps not in self._time_embeddings:
            # The result is stored, so it must not be a tensor of inference mode, which autograd
            # could not use later.
            with torch.inference_mode(False), torch.no_grad():
                tau = torch.arange(steps, device=self._bias.device, dtype=torch.float32) / steps
                self._time_embeddings[steps] = self._embed_time(tau)
        return self._time_embeddings[steps]

    def _embed_time(self, tau: Tensor) -> Tensor:
        # π0 counts the flow time from the data to the noise, so its embedding gets 1 - τ.
        waves = embed_flow_time(1 - tau, self.width, self._min_period, self._max_period)
        # The network rounds the waves to its precision before its first layer, so we do the same.
        waves = waves.to(self.dtype).float()
        return (waves @ self._time_weight.T + self._bias).to(self._action_weight.dtype)

    def embed(self, a_tau: Tensor, time_embedding: Tensor) -> Tensor:
        """Embed noisy actions [B, H, 8] as tokens [B, H, width].

        Args:
            a_tau: The noisy actions.
            time_embedding: One of `compute_time_embeddings`, [width], for all actions; or one per
                action, [B, H, width].
        """
        dtype = self._action_weight.dtype
        a_tau = a_tau.to(dtype)
        if time_embedding.dim() == 1:
            hidden = linear(a_tau, self._action_weight, time_embedding)
        else:
            hidden = linear(a_tau, self._action_weight) + time_embedding
        activation = nn.functional.silu(hidden).to(self.dtype)
        # A `FusedLinear` returns an output for each of its layers. This one has a single layer.
        (embedding,) = self._mlp_out(activation)
        return embedding.to(dtype)


get_sampler = ModuleCache(Sampler)
"""`get_sampler(model, packed)`: the `Sampler` of a SPEAR-1. When the model's weights change, it is
made again."""


def sample_fast(
    model: Any, sampler: Sampler, inputs: Inputs, steps: int, use_graph: bool = True
) -> Tensor:
    """Sample with the fast layers of a `Sampler`.

    `sample_actions` calls this function, and compares the first result for each kind of inputs with
    that of `sample_plain`. This function itself compares nothing.

    Args:
        model: A `Spear1ForActionPrediction`.
        sampler: The model's, from `get_sampler`.
        inputs: The named tensors of `pack_inputs`.
        steps: Number of Euler steps.
        use_graph: Whether a GPU runs the whole sampling as one CUDA graph, which is recorded for
            each set of shapes.
    """
    with torch.inference_mode():
        if use_graph and inputs["noise"].device.type == "cuda":
            # Computed and stored now, because recording a graph must not compute it.
            sampler.compute_time_embeddings(steps)
            actions = sampler.expert.run_as_graph(
                lambda static_inputs: _sample(model, sampler, static_inputs, steps), inputs, steps
            )
        else:
            actions = _sample(model, sampler, inputs, steps)
    return actions.clone()


def _sample(model: Any, sampler: Sampler, inputs: Inputs, steps: int) -> Tensor:
    """Prefill the KV cache with images and instruction, then integrate the flow."""
    pixels, present = select_image_inputs(inputs)
    horizon = inputs["noise"].shape[1]
    features, image_valid = model.vlm.encode_images(pixels, present)
    text = model.vlm.embed_text(inputs["input_ids"])

    # In a CUDA graph, the first flow step may begin before the prefill has ended, because layer n
    # of the expert needs only the keys and values of the VLM's layer n. If the two have different
    # precisions, this is not possible: the expert then reads a converted copy of the keys and
    # values, which is made after the VLM's last layer.
    may_overlap = is_capturing_graph() and text.dtype == sampler.expert.dtype
    # To a list, `prefill` appends one event per layer, for which the same layer of the expert
    # waits. With None there are no events, and the flow begins after the prefill.
    write_events: LayerEvents = [] if may_overlap else None
    prefix = prefill(
        sampler.vlm,
        features,
        text,
        image_valid=image_valid if present else None,  # None, if no image can be missing, is faster
        text_valid=inputs.get("attention_mask"),
        room=1 + horizon,  # places for the state token and the actions
        keys_only=True,
        write_events=write_events,
    )
    # With events, the flow runs in a second stream; with None, in the current one.
    with parallel_branch(prefix.write_events):
        return _integrate(model, sampler, inputs, steps, prefix)


def _integrate(
    model: Any, sampler: Sampler, inputs: Inputs, steps: int, prefix: PrefilledCache
) -> Tensor:
    """Integrate from the noise to actions [B, H, 8], given the prefilled KV cache."""
    expert_flow = _ExpertFlow(model, sampler, inputs, steps, prefix)
    actions = flow.integrate(
        expert_flow.predict_velocity_or_clean_action,
        Action.from_vector(inputs["noise"]),
        steps,
        model.flow_config,
        expert_flow.committed,
        sampler.euler_step,
    )
    return actions.to_vector()


class _ExpertFlow:
    """The action expert over the flow steps of one sample.

    `predict_velocity_or_clean_action` is called once per step, in order.

    The KV cache has S places for the prefix, then one for the state token, then H for the actions.
    """

    def __init__(
        self, model: Any, sampler: Sampler, inputs: Inputs, steps: int, prefix: PrefilledCache
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.committed = _unpack_committed(inputs)
        self.step = 0
        noise = inputs["noise"]
        self.action_dtype = noise.dtype
        horizon = noise.shape[1]
        expert = sampler.expert
        cache = expert.convert_cache_if_needed(prefix.cache)
        prefix_length = prefix.valid.shape[1]  # S
        # Added to attention scores, so that padding of the prefix is not seen.
        self.bias = prefix.make_bias(1 + horizon, expert.num_kv_heads, expert.dtype)

        # The rotary embeddings (cosines and sines) of the state token and of the actions, whose
        # positions follow those of the prefix.
        offsets = torch.arange(1 + horizon, device=noise.device)
        positions = prefix.next_positions[:, None] + offsets  # [B, 1 + H]
        self.rotations = expert.compute_rotary_factors(positions, expert.dtype)
        self.action_rotations = tuple(rotation[:, 1:] for rotation in self.rotations)

        # The first step runs two blocks of tokens: the state, which sees the prefix and itself, and
        # the actions, which see everything. Later steps run the actions alone, and overwrite the
        # keys and values of the step before.
        state_end = prefix_length + 1
        state_block = TokenBlock(num_tokens=1, visible_end=state_end)
        action_block = TokenBlock(num_tokens=horizon, visible_end=state_end + horizon)
        self.first_window = replace(
            cache.make_window(prefix_length, [state_block, action_block]),
            await_events=prefix.write_events,
        )
        self.action_window = cache.make_window(state_end, [action_block])
        self.time_embeddings = sampler.compute_time_embeddings(steps).unbind(0)
        state = inputs["state"].to(sampler.dtype)
        self.state_token = model.state_proj(state).to(expert.dtype)[:, None]

    def predict_velocity_or_clean_action(self, a_tau: Action, _tau: Tensor) -> Action:
        """v_θ(a_τ, τ). `_tau` is not read, because the steps come in order, at known times."""
        sampler = self.sampler
        time_embedding = self.time_embeddings[self.step]
        if self.committed is not None:
            time_embedding = torch.where(
                self.committed.is_committed[..., None],
                sampler.time_embedding_at_one,
                time_embedding,
            )
        tokens = sampler.embed(a_tau.to_vector(), time_embedding)
        if self.step == 0:
            tokens = torch.cat([self.state_token, tokens], dim=1)
            hidden = sampler.expert(tokens, self.rotations, self.first_window, self.bias)
            hidden = hidden[:, 1:]  # without the state token
        else:
            hidden = sampler.expert(tokens, self.action_rotations, self.action_window, self.bias)
        self.step += 1
        prediction = self.model.action_out_proj(hidden.to(sampler.dtype))
        return Action.from_vector(prediction.to(self.action_dtype))


def _unpack_committed(inputs: Inputs) -> flow.CommittedPrefix | None:
    """The committed prefix that `pack_inputs` packed, if there is one."""
    is_committed = inputs.get("is_committed")
    if is_committed is None:
        return None
    return flow.CommittedPrefix(Action.from_vector(inputs["committed"]), is_committed)
