"""Flow matching on R³ × S³ × R: from noise to actions (the paper's section on the policy's flow head).

Time τ runs from 0 (noise) to 1 (data). Translation and gripper flow in straight lines, rotations along great
circles of S³, where q and -q are different points. The paper draws noise from U(S³) and keeps every
quaternion in the half-space w > 0; we keep noise there too (our reading). It is geodesically convex, so every
state on the way is in it; from the other half the way would lead through rotations that the network also
knows under the other sign. Everything works on `Action`s in the model's normalised units; a velocity is one
too: d/dτ of each part, rotations tangent to the sphere.

The network predicts either the velocity (the paper) or the clean action (our addition, better at small
scale), from which the velocity follows: (x̂ - x_τ) / (1 - τ), on the sphere log_{q_τ}(q̂) / (1 - τ).

A time is per chunk [...] or per action [..., H]: some actions of a chunk may be decided already, at τ = 1.

With `rotation="linear"`, the ablation, quaternions flow in straight lines of R⁴ like translations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError
from spear.geometry import (
    quat_canonical,
    quat_conjugate,
    quat_derivative,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_normalize,
    sphere_angular_velocity,
    sphere_exp,
    sphere_log,
    sphere_slerp,
)
from spear.types import Action, FlowConfig

_MIN_REMAINING = 1e-4
"""Least 1 - τ that a velocity is derived from; sampled times stay ten times further from 1."""

MISTAKE = 1.0, 0.1
"""Standard deviation of what is wrong in given actions (`perturb_committed`): of translations, as a multiple
of their own; of each component of a turn in rad. Our choice: more than demonstrations of a scene differ. Else
a given action says how fast this one is, and the next is as fast, instead of making up for it."""

_MIN_SPEED = 1e-2
"""Rotation speed (norm of q̇; about 1 is typical) below which the cosine loss sees no direction."""


@dataclass(frozen=True)
class CommittedPrefix:
    """Actions of a chunk that are decided already, since they will be executed before the rest is known.

    actions  [..., H, ·], normalised units, unit canonical rotations; of any value where they are not held.
    is_committed  [..., H] bool: which ones.
    """

    actions: Action
    is_committed: Tensor

    def write_into(self, state: Action) -> Action:
        """A state with these actions in their places."""
        whole = torch.where(
            self.is_committed[..., None], self.actions.to_vector(), state.to_vector()
        )
        return Action.from_vector(whole)


def sample_noise(
    shape: Sequence[int],
    config: FlowConfig,
    generator: torch.Generator | None = None,
    device: Any = None,
) -> Action:
    """Noise at τ = 0 for chunks of leading shape (B, H): N(0, I), rotations uniform on S³ and made canonical,
    that is, uniform on the half with w ≥ 0 (our reading of the paper, see above)."""
    translation, rotation, gripper = (
        torch.randn(*shape, size, generator=generator, device=device) for size in (3, 4, 1)
    )
    if config.rotation == "s3":
        rotation = quat_canonical(quat_normalize(rotation))
    return Action(translation, rotation, gripper)


def sample_time(
    batch: int, config: FlowConfig, generator: torch.Generator | None = None, device: Any = None
) -> Tensor:
    """τ [B] in [0, time_scale], with the density Beta((scale - τ) / scale; alpha, beta)."""
    # A Beta variable is a ratio of Gamma ones. `torch.distributions` takes no generator; what it calls does.
    # No tensor of constants: copying one to a GPU would mean waiting.
    concentration = torch.full((batch, 2), float(config.time_alpha), device=device)
    concentration[:, 1].fill_(config.time_beta)
    gamma = torch._standard_gamma(concentration, generator=generator)
    return config.time_scale * (
        gamma[:, 1] / gamma.sum(-1).clamp_min(torch.finfo(gamma.dtype).tiny)
    )


def sample_committed(
    shape: Sequence[int], longest: int, generator: torch.Generator | None = None, device: Any = None
) -> Tensor:
    """Which actions of chunks are given clean, [*batch, H] bool for that shape: the first d, with d uniform
    on 0 … longest per chunk (training-time action conditioning, arXiv 2512.05964)."""
    count = torch.randint(longest + 1, (*shape[:-1], 1), generator=generator, device=device)
    return torch.arange(shape[-1], device=device) < count


def perturb_committed(
    data: Action,
    held: Tensor,
    generator: torch.Generator | None = None,
    known: Tensor | None = None,
) -> Action:
    """Chunks [..., H, ·] whose given actions (`held` [..., H], see `sample_committed`) are a little wrong,
    and whose first other action makes up for it: the poses after it are those demonstrated (our choice).

    Demonstrations alone never show what to do about a mistake that is about to be made. Translations are
    deltas in the base frame, so their mistakes add up; a rotation is in the frame that the one before it
    leads to. How large translations are is seen in all chunks, at the actions that are `known` [..., H] bool.
    """
    draw = torch.randn(
        *held.shape, 6, generator=generator, dtype=data.translation.dtype, device=held.device
    )
    draw = draw * held[..., None]
    next_one = (held.sum(-1, keepdim=True) == torch.arange(held.shape[-1], device=held.device))[
        ..., None
    ]
    counts = torch.ones_like(held) if known is None else known
    share = (counts / counts.sum().clamp_min(1))[..., None]
    around, every = data.translation, tuple(range(held.dim()))
    spread = (share * (around - (share * around).sum(every)).square()).sum(every).sqrt()
    wrong = MISTAKE[0] * spread * draw[..., :3]
    translation = data.translation + wrong - next_one * wrong.sum(-2, keepdim=True)
    turned, rotations = quat_exp(MISTAKE[1] * draw[..., 3:]), []
    missed = torch.zeros_like(
        data.rotation[..., 0, :]
    )  # from where the arm should be to where it is
    missed[..., 0] = 1
    for i, rotation in enumerate(data.rotation.unbind(-2)):
        mended = quat_multiply(quat_conjugate(missed), rotation)
        made = torch.where(next_one[..., i, :], mended, quat_multiply(rotation, turned[..., i, :]))
        missed = quat_multiply(quat_multiply(quat_conjugate(rotation), missed), made)
        rotations.append(made)
    return Action(translation, quat_canonical(torch.stack(rotations, -2)), data.gripper)


def interpolate(
    noise: Action, data: Action, time: Tensor, config: FlowConfig
) -> tuple[Action, Action]:
    """The state at a time between noise and data [..., H, ·], and its velocity there.

    x_τ = τ x + (1 - τ) ε with velocity x - ε; on the sphere the paper's slerp from q_ε to q (data made
    canonical) at constant speed θ, and its derivative. Written as q_τ = q_ε ⊗ exp(τ ω) and u = ½ q_τ ⊗ ω,
    which equals the paper's quotients by sin θ and stays exact where these are 0/0.
    """
    tau = _per_part(time, noise)
    target = quat_canonical(data.rotation)
    if config.rotation == "s3":
        omega = sphere_angular_velocity(noise.rotation, target)
        rotation = quat_multiply(noise.rotation, quat_exp(tau * omega))
        rotation_velocity = quat_derivative(rotation, omega)
    else:
        rotation = tau * target + (1 - tau) * noise.rotation
        rotation_velocity = target - noise.rotation
    state = Action(
        tau * data.translation + (1 - tau) * noise.translation,
        rotation,
        tau * data.gripper + (1 - tau) * noise.gripper,
    )
    velocity = Action(
        data.translation - noise.translation, rotation_velocity, data.gripper - noise.gripper
    )
    return state, velocity


def prediction_to_velocity(
    prediction: Action, state: Action, time: Tensor, config: FlowConfig
) -> Action:
    """What the network said, as a velocity: rotations tangent to the sphere at the state.

    Of a clean action it is the one that leads there from the state at its time. On the sphere that action is
    normalised and made canonical first, as data is: with the true one this is exactly the velocity of
    `interpolate`. In R⁴ it is normalised where the loss is the cosine, which teaches no length.
    """
    rotation, on_sphere = prediction.rotation, config.rotation == "s3"
    if config.prediction == "velocity":
        if not on_sphere:
            return prediction
        along = (rotation * state.rotation).sum(-1, keepdim=True)
        return replace(prediction, rotation=rotation - along * state.rotation)
    remaining = _per_part(1 - time, state).clamp_min(_MIN_REMAINING)
    goal = _meant(rotation, config)
    way = sphere_log(state.rotation, quat_canonical(goal)) if on_sphere else goal - state.rotation
    return Action(
        (prediction.translation - state.translation) / remaining,
        way / remaining,
        (prediction.gripper - state.gripper) / remaining,
    )


def compute_loss(
    prediction: Action,
    noise: Action,
    data: Action,
    time: Tensor,
    config: FlowConfig,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the network's prediction at `interpolate(noise, data, time)` is from the truth: the total, and
    its unweighted parts "translation", "rotation", "geodesic", "gripper"; 0-d tensors.

    Translation and gripper: mean squared error. Rotation plus `geodesic_weight` · geodesic, for velocities:

    - cosine: 1 - cos(v, u). The paper writes 1 - v·u; with v not normalised that has no lower bound.
    - mse: ‖v - u‖² / 4.
    - geodesic: min(‖q_{τ+δ} - q̂_{τ+δ}‖, ‖q_{τ+δ} + q̂_{τ+δ}‖), where q̂ is one integration step of length δ
      along v. Under the cosine loss this term alone teaches the speed.

    For clean predictions the same among actions, because velocity errors grow without bound as τ → 1 (our
    choice): cosine: 1 - ⟨q̂, q⟩²; mse: the squared angle between them, rad²; geodesic: min(‖q - q̂‖, ‖q +
    q̂‖), half the angle, whose gradient does not fade for small rotations, as that of the others does; but
    what it says of several possible truths is their median, and in data where most steps do not turn that is
    not to turn. "linear" has the velocities' formulas in R⁴ for both, on predictions as
    `prediction_to_velocity` takes them.

    The paper sums over a chunk; we average over all chunks' valid steps: mask [..., H] bool, None is all.
    """
    if config.prediction == "clean":
        spoken, truth = prediction, data
        ends = [_meant(prediction.rotation, config), quat_canonical(data.rotation)]
        rotation = _clean_rotation_error(ends[0], ends[1], config)
    else:
        state, truth = interpolate(noise, data, time, config)
        spoken = prediction_to_velocity(prediction, state, time, config)
        rotation = _rotation_error(spoken.rotation, truth.rotation, config)
        step = _per_part(1 - time, state)
        if config.geodesic_step is not None:
            step = step.clamp_max(config.geodesic_step)
        ends = [_advance(state.rotation, way.rotation, step, config) for way in (spoken, truth)]
    parts = {
        "translation": _average(_squared(spoken.translation, truth.translation), mask),
        "rotation": _average(rotation, mask),
        "geodesic": _average(_chord(*ends), mask),
        "gripper": _average(_squared(spoken.gripper, truth.gripper), mask),
    }
    total = (
        config.translation_weight * parts["translation"]
        + config.rotation_weight * (parts["rotation"] + config.geodesic_weight * parts["geodesic"])
        + config.gripper_weight * parts["gripper"]
    )
    return total, parts


