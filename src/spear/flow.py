"""Flow matching on R³ × S³ × R, from noise to action chunks (the paper's action expert).

Each action is a = [x, q, g]: translation x in R³, rotation q in S³ (a unit quaternion) and gripper
g in R. An action flows from noise at the flow time τ = 0 to data at τ = 1. The network v_θ learns
the velocity of that flow. Acting means to draw noise and to follow the velocity in Euler steps.

The equations in the paper's letters (the numbers are ours):

    Translation at τ, and its velocity; the gripper is alike:
    (1)  x_τ = τ x + (1 - τ) ε,  ε ~ N(0, I)
    (2)  u = x - ε

    Rotation at τ (slerp), and its velocity, which is tangent to S³:
    (3)  q_τ = sin((1-τ)θ)/sin θ q_ε + sin(τθ)/sin θ q,  q_ε ~ U(S³),  θ = arccos(q_ε · q)
    (4)  u = θ/sin θ (cos(τθ) q - cos((1-τ)θ) q_ε)

    Losses; the rotation's is a cosine loss plus a geodesic loss after a step of length δ:
    (5)  L_R3 = ‖v_θ - u‖²
    (6)  L_S3 = 1 - v_θ · u + min(‖q_{τ+δ} - q̂_{τ+δ}‖, ‖q_{τ+δ} + q̂_{τ+δ}‖)

    Integration step on S³, when acting and for q̂_{τ+δ}:
    (7)  ω = 2 Im(q* ⊗ q̇),  Δφ = ‖ω‖ Δτ,  q ← q ⊗ [cos(Δφ/2), ω̂ sin(Δφ/2)]

Where the code differs from the paper:

- The paper keeps every quaternion in the half-space w > 0. We keep the noise there, too (our
  reading). The half-space is geodesically convex, so it contains every state between noise and
  data. From noise with w < 0, many paths would take the longer way, through states q whose rotation
  the network also knows as -q.
- (3) and (4) are computed as q_τ = q_ε ⊗ exp(τ ω) and u = ½ q_τ ⊗ ω, where ω is the angular
  velocity that turns q_ε into q in unit time. The results are the same, and they stay exact at
  θ = 0, where the quotients by sin θ are 0/0.
- With `prediction="clean"` the network predicts the clean action, which is the action at τ = 1,
  instead of the velocity (our addition, better for small models). From a predicted clean action
  (x̂, q̂) follows the velocity: (x̂ - x_τ) / (1 - τ), and on the sphere log_{q_τ}(q̂) / (1 - τ).
- With `rotation="linear"`, the paper's ablation, quaternions flow in straight lines of R⁴, as
  translations do.

All functions work on `Action`s in the model's normalized units; the *state* of a flow is the
`Action` at some τ between noise and data. A velocity is an `Action`, too: d/dτ of each part. A flow
time is per chunk [...] or per action [..., H], because some actions of a chunk may be committed
already, and those are at τ = 1. A chunk's shape is written [..., H, ·], where · is 3, 4 or 1 for
translation, rotation or gripper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

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
from spear.types import Action, ActionReference, FlowConfig

# Standard deviations of the errors that training adds to committed actions
# (`perturb_and_correct`). Our choice: the errors are larger than the differences between
# demonstrations of one scene. With smaller errors, a committed action would reveal how fast its
# demonstration is, and the network would learn to continue at that speed instead of making up for
# the error.
PERTURBATION_TRANSLATION = 1.0  # a multiple of the standard deviation of the translations
PERTURBATION_ROTATION_RAD = 0.1  # per component of the rotation vector

_MIN_REMAINING = 1e-4  # least divisor 1 - τ; for times of `sample_time`, 1 - τ is at least 1e-3
_MIN_SPEED = 1e-2  # ‖q̇‖ below which the cosine loss sees no direction; about 1 is typical


@dataclass(frozen=True)
class CommittedPrefix:
    """Actions of a chunk that are decided already: they are executed before the rest is known.

    Attributes:
        actions: [..., H, ·], normalized units, unit canonical rotations. Where an action is not
            committed, the values do not matter.
        is_committed: [..., H] bool.
    """

    actions: Action
    is_committed: Tensor

    def write_into_copy(self, chunk: Action) -> Action:
        """A copy of the chunk, with those of `self.actions` in place of the committed actions."""
        vector = torch.where(
            self.is_committed[..., None], self.actions.to_vector(), chunk.to_vector()
        )
        return Action.from_vector(vector)


def sample_noise(
    shape: Sequence[int],
    config: FlowConfig,
    generator: torch.Generator | None = None,
    device: Any = "cpu",
) -> Action:
    """Draw noise ε at τ = 0.

    Translation and gripper are N(0, I). Rotations are uniform on the half of S³ with w ≥ 0 (our
    reading of the paper, see the module's description), or N(0, I) in R⁴.

    Args:
        shape: the chunks' dimensions except the last, such as (B, H).
        config: says whether rotations are on S³ or in R⁴.
        generator: source of the random numbers.
        device: where the noise is drawn.

    Returns:
        The noise, chunks [*shape, ·].

    Example:
        >>> noise = sample_noise((2, 5), FlowConfig())
        >>> noise.translation.shape, noise.rotation.shape, noise.gripper.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 4]), torch.Size([2, 5, 1]))
    """

    def draw(size: int) -> Tensor:
        return torch.randn((*shape, size), generator=generator, device=device, dtype=torch.float32)

    translation = draw(3)
    rotation = draw(4)
    gripper = draw(1)
    if config.rotation == "s3":
        rotation = quat_canonical(quat_normalize(rotation))
    return Action(translation, rotation, gripper)


def sample_time(
    batch: int, config: FlowConfig, generator: torch.Generator | None = None, device: Any = "cpu"
) -> Tensor:
    """Draw flow times τ = scale · (1 - u), [batch], with u ~ Beta(alpha, beta).

    The config's `time_scale`, `time_alpha` and `time_beta` are the three parameters.
    """
    # If G₁ and G₂ are Gamma variables with concentrations alpha and beta, then G₁ / (G₁ + G₂) is
    # the Beta variable u, and G₂ / (G₁ + G₂) is 1 - u. `torch.distributions` takes no generator,
    # but `torch._standard_gamma`, which it calls, does. The constants are filled in on the device,
    # because copying a tensor to a GPU would mean waiting.
    concentration = torch.full(
        (batch, 2), float(config.time_alpha), device=device, dtype=torch.float32
    )
    concentration[:, 1].fill_(config.time_beta)
    gamma = torch._standard_gamma(concentration, generator=generator)
    total = gamma.sum(-1).clamp_min(torch.finfo(gamma.dtype).tiny)
    one_minus_u = gamma[:, 1] / total  # [batch]; gamma[:, 0] and gamma[:, 1] are G₁ and G₂
    return config.time_scale * one_minus_u


def sample_committed_mask(
    shape: Sequence[int],
    max_committed: int,
    generator: torch.Generator | None = None,
    device: Any = "cpu",
) -> Tensor:
    """Draw which actions of a chunk are committed: the first d, with d uniform on 0 …
    max_committed.

    The network gets committed actions clean (training-time action conditioning, arXiv 2512.05964).

    Args:
        shape: the mask's shape, (..., H); d is drawn for each chunk.
        max_committed: the longest committed prefix, in actions.
        generator: source of the random numbers.
        device: where the numbers are drawn.

    Returns:
        [..., H] bool.
    """
    *batch_shape, horizon = shape
    num_committed = torch.randint(
        max_committed + 1, (*batch_shape, 1), generator=generator, device=device
    )
    return torch.arange(horizon, device=device) < num_committed


def perturb_and_correct(
    data: Action,
    is_committed: Tensor,
    reference: ActionReference = "previous",
    generator: torch.Generator | None = None,
    is_valid: Tensor | None = None,
) -> Action:
    """Add errors to the committed actions of demonstrations, and correct them in the next action.

    The network learns from this to make up for errors of committed actions, which demonstrations
    alone never show (our choice). After the first action that is not committed, and after all later
    ones, the pose is the demonstrated one.

    If actions are measured from the observed pose, the errors of the committed ones add up in the
    same way, but the others need no correction, because each says its whole motion.

    Args:
        data: demonstrated chunks [..., H, ·].
        is_committed: [..., H] bool, see `sample_committed_mask`.
        reference: from which pose actions are measured (`spear.data.action_reference`).
        generator: source of the random numbers.
        is_valid: [..., H] bool, the actions from which the standard deviation of translations is
            estimated; None is all.
    """
    noise = torch.randn(
        *is_committed.shape,
        6,
        generator=generator,
        dtype=data.translation.dtype,
        device=is_committed.device,
    )
    noise = noise * is_committed[..., None]  # [..., H, 6]: translation, then rotation vector
    num_committed = is_committed.sum(-1, keepdim=True)
    index = torch.arange(is_committed.shape[-1], device=is_committed.device)
    is_first_free = (num_committed == index)[..., None]  # [..., H, 1], first uncommitted action

    if is_valid is None:
        is_valid = torch.ones_like(is_committed)
    translation_std = _compute_std_per_component(data.translation, is_valid)
    if reference == "observed":
        # Each action leads from the observed pose to a pose of its own, so it has the errors of all
        # committed actions up to it. Actions that are not committed have none.
        accumulated = noise.cumsum(-2) * is_committed[..., None]
        turn = quat_exp(PERTURBATION_ROTATION_RAD * accumulated[..., 3:])
        return Action(
            translation=data.translation
            + PERTURBATION_TRANSLATION * translation_std * accumulated[..., :3],
            rotation=quat_canonical(quat_multiply(data.rotation, turn)),
            gripper=data.gripper,
        )

    # Translations are displacements in the base frame, so their errors add up, and the first free
    # action subtracts the sum.
    error = PERTURBATION_TRANSLATION * translation_std * noise[..., :3]
    total_error = error.sum(-2, keepdim=True)  # [..., 1, 3]
    translation = data.translation + error - is_first_free * total_error

    # Each action's rotation is expressed in the frame that the action before it leads to. So we go
    # through the chunk and track the deviation: the rotation from the demonstrated frame to the
    # perturbed one, at first the identity.
    perturbation = quat_exp(PERTURBATION_ROTATION_RAD * noise[..., 3:])  # [..., H, 4]
    rotations = []
    deviation = torch.zeros_like(data.rotation[..., 0, :])
    deviation[..., 0] = 1
    for i, demonstrated_q in enumerate(data.rotation.unbind(-2)):  # [..., 4]
        # The first free action goes from the perturbed frame to the next demonstrated frame.
        correcting_q = quat_multiply(quat_conjugate(deviation), demonstrated_q)
        perturbed_q = quat_multiply(demonstrated_q, perturbation[..., i, :])
        new_q = torch.where(is_first_free[..., i, :], correcting_q, perturbed_q)
        rotations.append(new_q)

        # The next deviation, demonstrated_q⁻¹ · deviation · new_q: back along the demonstrated
        # action, over to the perturbed frame, and on along the new action.
        deviation_before = quat_multiply(quat_conjugate(demonstrated_q), deviation)
        deviation = quat_multiply(deviation_before, new_q)
    rotation = quat_canonical(torch.stack(rotations, -2))
    return Action(translation, rotation, data.gripper)


def interpolate(
    noise: Action, data: Action, tau: Tensor, config: FlowConfig
) -> tuple[Action, Action]:
    """The state at τ between noise and data, and its velocity there: equations (1) to (4).

    Args:
        noise: ε and q_ε, chunks [..., H, ·].
        data: x, q and g, chunks [..., H, ·]; their rotations are made canonical first.
        tau: flow time per chunk [...] or per action [..., H].
        config: says whether rotations are on S³ or in R⁴.

    Returns:
        The state at τ and the velocity u.

    Example:
        >>> config = FlowConfig()
        >>> noise = sample_noise((1,), config)
        >>> data = Action.from_vector(torch.tensor([[0.1, 0, 0, 1, 0, 0, 0, 1]]))
        >>> state, velocity = interpolate(noise, data, torch.tensor(1.0), config)
        >>> torch.allclose(state.translation, data.translation)
        True
    """
    tau = _broadcast_time(tau, noise)
    epsilon = noise.translation
    x = data.translation
    q_epsilon = noise.rotation
    q = quat_canonical(data.rotation)

    if config.rotation == "s3":
        omega = sphere_angular_velocity(q_epsilon, q)  # ‖ω‖ = 2θ
        q_tau = quat_multiply(q_epsilon, quat_exp(tau * omega))  # (3)
        u_rotation = quat_derivative(q_tau, omega)  # (4)
    else:
        q_tau = tau * q + (1 - tau) * q_epsilon
        u_rotation = q - q_epsilon

    x_tau = tau * x + (1 - tau) * epsilon  # (1)
    g_tau = tau * data.gripper + (1 - tau) * noise.gripper
    u_translation = x - epsilon  # (2)
    u_gripper = data.gripper - noise.gripper
    state = Action(x_tau, q_tau, g_tau)
    velocity = Action(u_translation, u_rotation, u_gripper)
    return state, velocity


def prediction_to_velocity(
    prediction: Action, state: Action, tau: Tensor, config: FlowConfig
) -> Action:
    """The velocity v_θ that a prediction of the network means; on S³ it is tangent at the state.

    On S³ a predicted velocity is projected on the tangent space. For a predicted clean action, the
    velocity leads from the state at τ to that action in the remaining time 1 - τ. On S³ the
    predicted rotation is first normalized and made canonical, as the data's rotations are, so that
    the true action has exactly the velocity of `interpolate`. In R⁴ the predicted rotation is
    normalized only with the cosine loss, which does not teach its length.

    Args:
        prediction: [..., H, ·], a velocity or a clean action, as `config.prediction` says.
        state: the state at τ that the network got, [..., H, ·].
        tau: the state's flow time, per chunk [...] or per action [..., H].
        config: says what the network predicts, and whether rotations are on S³ or in R⁴.
    """
    q_tau = state.rotation
    if config.prediction == "velocity":
        if config.rotation != "s3":
            return prediction
        v_rotation = prediction.rotation
        radial = (v_rotation * q_tau).sum(-1, keepdim=True)
        return replace(prediction, rotation=v_rotation - radial * q_tau)

    remaining = _broadcast_time(1 - tau, state).clamp_min(_MIN_REMAINING)
    q_hat = _extract_clean_quaternion(prediction.rotation, config)
    if config.rotation == "s3":
        # The data that the network learns have w >= 0, so its prediction means that sign.
        displacement = sphere_log(q_tau, quat_canonical(q_hat))
    else:
        displacement = q_hat - q_tau
    return Action(
        (prediction.translation - state.translation) / remaining,
        displacement / remaining,
        (prediction.gripper - state.gripper) / remaining,
    )


def compute_loss(
    prediction: Action,
    noise: Action,
    data: Action,
    tau: Tensor,
    config: FlowConfig,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a prediction made at the state `interpolate(noise, data, tau)`: equations (5) and
    (6).

    For predicted velocities v and the true velocity u:

    - Translation and gripper have the mean squared error.
    - The rotation's cosine loss is 1 - cos(v, u). The paper writes 1 - v·u, which has no lower
      bound while v is not normalized. With `rotation_loss="mse"` the loss is ‖v - u‖² / 4.
    - The geodesic loss compares the rotations after one integration step of length δ along v and
      along u. With the cosine loss, only the geodesic loss teaches the speed.

    For predicted clean actions the losses compare actions, because errors of velocities grow
    without bound as τ → 1 (our choice). With the predicted rotation q̂ and the true rotation q:

    - Translation and gripper have the mean squared error.
    - The rotation's cosine loss is 1 - ⟨q̂, q⟩². With `rotation_loss="mse"` the loss is the squared
      angle between the two rotations (rad²).
    - The geodesic loss is min(‖q - q̂‖, ‖q + q̂‖), about half the angle. The gradients of the
      other two fade for small angles; the gradient of this loss does not. But where several
      rotations are possible, this loss teaches their median; if most steps do not rotate, the
      median is no rotation.

    With `rotation="linear"`, the rotation's loss is that of a velocity in R⁴, also for clean
    actions. The geodesic loss stays as it is.

    Args:
        prediction: [..., H, ·], a velocity or a clean action, as `config.prediction` says.
        noise: ε, [..., H, ·].
        data: the demonstrated actions, [..., H, ·].
        tau: flow time, per chunk [...] or per action [..., H].
        config: says what the losses are and how they are weighted.
        mask: [..., H] bool, the actions that count; None is all.

    Returns:
        The total loss, and its unweighted parts "translation", "rotation", "geodesic" and
        "gripper"; all are 0-d tensors. The paper sums over a chunk; we average over the actions of
        all chunks that count.

    Example:
        >>> config = FlowConfig()
        >>> noise = sample_noise((1,), config)
        >>> data = Action.from_vector(torch.tensor([[0.1, 0, 0, 1, 0, 0, 0, 1]]))
        >>> tau = torch.tensor(0.5)
        >>> _, velocity = interpolate(noise, data, tau, config)
        >>> loss, parts = compute_loss(velocity, noise, data, tau, config)
        >>> loss.item() < 1e-6  # the true velocity
        True
    """
    if config.prediction == "clean":
        # What the losses compare are clean actions.
        predicted_target = prediction
        target = data
        q_hat = _extract_clean_quaternion(prediction.rotation, config)
        q = quat_canonical(data.rotation)
        rotation_errors = _compute_clean_rotation_error(q_hat, q, config)
    else:
        state, target = interpolate(noise, data, tau, config)
        # What the losses compare are velocities.
        predicted_target = prediction_to_velocity(prediction, state, tau, config)
        rotation_errors = _compute_rotation_error_in_r4(
            predicted_target.rotation, target.rotation, config
        )
        # One integration step from the state, along the predicted and along the true velocity. The
        # step's length δ is at most the remaining time.
        delta = _broadcast_time(1 - tau, state)
        if config.geodesic_step is not None:
            delta = delta.clamp_max(config.geodesic_step)
        q_hat = _integrate_rotation(state.rotation, predicted_target.rotation, delta, config)
        q = _integrate_rotation(state.rotation, target.rotation, delta, config)

    translation_errors = _compute_mse_per_action(predicted_target.translation, target.translation)
    gripper_errors = _compute_mse_per_action(predicted_target.gripper, target.gripper)
    losses = {
        "translation": _average(translation_errors, mask),
        "rotation": _average(rotation_errors, mask),
        "geodesic": _average(_compute_shorter_chord(q_hat, q), mask),
        "gripper": _average(gripper_errors, mask),
    }
    total = (
        config.translation_weight * losses["translation"]
        + config.rotation_weight
        * (losses["rotation"] + config.geodesic_weight * losses["geodesic"])
        + config.gripper_weight * losses["gripper"]
    )
    return total, losses


