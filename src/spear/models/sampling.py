"""Sampling actions, fast: the prefix once into static buffers, then the flow steps with constants at hand.

The same actions as `flow.integrate` around `Spear1ForActionPrediction.predict` gives, up to rounding, without
the work whose result nobody reads: the VLM's last layer stops at its keys and values, and the state, which no
action changes, goes through the expert in the first flow step only.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from spear import flow
from spear.errors import notice, summarize_error
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
    Inputs,
    LayerStack,
    PrefilledCache,
    can_compile,
    prefill,
    split_image_inputs,
)
from spear.models.layers import embed_flow_time
from spear.models.vision import fuse_attention_projections
from spear.types import Action

MAX_RELATIVE_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far fast sampling may be from the plain network, as `difference` has it: where all is float32, and
otherwise (our choice; measured: docs/speed.md)."""


class Sampler:
    """What sampling needs of a SPEAR-1's weights, computed in advance: noisy actions a and time t are
    embedded as in π0, by W₁ [W a, t] + b and, after SiLU, W₂, and the products of W₁ are made here."""

    def __init__(self, model: Any, packed: bool) -> None:
        inner, hidden = model.action_in_proj, model.action_time_mlp_in
        compiled = can_compile(inner.weight.device)
        if inner.weight.device.type != "cpu":
            fuse_attention_projections(model.vlm)
        # The expert reads all its weights at every flow step, for a few rows.
        small = make_small_stack(model.expert) if packed else None
        self.expert = small or LayerStack(model.expert, packed, compiled)
        language = model.vlm.language_model
        exact = small and language.embed_tokens.weight.dtype == torch.float32
        self.vlm = (make_small_stack(language) if exact else None) or LayerStack(
            language, compiled=compiled
        )
        self.dtype, self.width = hidden.weight.dtype, inner.out_features
        inside = self.expert.dtype
        of_actions, self._of_time = hidden.weight.detach().float().split(self.width, dim=1)
        self._into = (of_actions @ inner.weight.detach().float()).to(inside)
        self._bias = of_actions @ inner.bias.detach().float() + hidden.bias.detach().float()
        self._onward = FusedLinear(model.action_time_mlp_out, packed=packed and not exact)
        self._periods = model.config.min_period, model.config.max_period
        # Between two passes of the network a GPU has some fifty small kernels to run; compiled, a few.
        self.advance: Any = torch.compile(flow.euler_step) if compiled else flow.euler_step
        self._moments: dict[int, Tensor] = {}
        self.time_embedding_at_one = self._hidden(
            torch.ones(1, device=inner.weight.device)
        )  # what is at time 1
        self.agreements: dict[Hashable, bool] = {}  # kinds of inputs that were tried, see `_kind`

    def time_embeddings(self, steps: int) -> Tensor:
        """What the time adds to the embedding's hidden layer, at each of the flow steps: [steps, width]."""
        if steps not in self._moments:
            with torch.inference_mode(False), torch.no_grad():
                time = torch.arange(steps, device=self._bias.device, dtype=torch.float32) / steps
                self._moments[steps] = self._hidden(time)
        return self._moments[steps]

    def _hidden(self, time: Tensor) -> Tensor:
        waves = embed_flow_time(1 - time, self.width, *self._periods).to(self.dtype).float()
        return (waves @ self._of_time.T + self._bias).to(self._into.dtype)

    def embed(self, actions: Tensor, moment: Tensor) -> Tensor:
        """Noisy actions [B, H, 8] at one of the `moments`, or each at its own, -> [B, H, width]."""
        actions, one = actions.to(self._into.dtype), moment.dim() == 1
        hidden = (
            linear(actions, self._into, moment) if one else linear(actions, self._into) + moment
        )
        return self._onward(nn.functional.silu(hidden).to(self.dtype))[0].to(self._into.dtype)


