"""Flow matching: the interpolant and its derivative, the loss and its gradients, and the actions
that integration ends at.

Terms and letters are those of `spear.flow`: ε is noise, u the true velocity, v a predicted one, and
θ the angle between two quaternions as points of S³ (half the angle of the rotation between them).
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from scipy.stats import kstest
from torch import Tensor

from refusals import refuses
from spear import flow
from spear.flow import FlowConfig
from spear.geometry import apply_action, quat_canonical, quat_distance, quat_exp, quat_multiply
from spear.models.presets import get_preset
from spear.types import Action

S3 = FlowConfig()  # rotations on S³, cosine loss, the network predicts velocities
LINEAR = FlowConfig(rotation="linear")
ALL_CONFIGS = [
    FlowConfig(rotation=rotation, rotation_loss=rotation_loss, prediction=prediction)
    for rotation, rotation_loss, prediction in itertools.product(
        ("s3", "linear"), ("cosine", "mse"), ("velocity", "clean")
    )
]
CLEAN_CONFIGS = [config for config in ALL_CONFIGS if config.prediction == "clean"]
VELOCITY_CONFIGS = [config for config in ALL_CONFIGS if config.prediction == "velocity"]
# Values of θ, with neighborhoods of 0 (noise equals data) and of π (antipodal quaternions).
ANGLES_RAD = [0.0, 1e-12, 1e-7, 1e-3, 0.1, 1.0, math.pi - 1e-3, math.pi - 1e-7]


def get_config_name(config: FlowConfig) -> str:
    return f"{config.rotation}-{config.rotation_loss}-{config.prediction}"


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_noise(shape: tuple[int, int], config: FlowConfig, seed: int = 0) -> Action:
    """Noise in double precision; on S³ its quaternions are unit to double precision, too."""
    noise = flow.sample_noise(shape, config, make_generator(seed)).to(torch.float64)
    if config.rotation == "linear":
        return noise
    # `sample_noise` normalizes in single precision.
    rotation = torch.nn.functional.normalize(noise.rotation, dim=-1)
    return dataclasses.replace(noise, rotation=rotation)


def draw_data(shape: tuple[int, ...], seed: int = 1) -> Action:
    """Actions of a robot: normalized translations, rotations of about 0.1 rad, gripper ±1."""
    shared_generator = make_generator(seed)

    def draw(size: int) -> Tensor:
        return torch.randn(*shape, size, generator=shared_generator, dtype=torch.float64)

    translation = draw(3)
    rotation = quat_canonical(quat_exp(0.1 * draw(3)))
    gripper = draw(1).sign()
    return Action(translation, rotation, gripper)


def draw_vector(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def draw_pair(
    config: FlowConfig, shape: tuple[int, int] = (64, 5)
) -> tuple[Action, Action, Tensor]:
    """Noise and data, chunks of the given shape, and a flow time per chunk."""
    tau = flow.sample_time(shape[0], config, make_generator(3)).double()
    return draw_noise(shape, config, seed=2), draw_data(shape), tau


def make_pair_at_angle(theta: float) -> tuple[Action, Action]:
    """Noise and data, one chunk of one action, whose quaternions are θ apart and have w ≥ 0."""
    half = torch.tensor([theta / 2], dtype=torch.float64)
    zero = 0 * half
    q_epsilon = torch.stack([half.cos(), half.sin(), zero, zero], dim=-1)
    q = torch.stack([half.cos(), -half.sin(), zero, zero], dim=-1)
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    noise = Action(ones.expand(1, 1, 3), q_epsilon[None], ones)
    data = Action(-ones.expand(1, 1, 3), q[None], -ones)
    return noise, data


def get_prediction_on_path(noise: Action, data: Action, tau: Tensor, config: FlowConfig) -> Action:
    """The prediction that has loss 0 at τ on the path from this noise to these data."""
    if config.prediction == "clean":
        return data
    _, velocity = flow.interpolate(noise, data, tau, config)
    return velocity


def compute_velocity_from_clean(
    clean: Action, state: Action, tau: Tensor, config: FlowConfig
) -> Action:
    """The velocity from a state to a clean action, also for configs that predict velocities."""
    clean_config = dataclasses.replace(config, prediction="clean")
    return flow.prediction_to_velocity(clean, state, tau, clean_config)


def get_prediction_from_state(
    data: Action, state: Action, tau: Tensor, config: FlowConfig
) -> Action:
    """The prediction that leads from any state at τ to the data, whatever the noise was."""
    if config.prediction == "clean":
        return data
    return compute_velocity_from_clean(data, state, tau, config)


# Sampling


def test_noise_of_translation_and_gripper_is_standard_normal() -> None:
    noise = flow.sample_noise((20_000, 5), S3, make_generator())

    # The mean and the standard deviation of 100,000 numbers or more vary by at most about 0.003.
    for component in (noise.translation, noise.gripper):
        assert float(component.mean()) == pytest.approx(0, abs=0.01)
        assert float(component.std()) == pytest.approx(1, abs=0.01)


def test_noise_of_rotations_is_uniform_on_the_half_sphere() -> None:
    q = flow.sample_noise((20_000, 5), S3, make_generator()).rotation

    assert q.shape == (20_000, 5, 4)
    assert float(q[..., 0].min()) >= 0
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(20_000, 5))
    # For the uniform distribution on S³ the mean of w² is 1/4 (as of x², y² and z²), and the mean
    # of |w| is 4 / (3π).
    torch.testing.assert_close(q.square().mean((0, 1)), torch.full((4,), 0.25), atol=0.005, rtol=0)
    assert float(q[..., 0].mean()) == pytest.approx(4 / (3 * math.pi), abs=0.005)


def test_linear_noise_of_rotations_is_standard_normal() -> None:
    q = flow.sample_noise((20_000, 5), LINEAR, make_generator()).rotation

    # The standard deviation of 100,000 standard normal numbers varies by about 0.002.
    torch.testing.assert_close(q.std((0, 1)), torch.ones(4), atol=0.02, rtol=0)


def test_the_same_generator_draws_the_same_noise() -> None:
    first = flow.sample_noise((100, 5), S3, make_generator())
    second = flow.sample_noise((100, 5), S3, make_generator())

    assert torch.equal(first.to_vector(), second.to_vector())


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 1.0), (2.0, 3.0), (2, 1.5)])
def test_time_has_the_density_of_its_config(alpha: float, beta: float) -> None:
    """A time is τ = scale · (1 - u), where u is Beta(alpha, beta) and the default scale 0.999."""
    config = FlowConfig(time_alpha=alpha, time_beta=beta)

    tau = flow.sample_time(20_000, config, make_generator())

    assert tau.dtype == torch.float32
    assert float(tau.min()) >= 0
    assert float(tau.max()) <= 0.999
    beta_variable = (0.999 - tau.double().numpy()) / 0.999
    test_result = kstest(beta_variable, beta_distribution(alpha, beta).cdf)
    assert test_result.pvalue > 0.01  # the samples do not contradict the distribution


def test_the_same_generator_draws_the_same_times() -> None:
    first = flow.sample_time(100, S3, make_generator())
    second = flow.sample_time(100, S3, make_generator())

    assert torch.equal(first, second)


def test_the_committed_actions_are_the_first_of_a_chunk() -> None:
    is_committed = flow.sample_committed_mask(
        (20_000, 2, 5), max_committed=3, generator=make_generator()
    )

    num_committed = is_committed.sum(-1)
    assert torch.equal(is_committed, torch.arange(5) < num_committed[..., None])


def test_committed_prefixes_of_every_length_are_equally_frequent() -> None:
    is_committed = flow.sample_committed_mask(
        (20_000, 2, 5), max_committed=3, generator=make_generator()
    )

    num_committed = is_committed.sum(-1)
    frequency = torch.bincount(num_committed.flatten(), minlength=5) / num_committed.numel()
    expected = torch.tensor([0.25, 0.25, 0.25, 0.25, 0])  # of 0, 1, 2, 3 and 4 committed actions
    # A frequency among 40,000 prefixes varies by about 0.002.
    torch.testing.assert_close(frequency, expected, atol=0.01, rtol=0)


def test_a_maximum_of_0_commits_no_action() -> None:
    assert not flow.sample_committed_mask((4, 5), max_committed=0, generator=make_generator()).any()


# Perturbed committed actions

PERTURBED_SHAPE = (4000, 5)  # chunks, actions per chunk


def draw_perturbed() -> tuple[Action, Action, Tensor]:
    """Demonstrated chunks, the same chunks with errors added by `perturb_and_correct`, and the
    mask [4000, 5] of the committed actions (at most 3 per chunk)."""
    data = draw_data(PERTURBED_SHAPE)
    is_committed = flow.sample_committed_mask(
        PERTURBED_SHAPE, max_committed=3, generator=make_generator(5)
    )
    perturbed = flow.perturb_and_correct(data, is_committed, "previous", make_generator(6))
    return data, perturbed, is_committed


def test_poses_differ_while_actions_are_committed_and_agree_from_the_next_action_on() -> None:
    """The poses x and q are those that the arm reaches by executing the actions of each chunk."""
    data, perturbed, is_committed = draw_perturbed()
    num_chunks, horizon = PERTURBED_SHAPE
    x = torch.zeros(num_chunks, 3).double()
    q = quat_exp(torch.ones(num_chunks, 3).double())
    perturbed_x = x
    perturbed_q = q

    for i in range(horizon):
        x, q = apply_action(x, q, data.translation[:, i], data.rotation[:, i])
        perturbed_x, perturbed_q = apply_action(
            perturbed_x, perturbed_q, perturbed.translation[:, i], perturbed.rotation[:, i]
        )

        is_position_different = (x - perturbed_x).norm(dim=-1) > 1e-6
        assert torch.equal(is_position_different, is_committed[:, i])
        is_free = ~is_committed[:, i]
        torch.testing.assert_close(x[is_free], perturbed_x[is_free], rtol=0, atol=1e-9)
        torch.testing.assert_close(q[is_free], perturbed_q[is_free], rtol=0, atol=1e-9)


def test_perturbations_have_the_stated_standard_deviations() -> None:
    """Only the first actions of chunks are compared, in which no earlier error is corrected."""
    data, perturbed, is_committed = draw_perturbed()
    is_first_committed = is_committed[:, 0]

    translation_errors = (perturbed.translation - data.translation)[is_first_committed, 0]
    angles_rad = quat_distance(perturbed.rotation, data.rotation)[is_first_committed, 0]

    translation_std = data.translation.flatten(0, 1).std(0)
    relative_std = float((translation_errors / translation_std).std())
    assert relative_std == pytest.approx(flow.PERTURBATION_TRANSLATION, rel=0.05)
    # The rotation vector has three components, each with the stated standard deviation.
    root_mean_square = float(angles_rad.square().mean().sqrt())
    assert root_mean_square == pytest.approx(flow.PERTURBATION_ROTATION_RAD * 3**0.5, rel=0.05)


def test_perturbations_leave_the_gripper() -> None:
    data, perturbed, _ = draw_perturbed()

    assert torch.equal(perturbed.gripper, data.gripper)


def test_motions_from_the_observed_pose_need_no_correction_after_the_committed_ones() -> None:
    data, _, is_committed = draw_perturbed()
    perturbed = flow.perturb_and_correct(data, is_committed, "observed", make_generator(6))

    is_translation_different = (perturbed.translation != data.translation).any(-1)
    assert torch.equal(is_translation_different, is_committed)
    angles_rad = quat_distance(perturbed.rotation, data.rotation)
    assert (angles_rad[~is_committed] < 1e-6).all()
    assert (angles_rad[is_committed] > 0).all()


def test_errors_of_motions_from_the_observed_pose_add_up() -> None:
    """The third committed action has the errors of three steps, so its variance is three times."""
    data, _, is_committed = draw_perturbed()
    perturbed = flow.perturb_and_correct(data, is_committed, "observed", make_generator(6))

    has_three = is_committed[:, 2]
    errors = (perturbed.translation - data.translation)[has_three]  # [N, 5, 3]
    variance = errors.var(0).mean(-1)  # per action of the chunk
    torch.testing.assert_close(
        variance[:3] / variance[0], torch.tensor([1.0, 2, 3]).to(variance), rtol=0.15, atol=0
    )


def test_actions_that_are_not_valid_do_not_change_the_scale_of_perturbations() -> None:
    data, _, is_committed = draw_perturbed()
    is_valid = torch.rand(PERTURBED_SHAPE, generator=make_generator(8)) < 0.7
    # 30 standard deviations more in each action that is not valid.
    outliers = data.translation + 30 * ~is_valid[..., None]
    with_outliers = dataclasses.replace(data, translation=outliers)

    errors = []
    for demonstrations in (data, with_outliers):
        perturbed = flow.perturb_and_correct(
            demonstrations, is_committed, "previous", make_generator(6), is_valid
        )
        errors.append(perturbed.translation - demonstrations.translation)

    torch.testing.assert_close(errors[0], errors[1], rtol=0, atol=1e-9)


# The interpolant


@pytest.mark.parametrize("config", [S3, LINEAR], ids=get_config_name)
@pytest.mark.parametrize("sign", [1, -1])
def test_interpolant_starts_at_noise_and_ends_at_data(config: FlowConfig, sign: int) -> None:
    """Data with the quaternions -q have the same interpolant as data with q."""
    noise, data, _ = draw_pair(config)
    signed_data = Action(data.translation, sign * data.rotation, data.gripper)

    start, _ = flow.interpolate(noise, signed_data, torch.zeros(64).double(), config)
    end, _ = flow.interpolate(noise, signed_data, torch.ones(64).double(), config)

    torch.testing.assert_close(start.to_vector(), noise.to_vector(), atol=1e-14, rtol=0)
    torch.testing.assert_close(end.to_vector(), data.to_vector(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("config", [S3, LINEAR], ids=get_config_name)
def test_velocity_is_the_derivative_of_the_interpolant(config: FlowConfig) -> None:
    h = 1e-5  # half the step of the central difference quotient
    noise, data, _ = draw_pair(config)
    pairs = [(noise, data), *map(make_pair_at_angle, ANGLES_RAD)]
    for noise, data in pairs:
        for tau in np.linspace(0.01, 0.99, 15):
            taus = torch.full((len(noise.translation),), float(tau), dtype=torch.float64)

            _, velocity = flow.interpolate(noise, data, taus, config)

            state_after, _ = flow.interpolate(noise, data, taus + h, config)
            state_before, _ = flow.interpolate(noise, data, taus - h, config)
            numeric = (state_after.to_vector() - state_before.to_vector()) / (2 * h)
            assert float((velocity.to_vector() - numeric).abs().max()) < 1e-6


def make_s3_triples() -> list[tuple[Action, Action, Tensor]]:
    """Triples of noise, data and τ: a random triple, and one for each angle of `ANGLES_RAD`."""
    tau = torch.tensor([0.37], dtype=torch.float64)  # any time between noise and data
    triples = [draw_pair(S3)]
    for theta in ANGLES_RAD:
        noise, data = make_pair_at_angle(theta)
        triples.append((noise, data, tau))
    return triples


def test_states_stay_on_the_half_sphere() -> None:
    for noise, data, tau in make_s3_triples():
        state, _ = flow.interpolate(noise, data, tau, S3)

        assert float((state.rotation.norm(dim=-1) - 1).abs().max()) < 1e-14
        assert float(state.rotation[..., 0].min()) > 0


def test_velocity_is_tangent_to_the_sphere_and_has_the_speed_theta() -> None:
    for noise, data, tau in make_s3_triples():
        state, velocity = flow.interpolate(noise, data, tau, S3)
        u = velocity.rotation

        radial_speed = (state.rotation * u).sum(-1)
        assert float(radial_speed.abs().max()) < 1e-14
        # The two chords are 2 sin(θ/2) and 2 cos(θ/2).
        chord = (noise.rotation - data.rotation).norm(dim=-1)
        antipodal_chord = (noise.rotation + data.rotation).norm(dim=-1)
        theta = 2 * torch.atan2(chord, antipodal_chord)
        torch.testing.assert_close(u.norm(dim=-1), theta, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("config", "scale"), [(S3, 1), (S3, -3), (LINEAR, 1)])
def test_velocity_from_the_true_clean_action_is_the_true_velocity(
    config: FlowConfig, scale: float
) -> None:
    """On S³ neither the sign nor the length of a predicted quaternion matters: -3 q is as good."""
    noise, data, tau = draw_pair(config)
    tau[0] = config.time_scale  # the latest time that training draws
    state, velocity = flow.interpolate(noise, data, tau, config)
    prediction = Action(data.translation, scale * data.rotation, data.gripper)

    derived = compute_velocity_from_clean(prediction, state, tau, config)

    torch.testing.assert_close(derived.to_vector(), velocity.to_vector(), atol=1e-9, rtol=0)


# The loss


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_loss_is_zero_at_the_truth(config: FlowConfig) -> None:
    noise, data, tau = draw_pair(config)
    truth = get_prediction_on_path(noise, data, tau, config)

    total, _ = flow.compute_loss(truth, noise, data, tau, config)

    assert float(total) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
@pytest.mark.parametrize(
    ("column", "wrong_losses"),
    [(1, {"translation"}), (5, {"rotation", "geodesic"}), (7, {"gripper"})],
)
def test_a_wrong_part_has_a_loss_and_the_others_have_none(
    config: FlowConfig, column: int, wrong_losses: set[str]
) -> None:
    """The column is that of an action's vector: translation 0 to 2, rotation 3 to 6, gripper 7."""
    noise, data, tau = draw_pair(config)
    prediction = get_prediction_on_path(noise, data, tau, config).to_vector().clone()
    prediction[..., column] += 0.1

    _, losses = flow.compute_loss(Action.from_vector(prediction), noise, data, tau, config)

    for name, loss in losses.items():
        if name in wrong_losses:
            assert float(loss) > 1e-4
        else:
            assert float(loss) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_gradients_are_finite_at_every_degenerate_place(
    config: FlowConfig, dtype: torch.dtype
) -> None:
    """Degenerate are equal and antipodal quaternions (θ = 0 and π), both ends of the flow, and
    predictions that are right, reversed, 0, tiny or large."""
    for theta, tau in itertools.product((0.0, math.pi), (0.0, 0.5, 0.999, 1.0)):
        noise, data = make_pair_at_angle(theta)
        noise = noise.to(dtype)
        data = data.to(dtype)
        taus = torch.tensor([tau], dtype=dtype)
        truth = get_prediction_on_path(noise, data, taus, config).to_vector()
        for prediction in (truth, -truth, torch.zeros_like(truth), truth * 1e-6, truth * 30):
            prediction = prediction.clone().requires_grad_()

            total, _ = flow.compute_loss(Action.from_vector(prediction), noise, data, taus, config)
            (gradient,) = torch.autograd.grad(total, prediction)

            assert bool(torch.isfinite(total))
            assert bool(torch.isfinite(gradient).all())
            assert float(gradient.abs().max()) < 1e7  # bounded, far below an overflow
            if torch.equal(prediction, truth):
                assert float(total.detach()) < 1e-6