def euler_step(
    state: Action, prediction: Action, tau: Tensor, k: int, steps: int, config: FlowConfig
) -> Action:
    """Step k of `integrate`: from the state at τ to the state at τ + 1 / steps.

    Rotations on S³ follow equation (7).
    """
    if config.prediction == "clean":
        # This step is one of the `steps - k` steps that remain to τ = 1.
        return _step_towards_clean(state, prediction, 1 / (steps - k), config)
    velocity = prediction_to_velocity(prediction, state, tau, config)
    rotation = _integrate_rotation(state.rotation, velocity.rotation, 1 / steps, config)
    if config.rotation == "s3":
        # Rounding errors alone would lead off the sphere over many steps.
        rotation = quat_canonical(quat_normalize(rotation))
    translation = state.translation + velocity.translation / steps
    gripper = state.gripper + velocity.gripper / steps
    return Action(translation, rotation, gripper)


def integrate(
    predict: Callable[[Action, Tensor], Action],
    noise: Action,
    steps: int,
    config: FlowConfig,
    committed: CommittedPrefix | None = None,
    advance: Callable[..., Action] = euler_step,
) -> Action:
    """Integrate from noise to an action chunk in equal Euler steps.

    On S³ each step follows a great circle, and the state stays a canonical unit quaternion.

    Args:
        predict: the network as a function predict(state, tau), which returns a velocity or a clean
            action, as `config.prediction` says. Its `tau` is per chunk [...], or per action
            [..., H] if there is a committed prefix.
        noise: the state at τ = 0, [..., H, ·].
        steps: number of steps.
        config: says what the network predicts, and whether rotations are on S³ or in R⁴.
        committed: actions that are not changed. They stay at τ = 1, as in training with
            `sample_committed_mask`.
        advance: `euler_step`, or a function that computes the same, for example compiled.

    Returns:
        The chunk at τ = 1; its rotations are unit and canonical.

    Raises:
        SpearError: `steps` is below 1.

    Example:
        >>> config = FlowConfig(prediction="clean")
        >>> goal = Action.from_vector(torch.tensor([[0.1, 0, 0, 1, 0, 0, 0, 1]]))
        >>> noise = sample_noise((1,), config)
        >>> chunk = integrate(lambda state, tau: goal, noise, steps=10, config=config)
        >>> torch.allclose(chunk.to_vector(), goal.to_vector(), atol=1e-6)
        True
    """
    if steps < 1:
        raise SpearError(f"{steps} are no integration steps. Give at least 1.")

    state = noise if committed is None else committed.write_into_copy(noise)
    for k in range(steps):
        tau = torch.full_like(noise.translation[..., 0, 0], k / steps)  # [...], one per chunk
        if committed is not None:
            tau = torch.where(committed.is_committed, 1.0, tau[..., None])  # [..., H]
        state = advance(state, predict(state, tau), tau, k, steps, config)
        if committed is not None:
            state = committed.write_into_copy(state)

    rotation = quat_canonical(quat_normalize(state.rotation))
    chunk = Action(state.translation, rotation, state.gripper)
    return chunk if committed is None else committed.write_into_copy(chunk)