get_sampler = ModuleCache(Sampler)
"""`get_sampler(model, packed)`: the `Sampler` of a SPEAR-1, made again when its weights change."""


def sample_actions(model: Any, inputs: Inputs, steps: int) -> Tensor:
    """Actions [B, H, 8], normalised units, rotations unit and canonical.

    model   a `Spear1ForActionPrediction`.
    inputs  "pixels/VIEW" [B, 3, h, w] uint8, "present/VIEW" [B] bool or left out, "input_ids" [B, L],
            "attention_mask" [B, L] or left out where there is no padding, "state" [B, 10], "noise" [B, H, 8];
            "committed" [B, H, 8] and "held" [B, H] bool, or left out (`spear.flow.CommittedPrefix`).

    The first inputs of each kind go through `sample_plain` too. Where that differs, or the fast way raises, a
    notice says so, and inputs of that kind go through `sample_plain` from then on.
    """
    if not (
        is_plain_linear(model.action_in_proj) and is_plain_linear(model.action_time_mlp_in)
    ):  # a LoRA
        return sample_plain(model, inputs, steps)
    autocast = torch.is_autocast_enabled(inputs["noise"].device.type)
    sampler = get_sampler(model, not autocast)  # autocast cannot cast packed weights
    kind = _kind(inputs, autocast)
    if kind not in sampler.agreements and not isinstance(inputs["noise"], FakeTensor):
        return _first(model, sampler, kind, inputs, steps)
    if sampler.agreements.get(kind, True):
        return sample_fast(model, sampler, inputs, steps)
    return sample_plain(model, inputs, steps)


def sample_fast(
    model: Any, sampler: Sampler, inputs: Inputs, steps: int, graphs: bool = True
) -> Tensor:
    """`sample` without proof. graphs: on a GPU all of it is a CUDA graph, recorded per set of shapes."""
    with torch.inference_mode():
        if graphs and inputs["noise"].device.type == "cuda":
            sampler.time_embeddings(steps)  # made before a graph is recorded
            result = sampler.expert.replay(
                lambda given: _sample(model, sampler, given, steps), inputs, steps
            )
        else:
            result = _sample(model, sampler, inputs, steps)
    return result.clone()


@torch.no_grad()
def sample_plain(model: Any, inputs: Inputs, steps: int) -> Tensor:
    """What `sample` gives, by the network as it is trained, step by step."""
    pixels, present = split_image_inputs(inputs)
    prefix = model.encode_prefix(pixels, inputs["input_ids"], inputs.get("attention_mask"), present)

    def predict(noisy: Action, time: Tensor) -> Action:
        return model.predict(prefix, inputs["state"], noisy, time)

    noise = Action.from_vector(inputs["noise"])
    return flow.integrate(predict, noise, steps, model.flow, _committed(inputs)).to_vector()


def relative_difference(found: Tensor, truth: Tensor) -> float:
    """The largest difference of actions [B, H, 8], as a share of the largest number; q and -q are alike."""
    apart = (found - truth).float()
    same, other = found[..., 3:7] - truth[..., 3:7], found[..., 3:7] + truth[..., 3:7]
    nearer = same.abs().amax(-1, keepdim=True) <= other.abs().amax(-1, keepdim=True)
    apart[..., 3:7] = torch.where(nearer, same, other).float()
    return float(apart.abs().max() / truth.float().abs().max())


def _kind(inputs: Inputs, autocast: bool) -> Hashable:
    """What decides which code runs. On a GPU the shapes do too: each has a graph of its own."""
    on_gpu = inputs["noise"].device.type == "cuda"
    given = [(name, t.dtype, tuple(t.shape) if on_gpu else None) for name, t in inputs.items()]
    return (tuple(given), autocast)