def euler_step(
    state: Action, prediction: Action, time: Tensor, k: int, steps: int, config: FlowConfig
) -> Action:
    """Step k of `integrate`: from the state at its time to the next."""
    if config.prediction == "clean":
        return _towards(state, prediction, 1 / (steps - k), config)
    velocity = prediction_to_velocity(prediction, state, time, config)
    rotation = _advance(state.rotation, velocity.rotation, 1 / steps, config)
    if config.rotation == "s3":
        # Rounding alone would drift off the sphere over many steps.
        rotation = quat_canonical(quat_normalize(rotation))
    translation = state.translation + velocity.translation / steps
    return Action(translation, rotation, state.gripper + velocity.gripper / steps)


def integrate(
    predict: Callable[[Action, Tensor], Action],
    noise: Action,
    steps: int,
    config: FlowConfig,
    committed: CommittedPrefix | None = None,
    advance: Callable[..., Action] = euler_step,
) -> Action:
    """From noise [..., H, ·] to an action in `steps` equal Euler steps; rotations end unit and canonical.

    predict(state, time [...]) is the network's prediction, as `config.prediction` says. On the sphere each
    step is the paper's: it follows a great circle, and the state stays a canonical unit quaternion.

    What is committed stays as it is, at time 1, as in training with `sample_committed`: predict gets
    [..., H].
    advance: `euler_step`, or what computes the same.
    """
    if steps < 1:
        raise SpearError(f"integration steps: {steps}: give at least 1")
    keep = (lambda chunk: chunk) if committed is None else committed.write_into
    state = keep(noise)
    for k in range(steps):
        time = torch.full_like(noise.translation[..., 0, 0], k / steps)
        if committed is not None:
            time = torch.where(committed.is_committed, 1.0, time[..., None])
        state = keep(advance(state, predict(state, time), time, k, steps, config))
    return keep(
        Action(state.translation, quat_canonical(quat_normalize(state.rotation)), state.gripper)
    )