def _broadcast_time(tau: Tensor, chunk: Action) -> Tensor:
    """Reshape a time per chunk [...] or per action [..., H], so that it multiplies [..., H, ·]."""
    is_per_action = tau.dim() == chunk.translation.dim() - 1
    if is_per_action:
        return tau[..., None]  # [..., H, 1]
    return tau[..., None, None]  # [..., 1, 1]


def _integrate_rotation(
    rotation: Tensor, velocity: Tensor, delta: Tensor | float, config: FlowConfig
) -> Tensor:
    """The rotation after one integration step of length `delta`: equation (7) on S³."""
    if config.rotation == "s3":
        return sphere_exp(rotation, velocity * delta)
    return rotation + velocity * delta


def _step_towards_clean(
    state: Action, clean: Action, fraction: float, config: FlowConfig
) -> Action:
    """Go a fraction of the way from a state to a clean action.

    This is the Euler step with the velocity that `prediction_to_velocity` derives from the clean
    action. Interpolating directly, without a division by 1 - τ, takes a fifth of the time.
    """
    q_hat = _extract_clean_quaternion(clean.rotation, config)
    if config.rotation == "s3":
        rotation = sphere_slerp(state.rotation, quat_canonical(q_hat), fraction)
    else:
        rotation = torch.lerp(state.rotation, q_hat, fraction)
    translation = torch.lerp(state.translation, clean.translation, fraction)
    gripper = torch.lerp(state.gripper, clean.gripper, fraction)
    return Action(translation, rotation, gripper)