def _first(model: Any, sampler: Sampler, kind: Hashable, inputs: Inputs, steps: int) -> Tensor:
    """The first actions of a kind, both ways; keeps whether they agree, with a notice where not."""
    slow = sample_plain(model, inputs, steps)
    try:
        found = sample_fast(model, sampler, inputs, steps)
        apart = relative_difference(found, slow)
        exact = {weight.dtype for weight in model.parameters()} == {torch.float32}
        exact = exact and not torch.is_autocast_enabled(slow.device.type)
        far = (
            not apart <= MAX_RELATIVE_DIFFERENCE[torch.float32 if exact else torch.bfloat16]
        )  # what is no number is far
        reason = f"{apart:.2g} from the plain network" if far else ""
    except Exception as error:  # whatever a compiler may raise
        reason = summarize_error(error)
    sampler.agreements[kind] = not reason
    if not reason:
        return found
    notice(
        f"fast sampling does not work here ({reason}): slower from now on; `spear doctor` says more"
    )
    return slow


def _committed(inputs: Inputs) -> flow.CommittedPrefix | None:
    held = inputs.get("held")
    return (
        None
        if held is None
        else flow.CommittedPrefix(Action.from_vector(inputs["committed"]), held)
    )


def _sample(model: Any, sampler: Sampler, inputs: Inputs, steps: int) -> Tensor:
    pixels, present = split_image_inputs(inputs)
    horizon = inputs["noise"].shape[1]
    features, image_valid = model.vlm.encode_images(pixels, present)
    text, valid = model.vlm.embed_text(inputs["input_ids"]), image_valid if present else None
    mask = inputs.get("attention_mask")
    # Keys and values that the expert reads in another precision are copied, once all are there.
    write_events: LayerEvents = (
        [] if is_capturing_graph() and text.dtype == sampler.expert.dtype else None
    )
    prefix = prefill(
        sampler.vlm,
        features,
        text,
        valid,
        mask,
        1 + horizon,
        keys_only=True,
        write_events=write_events,
    )
    with parallel_branch(
        prefix.write_events
    ):  # the first flow step's layers run while later ones of the prefix do
        return _flow(model, sampler, inputs, steps, prefix)


def _flow(
    model: Any, sampler: Sampler, inputs: Inputs, steps: int, prefix: PrefilledCache
) -> Tensor:
    noise, expert = inputs["noise"], sampler.expert
    horizon = noise.shape[1]
    cache, start, dtype = expert.adopt_cache(prefix.cache), prefix.valid.shape[1], expert.dtype
    end = start + 1 + horizon
    bias = prefix.bias(1 + horizon, expert.groups, dtype)
    ahead = torch.arange(1 + horizon, device=noise.device)
    turns = expert.rotations(prefix.next_positions[:, None] + ahead, dtype)
    turns_after = tuple(turn[:, 1:] for turn in turns)
    # The first step runs the state and the actions, later steps the actions alone.
    with_state = replace(
        cache.window(start, [(1, start + 1), (horizon, end)]), await_events=prefix.write_events
    )
    actions_only = cache.window(start + 1, [(horizon, end)])
    moments = iter(sampler.time_embeddings(steps).unbind(0))
    state = model.state_proj(inputs["state"].to(sampler.dtype)).to(dtype)[:, None]
    committed = _committed(inputs)

    def predict(noisy: Action, time: Tensor) -> Action:
        nonlocal state
        moment = next(moments)
        if committed is not None:
            moment = torch.where(
                committed.is_committed[..., None], sampler.time_embedding_at_one, moment
            )
        tokens = sampler.embed(noisy.to_vector(), moment)
        if state is not None:
            hidden = expert(torch.cat([state, tokens], dim=1), turns, with_state, bias)[:, 1:]
            state = None
        else:
            hidden = expert(tokens, turns_after, actions_only, bias)
        return Action.from_vector(model.action_out_proj(hidden.to(sampler.dtype)).to(noise.dtype))

    noisy = Action.from_vector(noise)
    return flow.integrate(predict, noisy, steps, model.flow, committed, sampler.advance).to_vector()