def _per_part(time: Tensor, chunk: Action) -> Tensor:
    """A time per chunk [...] or per action [..., H], as a factor of the chunk's parts [..., H, ·]."""
    return time[..., None] if time.dim() == chunk.translation.dim() - 1 else time[..., None, None]


def _advance(
    rotation: Tensor, velocity: Tensor, step: Tensor | float, config: FlowConfig
) -> Tensor:
    if config.rotation == "s3":
        return sphere_exp(rotation, velocity * step)
    return rotation + velocity * step


def _towards(state: Action, clean: Action, part: float, config: FlowConfig) -> Action:
    """That part of the way from a state to a clean action: the Euler step with the velocity that follows from
    it, without the quotients, in a fifth of the time."""
    rotation = _meant(clean.rotation, config)
    if config.rotation == "s3":
        rotation = sphere_slerp(state.rotation, quat_canonical(rotation), part)
    else:
        rotation = torch.lerp(state.rotation, rotation, part)
    translation = torch.lerp(state.translation, clean.translation, part)
    return Action(translation, rotation, torch.lerp(state.gripper, clean.gripper, part))


def _meant(clean: Tensor, config: FlowConfig) -> Tensor:
    """The quaternion that a clean prediction means: of unit length, unless the loss itself teaches that."""
    free = config.rotation == "linear" and config.rotation_loss == "mse"
    return clean if free else quat_normalize(clean)