def check_gradient(
    prediction: Tensor, noise: Action, data: Action, tau: Tensor, config: FlowConfig
) -> None:
    """Compare the loss's gradient at a prediction with finite differences."""

    def compute_total(vector: Tensor) -> Tensor:
        return flow.compute_loss(Action.from_vector(vector), noise, data, tau, config)[0]

    assert torch.autograd.gradcheck(compute_total, (prediction.requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_loss_gradient_equals_finite_differences(config: FlowConfig) -> None:
    noise, data, tau = draw_pair(config, (3, 2))
    truth = get_prediction_on_path(noise, data, tau, config).to_vector()
    prediction = truth + 0.2 * draw_vector(*truth.shape, seed=4)

    check_gradient(prediction, noise, data, tau, config)


@pytest.mark.parametrize("config", VELOCITY_CONFIGS, ids=get_config_name)
@pytest.mark.parametrize("speed", [0.7, 1.4])
def test_loss_gradient_is_right_where_only_the_speed_is_wrong(
    config: FlowConfig, speed: float
) -> None:
    noise, data, tau = draw_pair(config, (3, 2))
    truth = get_prediction_on_path(noise, data, tau, config).to_vector()

    check_gradient(speed * truth, noise, data, tau, config)


class PaperFormulas:
    """The paper's formulas in NumPy, for random noise, data, times and predictions.

    Attributes:
        noise, data, prediction: 64 chunks of 5 actions.
        tau: [64], flow times.
        q: [64, 5, 4], states on the sphere, by the slerp.
        u: [64, 5, 4], true velocities, by a difference quotient of the slerp.
        v: [64, 5, 4], predicted velocities, projected to be tangent to the sphere.
        remaining: [64, 1, 1], 1 - τ.
    """

    def __init__(self) -> None:
        self.noise, self.data, self.tau = draw_pair(S3)
        shared_generator = make_generator(7)
        self.prediction = Action(
            torch.randn(64, 5, 3, generator=shared_generator, dtype=torch.float64),
            torch.randn(64, 5, 4, generator=shared_generator, dtype=torch.float64),
            torch.randn(64, 5, 1, generator=shared_generator, dtype=torch.float64),
        )
        tau = self.tau.numpy()[:, None, None]
        self.remaining = 1 - tau
        self.q = self.slerp(tau)
        self.u = (self.slerp(tau + 1e-6) - self.slerp(tau - 1e-6)) / 2e-6
        v = self.prediction.rotation.numpy()
        radial_speed = (v * self.q).sum(-1, keepdims=True)
        self.v = v - radial_speed * self.q

    def slerp(self, tau: np.ndarray) -> np.ndarray:
        q_epsilon = self.noise.rotation.numpy()
        q = self.data.rotation.numpy()
        cosine = (q_epsilon * q).sum(-1, keepdims=True)
        theta = np.arccos(np.clip(cosine, -1, 1))
        return (np.sin((1 - tau) * theta) * q_epsilon + np.sin(tau * theta) * q) / np.sin(theta)

    def step(self, velocity: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """The rotation after a step of length δ from `q` along a velocity."""
        speed = np.linalg.norm(velocity, axis=-1, keepdims=True)
        return np.cos(speed * delta) * self.q + np.sin(speed * delta) * velocity / speed

    def compute_loss_parts(self, config: FlowConfig) -> dict[str, Tensor]:
        """The parts of the loss of `spear.flow`, which the tests compare with these formulas."""
        return flow.compute_loss(self.prediction, self.noise, self.data, self.tau, config)[1]


@pytest.fixture(scope="module")
def paper() -> PaperFormulas:
    return PaperFormulas()


def test_cosine_loss_is_the_papers_with_normalized_velocities(paper: PaperFormulas) -> None:
    u_norm = np.linalg.norm(paper.u, axis=-1)
    v_norm = np.linalg.norm(paper.v, axis=-1)
    assert u_norm.min() > 0.01  # below this the loss of an action is 0
    cosine = (paper.v * paper.u).sum(-1) / (v_norm * u_norm)

    losses = paper.compute_loss_parts(FlowConfig(rotation_loss="cosine"))

    assert losses["rotation"].item() == pytest.approx((1 - cosine).mean(), rel=1e-6)


def test_mse_loss_of_rotations_is_a_quarter_of_the_squared_distance(paper: PaperFormulas) -> None:
    squared_distance = ((paper.v - paper.u) ** 2).sum(-1)

    losses = paper.compute_loss_parts(FlowConfig(rotation_loss="mse"))

    assert losses["rotation"].item() == pytest.approx(squared_distance.mean() / 4, rel=1e-6)


@pytest.mark.parametrize("name", ["translation", "gripper"])
def test_translation_and_gripper_have_the_mean_squared_error(
    paper: PaperFormulas, name: str
) -> None:
    u = getattr(paper.data, name) - getattr(paper.noise, name)  # the true velocity
    error = (getattr(paper.prediction, name) - u).numpy()

    assert paper.compute_loss_parts(S3)[name].item() == pytest.approx(np.mean(error**2), rel=1e-12)


@pytest.mark.parametrize("delta", [None, 0.003, 0.05, 0.1, 0.5])
def test_geodesic_loss_is_the_chord_after_a_step_of_delta(
    paper: PaperFormulas, delta: float | None
) -> None:
    """None is a step to the end of the flow; no step is longer than that."""
    step_length = np.minimum(paper.remaining, np.inf if delta is None else delta)
    q_hat = paper.step(paper.v, step_length)
    q = paper.step(paper.u, step_length)
    chords = np.linalg.norm([q - q_hat, q + q_hat], axis=-1).min(0)  # [64, 5]

    losses = paper.compute_loss_parts(dataclasses.replace(S3, geodesic_step=delta))

    assert losses["geodesic"].item() == pytest.approx(chords.mean(), rel=1e-6)


@pytest.mark.parametrize("rotation_loss", ["mse", "cosine"])
def test_clean_losses_are_functions_of_the_angle(rotation_loss: Any) -> None:
    """The predicted rotations are all wrong by the same angle; neither sign nor length matters."""
    angle_rad = 0.03
    data = draw_data((4, 5))
    error = quat_exp(torch.tensor([0.0, angle_rad, 0], dtype=torch.float64))
    wrong_rotation = quat_multiply(data.rotation, error)
    prediction = Action(data.translation, -2 * wrong_rotation, data.gripper)
    config = FlowConfig(prediction="clean", rotation_loss=rotation_loss)

    _, losses = flow.compute_loss(
        prediction, draw_noise((4, 5), S3), data, torch.rand(4).double(), config
    )

    expected_losses = {"mse": angle_rad**2, "cosine": math.sin(angle_rad / 2) ** 2}
    expected = expected_losses[rotation_loss]
    assert float(losses["rotation"]) == pytest.approx(expected, rel=1e-9)
    assert float(losses["geodesic"]) == pytest.approx(2 * math.sin(angle_rad / 4), rel=1e-9)


@pytest.mark.parametrize(
    ("config", "best_fraction"),
    [(FlowConfig(prediction="clean"), 0.0), (FlowConfig(**get_preset("nano").flow), 0.2)],
    ids=["median of the chord", "mean of nano's squares"],
)
def test_the_best_single_guess_for_sparse_rotations(
    config: FlowConfig, best_fraction: float
) -> None:
    """One rotation is predicted for all ten actions of a chunk, of which two rotate by 0.35 rad.

    The default loss, with its chord, is least at the median of the ten angles, which is 0. The
    preset nano has a loss of squares, which is least at their mean, a fifth of 0.35 rad.
    """
    angle_rad = 0.35
    num_actions = 10
    rotation_vectors = torch.zeros(1, num_actions, 3, dtype=torch.float64)
    rotation_vectors[:, : num_actions // 5, 2] = angle_rad
    data = dataclasses.replace(draw_data((1, num_actions)), rotation=quat_exp(rotation_vectors))
    guess = torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.01)

    # Enough steps, with a learning rate that falls to 0, to reach the minimum.
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 400)
        rotation = quat_exp(guess).expand(1, num_actions, 4)
        prediction = dataclasses.replace(data, rotation=rotation)
        optimizer.zero_grad()
        total, _ = flow.compute_loss(prediction, data, data, torch.zeros(1).double(), config)
        total.backward()
        optimizer.step()

    assert guess.tolist() == pytest.approx([0, 0, best_fraction * angle_rad], abs=2e-3)


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    noise, data, tau = draw_pair(S3)
    prediction = Action.from_vector(draw_vector(64, 5, 8, seed=5))
    config = FlowConfig(
        translation_weight=2, rotation_weight=3, gripper_weight=5, geodesic_weight=7
    )

    total, losses = flow.compute_loss(prediction, noise, data, tau, config)

    rotation = losses["rotation"] + 7 * losses["geodesic"]
    expected = 2 * losses["translation"] + 3 * rotation + 5 * losses["gripper"]
    torch.testing.assert_close(total, expected)


@pytest.fixture
def is_valid() -> Tensor:
    """The actions that count in the loss, [64, 5] bool: about half, but none of the first chunk."""
    is_valid = torch.rand(64, 5, generator=make_generator(6)) < 0.5
    is_valid[0] = False
    return is_valid


def test_a_masked_loss_is_the_loss_of_the_valid_actions(is_valid: Tensor) -> None:
    noise, data, tau = draw_pair(S3)
    prediction = Action.from_vector(draw_vector(64, 5, 8, seed=5))

    _, masked_losses = flow.compute_loss(prediction, noise, data, tau, S3, is_valid)

    def select(chunk: Action) -> Action:
        valid_actions = chunk.to_vector()[is_valid]  # [N, 8]
        return Action.from_vector(valid_actions[:, None])  # N chunks of one action

    tau_of_action = tau[:, None].expand(64, 5)[is_valid]
    _, losses = flow.compute_loss(
        select(prediction), select(noise), select(data), tau_of_action, S3
    )
    torch.testing.assert_close(masked_losses, losses)


def test_the_loss_of_no_valid_action_is_zero(is_valid: Tensor) -> None:
    noise, data, tau = draw_pair(S3)
    prediction = Action.from_vector(draw_vector(64, 5, 8, seed=5))

    total, _ = flow.compute_loss(prediction, noise, data, tau, S3, torch.zeros_like(is_valid))

    assert float(total) == 0


def test_a_mask_of_one_number_per_chunk_is_refused(is_valid: Tensor) -> None:
    noise, data, tau = draw_pair(S3)

    with pytest.raises(ValueError, match="64, 5"):
        flow.compute_loss(data, noise, data, tau, S3, is_valid[:, :1])


# Integration


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_integrating_the_true_prediction_ends_at_the_data(config: FlowConfig, steps: int) -> None:
    noise, data, _ = draw_pair(config)

    def predict(state: Action, tau: Tensor) -> Action:
        assert tau.shape == (64,)
        return get_prediction_from_state(data, state, tau, config)

    chunk = flow.integrate(predict, noise, steps, config)

    torch.testing.assert_close(chunk.to_vector(), data.to_vector(), rtol=0, atol=1e-12)


def compute_everything(
    noise: Action, data: Action, prediction: Action, tau: Tensor, config: FlowConfig
) -> list[Tensor]:
    """The state, the velocity, and the velocity of a clean prediction, each [320, 8], and the loss.

    320 is the number of actions, of 64 chunks of 5, or of 320 chunks of 1.
    """
    state, velocity = flow.interpolate(noise, data, tau, config)
    derived = compute_velocity_from_clean(prediction, state, tau, config)
    total, _ = flow.compute_loss(prediction, noise, data, tau, config)
    vectors = [chunk.to_vector().reshape(320, 8) for chunk in (state, velocity, derived)]
    return [*vectors, total]


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_actions_with_times_of_their_own_are_as_chunks_of_one_action(config: FlowConfig) -> None:
    noise, data, _ = draw_pair(config)
    prediction = Action.from_vector(draw_vector(64, 5, 8, seed=5))
    tau = torch.rand(64, 5, generator=make_generator(6), dtype=torch.float64)
    tau[:, 0] = 1  # the time of a committed action

    def split(chunk: Action) -> Action:
        return Action.from_vector(chunk.to_vector().reshape(320, 1, 8))

    together = compute_everything(noise, data, prediction, tau, config)
    separate = compute_everything(
        split(noise), split(data), split(prediction), tau.flatten(), config
    )

    torch.testing.assert_close(together, separate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_equal_times_of_all_actions_are_as_one_time_of_the_chunk(config: FlowConfig) -> None:
    noise, data, tau = draw_pair(config)
    prediction = Action.from_vector(draw_vector(64, 5, 8, seed=5))

    per_action = compute_everything(noise, data, prediction, tau[:, None].expand(64, 5), config)
    per_chunk = compute_everything(noise, data, prediction, tau, config)

    torch.testing.assert_close(per_chunk, per_action, rtol=0, atol=0)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=get_config_name)
def test_integrating_does_not_change_committed_actions(config: FlowConfig) -> None:
    noise, data, _ = draw_pair(config)
    committed_actions = draw_data((64, 5), seed=9)
    is_committed = flow.sample_committed_mask((64, 5), max_committed=3, generator=make_generator())
    states: list[Action] = []
    taus: list[Tensor] = []

    def predict(state: Action, tau: Tensor) -> Action:
        states.append(state)
        taus.append(tau)
        return get_prediction_from_state(data, state, tau, config)

    prefix = flow.CommittedPrefix(committed_actions, is_committed)
    chunk = flow.integrate(predict, noise, steps=4, config=config, committed=prefix)

    expected = committed_actions.to_vector()[is_committed]
    for state in [*states, chunk]:
        assert torch.equal(state.to_vector()[is_committed], expected)
    for k, tau in enumerate(taus):
        free_tau = torch.full((64, 5), k / 4).double()
        assert torch.equal(tau, torch.where(is_committed, 1.0, free_tau))
    free_actions = chunk.to_vector()[~is_committed]
    free_data = data.to_vector()[~is_committed]
    torch.testing.assert_close(free_actions, free_data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CLEAN_CONFIGS, ids=get_config_name)
def test_a_length_that_the_loss_does_not_teach_changes_no_state_on_the_way(
    config: FlowConfig,
) -> None:
    """A network may predict quaternions of any length if the loss does not depend on it. If the
    length changed the next states, the network would then meet states that training never had."""
    noise, data, tau = draw_pair(config)
    longer = Action(data.translation, 15 * data.rotation, data.gripper)
    total, _ = flow.compute_loss(longer, noise, data, tau, config)
    loss_teaches_length = float(total) > 1e-6
    states: list[Action] = []

    def predict(state: Action, tau: Tensor) -> Action:
        states.append(state)
        return longer

    flow.integrate(predict, noise, steps=4, config=config)

    assert loss_teaches_length == (config.rotation == "linear" and config.rotation_loss == "mse")
    for k, state in enumerate(states):
        taus = torch.full((64,), k / 4, dtype=torch.float64)
        expected, _ = flow.interpolate(noise, data, taus, config)
        is_as_in_training = torch.allclose(state.rotation, expected.rotation, atol=1e-9)
        is_noise = k == 0  # the first state comes before any prediction
        assert is_as_in_training == (is_noise or not loss_teaches_length)


def test_error_falls_as_one_over_the_number_of_steps() -> None:
    """The velocities x' = x, q' = ½ (a ⊗ q + q ⊗ b) and g' = -g are integrated inexactly by Euler
    steps, but their exact solutions at τ = 1 are known: e x, exp(a) ⊗ q ⊗ exp(b) and g / e. Here
    exp(a) is the quaternion of the rotation vector a (`quat_exp`).
    """
    noise = draw_noise((16, 5), S3)
    a = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64)
    b = torch.tensor([-0.3, 1.1, 0.9], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)

    def predict(state: Action, _: Tensor) -> Action:
        assert float(state.rotation[..., 0].min()) >= 0  # canonical, as all states in training
        left_product = quat_multiply(torch.cat([zero, a]), state.rotation)
        right_product = quat_multiply(state.rotation, torch.cat([zero, b]))
        return Action(state.translation, (left_product + right_product) / 2, -state.gripper)

    true_rotation = quat_multiply(quat_multiply(quat_exp(a), noise.rotation), quat_exp(b))
    true_end = Action(noise.translation * math.e, true_rotation, noise.gripper / math.e)

    def measure_errors(steps: int) -> list[float]:
        """The errors of translation, gripper and rotation (rad)."""
        end = flow.integrate(predict, noise, steps, S3)
        return [
            float((end.translation - true_end.translation).abs().max()),
            float((end.gripper - true_end.gripper).abs().max()),
            float(quat_distance(end.rotation, true_end.rotation).mean()),
        ]

    errors_50 = measure_errors(50)
    errors_100 = measure_errors(100)
    errors_200 = measure_errors(200)

    # Twice as many steps halve each error.
    assert np.divide(errors_50, errors_100) == pytest.approx(2, rel=0.05)
    assert np.divide(errors_100, errors_200) == pytest.approx(2, rel=0.05)
    rotation_error_rad = errors_200[2]
    assert rotation_error_rad < 0.01


# Refusals


@pytest.mark.parametrize("field", ["rotation", "rotation_loss", "prediction"])
def test_an_unknown_word_in_the_config_is_refused(field: str) -> None:
    refuses(f"{field} 'wrong'", FlowConfig, **{field: "wrong"})


@pytest.mark.parametrize("rotation", ["s3", "linear"])
@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_a_rotation_loss_without_a_branch_stops_the_training(
    rotation: Any, prediction: Any
) -> None:
    """A word that is new in `FlowConfig`, but not yet computed, must not train as the cosine."""
    config = FlowConfig(rotation=rotation, prediction=prediction)
    object.__setattr__(config, "rotation_loss", "no-such-loss")
    noise, data, tau = draw_pair(config, (2, 5))

    with pytest.raises(AssertionError, match="no-such-loss"):
        flow.compute_loss(data, noise, data, tau, config)


@pytest.mark.parametrize("steps", [0, 2.5])
def test_a_number_of_steps_that_is_not_a_positive_integer_is_refused(steps: Any) -> None:
    refuses("flow steps", FlowConfig, steps=steps)


def test_integrating_in_no_step_is_refused() -> None:
    noise = flow.sample_noise((1, 1), S3)

    refuses("at least 1", flow.integrate, lambda state, _: state, noise, steps=0, config=S3)