def _extract_clean_quaternion(predicted: Tensor, config: FlowConfig) -> Tensor:
    """The quaternion q̂ of a predicted clean action.

    The result is normalized, unless the loss teaches the network a quaternion's length.
    """
    loss_teaches_length = config.rotation == "linear" and config.rotation_loss == "mse"
    return predicted if loss_teaches_length else quat_normalize(predicted)


def _compute_clean_rotation_error(q_hat: Tensor, q: Tensor, config: FlowConfig) -> Tensor:
    """Compute the rotation's loss of each predicted clean action, [..., H], see `compute_loss`."""
    if config.rotation == "linear":
        return _compute_rotation_error_in_r4(q_hat, q, config)
    difference = quat_multiply(quat_conjugate(q_hat), q)
    if config.rotation_loss == "mse":
        return quat_log(difference).square().sum(-1)
    if config.rotation_loss == "cosine":
        # The squared imaginary part equals 1 - ⟨q̂, q⟩², and has no cancellation near 0.
        return difference[..., 1:].square().sum(-1)
    assert_never(config.rotation_loss)


def _compute_rotation_error_in_r4(v: Tensor, u: Tensor, config: FlowConfig) -> Tensor:
    """Compute the error of predicted rotation vectors v, compared with true ones u: [..., H].

    The vectors have 4 components: they are velocities of quaternions or, with `rotation="linear"`,
    clean quaternions. The error is ‖v - u‖² / 4 or 1 - cos(v, u), as `config.rotation_loss` says.
    The cosine loss is 0 where u is too short to have a direction. Where v is too short, the cosine
    loss still has a bounded gradient.
    """
    if config.rotation_loss == "mse":
        return _compute_mse_per_action(v, u)
    if config.rotation_loss == "cosine":
        v_norm = torch.linalg.vector_norm(v, dim=-1)
        u_norm = torch.linalg.vector_norm(u, dim=-1)
        divisor = v_norm.clamp_min(_MIN_SPEED) * u_norm.clamp_min(_MIN_SPEED)
        cos = (v * u).sum(-1) / divisor
        return torch.where(u_norm < _MIN_SPEED, 0, 1 - cos)
    assert_never(config.rotation_loss)