def _clean_rotation_error(predicted: Tensor, target: Tensor, config: FlowConfig) -> Tensor:
    if config.rotation == "linear":
        return _rotation_error(predicted, target, config)
    between = quat_multiply(quat_conjugate(predicted), target)
    # the imaginary part's square is 1 - ⟨q̂, q⟩² without cancellation
    turn = quat_log(between) if config.rotation_loss == "mse" else between[..., 1:]
    return turn.square().sum(-1)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1)


def _rotation_error(v: Tensor, u: Tensor, config: FlowConfig) -> Tensor:
    """‖v - u‖² / 4, or 1 - cos(v, u) [...], 0 where u has no direction; bounded gradient where v has none."""
    if config.rotation_loss == "mse":
        return _squared(v, u)
    v_norm, u_norm = (torch.linalg.vector_norm(velocity, dim=-1) for velocity in (v, u))
    cos = (v * u).sum(-1) / (v_norm.clamp_min(_MIN_SPEED) * u_norm.clamp_min(_MIN_SPEED))
    return torch.where(u_norm < _MIN_SPEED, 0, 1 - cos)


def _chord(a: Tensor, b: Tensor) -> Tensor:
    """min(‖a - b‖, ‖a + b‖) [...]: q and -q are the same rotation."""
    return torch.minimum(
        torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1)
    )


def _average(error: Tensor, mask: Tensor | None) -> Tensor:
    if (
        mask is not None and mask.shape != error.shape
    ):  # that of one number per chunk would fit another axis
        raise ValueError(f"mask {list(mask.shape)}: give {list(error.shape)}")
    return (
        error.mean()
        if mask is None
        else torch.where(mask, error, 0).sum() / mask.sum().clamp_min(1)
    )