def _compute_mse_per_action(a: Tensor, b: Tensor) -> Tensor:
    """Average (a - b)² over the components, [..., H]. For the 4 components of a rotation it is
    ‖a - b‖² / 4."""
    return (a - b).square().mean(-1)


def _compute_shorter_chord(a: Tensor, b: Tensor) -> Tensor:
    """Compute min(‖a - b‖, ‖a + b‖), [..., H], because b and -b are the same rotation."""
    distance = torch.linalg.vector_norm(a - b, dim=-1)
    antipodal_distance = torch.linalg.vector_norm(a + b, dim=-1)
    return torch.minimum(distance, antipodal_distance)


def _compute_std_per_component(values: Tensor, is_valid: Tensor) -> Tensor:
    """Compute the standard deviation per component of the valid values.

    Args:
        values: [..., H, N].
        is_valid: [..., H] bool.

    Returns:
        [N].
    """
    action_axes = tuple(range(is_valid.dim()))  # all axes of `values` but the last
    weight = (is_valid / is_valid.sum().clamp_min(1))[..., None]  # [..., H, 1], sums to 1
    mean = (weight * values).sum(action_axes)
    variance = (weight * (values - mean).square()).sum(action_axes)
    return variance.sqrt()


def _average(error: Tensor, mask: Tensor | None) -> Tensor:
    """Average errors [..., H] over the actions that count, those with `mask` [..., H] True."""
    if mask is None:
        return error.mean()
    # A mask with one number per chunk might broadcast along a wrong axis.
    if mask.shape != error.shape:
        raise ValueError(f"the mask has the shape {list(mask.shape)}, not {list(error.shape)}")
    return torch.where(mask, error, 0).sum() / mask.sum().clamp_min(1)
