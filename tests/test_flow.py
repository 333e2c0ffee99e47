"""Flow matching: the interpolant and its derivative, the loss and its gradients, where integration ends."""

import dataclasses
import itertools
import math

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

S3, LINEAR = FlowConfig(), FlowConfig(rotation="linear")
ANGLES = [0.0, 1e-12, 1e-7, 1e-3, 0.1, 1.0, math.pi - 1e-3, math.pi - 1e-7]
CHOICES = itertools.product(("s3", "linear"), ("cosine", "mse"), ("velocity", "clean"))
ALL = [
    FlowConfig(rotation=where, rotation_loss=kind, prediction=what) for where, kind, what in CHOICES
]


def name(config: FlowConfig) -> str:
    return f"{config.rotation}-{config.rotation_loss}-{config.prediction}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shape: tuple[int, int], config: FlowConfig, seed: int = 0) -> Action:
    """Noise in double precision, unit quaternions included."""
    noise = flow.sample_noise(shape, config, generator(seed)).to(torch.float64)
    if config.rotation == "linear":
        return noise
    return dataclasses.replace(
        noise, rotation=torch.nn.functional.normalize(noise.rotation, dim=-1)
    )


def robot_data(shape: tuple[int, ...], seed: int = 1) -> Action:
    """Actions of a robot's size: normalised translations, rotations of about 0.1 rad, gripper ±1."""
    g = generator(seed)
    return Action(
        torch.randn(*shape, 3, generator=g, dtype=torch.float64),
        quat_canonical(quat_exp(0.1 * torch.randn(*shape, 3, generator=g, dtype=torch.float64))),
        torch.randn(*shape, 1, generator=g, dtype=torch.float64).sign(),
    )


def pair(config: FlowConfig, shape: tuple[int, int] = (64, 5)) -> tuple[Action, Action, Tensor]:
    time = flow.sample_time(shape[0], config, generator(3)).double()
    return draw(shape, config, 2), robot_data(shape), time


def truth(noise: Action, data: Action, time: Tensor, config: FlowConfig) -> Action:
    return data if config.prediction == "clean" else flow.interpolate(noise, data, time, config)[1]


def velocity_from_clean(clean: Action, state: Action, time: Tensor, config: FlowConfig) -> Action:
    return flow.prediction_to_velocity(
        clean, state, time, dataclasses.replace(config, prediction="clean")
    )


def test_noise_is_standard_normal_and_uniform_on_the_half_sphere() -> None:
    noise = flow.sample_noise((20_000, 5), S3, generator())
    for part in (noise.translation, noise.gripper):
        assert abs(float(part.mean())) < 0.01 and abs(float(part.std()) - 1) < 0.01
    q = noise.rotation
    assert q.shape == (20_000, 5, 4) and float(q[..., 0].min()) >= 0
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(20_000, 5))
    # On S³ each coordinate has mean square 1/4 and |w| the mean 4 / (3π).
    torch.testing.assert_close(q.square().mean((0, 1)), torch.full((4,), 0.25), atol=0.005, rtol=0)
    assert abs(float(q[..., 0].mean()) - 4 / (3 * math.pi)) < 0.005
    linear = flow.sample_noise((20_000, 5), LINEAR, generator()).rotation
    torch.testing.assert_close(linear.std((0, 1)), torch.ones(4), atol=0.02, rtol=0)
    assert torch.equal(
        flow.sample_noise((20_000, 5), S3, generator()).to_vector(), noise.to_vector()
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 1.0), (2.0, 3.0), (2, 1.5)])
def test_time_has_the_density_that_it_states(alpha: float, beta: float) -> None:
    config = FlowConfig(time_alpha=alpha, time_beta=beta)
    tau = flow.sample_time(20_000, config, generator())
    assert tau.dtype == torch.float32 and float(tau.min()) >= 0 and float(tau.max()) <= 0.999
    assert (
        kstest(((0.999 - tau.double().numpy()) / 0.999), beta_distribution(alpha, beta).cdf).pvalue
        > 0.01
    )
    assert torch.equal(tau, flow.sample_time(20_000, config, generator()))


@pytest.mark.parametrize("config", [S3, LINEAR], ids=name)
def test_interpolant_starts_at_noise_and_ends_at_data(config: FlowConfig) -> None:
    noise, data, _ = pair(config)
    flipped = Action(data.translation, -data.rotation, data.gripper)
    for target in (data, flipped):  # both signs of a quaternion are the same data
        for tau, end in ((0.0, noise), (1.0, data)):
            time = torch.full((64,), tau, dtype=torch.float64)
            found, _ = flow.interpolate(noise, target, time, config)
            torch.testing.assert_close(found.to_vector(), end.to_vector(), atol=1e-14, rtol=0)


def pairs_at_angle(theta: float) -> tuple[Action, Action]:
    """Noise and data whose quaternions are θ apart on S³, both with w ≥ 0."""
    half = torch.tensor([theta / 2], dtype=torch.float64)
    a = torch.stack([half.cos(), half.sin(), 0 * half, 0 * half], dim=-1)
    b = torch.stack([half.cos(), -half.sin(), 0 * half, 0 * half], dim=-1)
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    return Action(ones.expand(1, 1, 3), a[None], ones), Action(
        -ones.expand(1, 1, 3), b[None], -ones
    )


@pytest.mark.parametrize("config", [S3, LINEAR], ids=name)
def test_velocity_is_the_derivative_of_the_interpolant(config: FlowConfig) -> None:
    h = 1e-5
    for noise, data in [pair(config)[:2], *(pairs_at_angle(theta) for theta in ANGLES)]:
        for tau in np.linspace(0.01, 0.99, 15):
            time = torch.full((len(noise.translation),), float(tau), dtype=torch.float64)
            _, velocity = flow.interpolate(noise, data, time, config)
            after, _ = flow.interpolate(noise, data, time + h, config)
            before, _ = flow.interpolate(noise, data, time - h, config)
            numeric = (after.to_vector() - before.to_vector()) / (2 * h)
            assert float((velocity.to_vector() - numeric).abs().max()) < 1e-6


def test_states_stay_on_the_half_sphere_with_tangent_velocity_of_constant_speed() -> None:
    noise, data, time = pair(S3)
    cases = [
        (noise, data, time),
        *((*pairs_at_angle(a), torch.tensor([0.37]).double()) for a in ANGLES),
    ]
    for noise, data, time in cases:
        state, velocity = flow.interpolate(noise, data, time, S3)
        q, u = state.rotation, velocity.rotation
        assert float((q.norm(dim=-1) - 1).abs().max()) < 1e-14
        assert float(q[..., 0].min()) > 0 and float((q * u).sum(-1).abs().max()) < 1e-14
        apart, opposite = ((noise.rotation + sign * data.rotation).norm(dim=-1) for sign in (-1, 1))
        torch.testing.assert_close(
            u.norm(dim=-1), 2 * torch.atan2(apart, opposite), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("config", [S3, LINEAR], ids=name)
def test_velocity_from_the_true_clean_action_is_the_true_velocity(config: FlowConfig) -> None:
    noise, data, time = pair(config)
    time[0] = config.time_scale  # the latest that is drawn
    state, velocity = flow.interpolate(noise, data, time, config)
    # On S³ neither the sign nor the length of a predicted quaternion matters.
    for scale in (1, -3) if config.rotation == "s3" else (1,):
        said = Action(data.translation, scale * data.rotation, data.gripper)
        derived = velocity_from_clean(said, state, time, config)
        torch.testing.assert_close(derived.to_vector(), velocity.to_vector(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_loss_is_zero_at_the_truth_and_only_there(config: FlowConfig) -> None:
    noise, data, time = pair(config)
    right = truth(noise, data, time, config)
    assert abs(float(flow.compute_loss(right, noise, data, time, config)[0])) < 1e-7
    for column, part in ((1, "translation"), (5, "rotation"), (5, "geodesic"), (7, "gripper")):
        wrong = right.to_vector().clone()
        wrong[..., column] += 0.1
        worse = flow.compute_loss(Action.from_vector(wrong), noise, data, time, config)
        assert float(worse[1][part]) > 1e-4
        untouched = {"rotation", "geodesic"} ^ {part} if column == 5 else {part}
        for other in worse[1].keys() - untouched - {part}:
            assert abs(float(worse[1][other])) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", ALL, ids=name)
def test_gradients_are_finite_at_every_degenerate_place(
    config: FlowConfig, dtype: torch.dtype
) -> None:
    for theta in (0.0, math.pi):
        start, end = (Action.from_vector(x.to_vector().to(dtype)) for x in pairs_at_angle(theta))
        for tau in (0.0, 0.5, 0.999, 1.0):
            time = torch.tensor([tau], dtype=dtype)
            right = truth(start, end, time, config).to_vector()
            for prediction in (right, -right, torch.zeros_like(right), right * 1e-6, right * 30):
                prediction = prediction.clone().requires_grad_()
                result = flow.compute_loss(Action.from_vector(prediction), start, end, time, config)
                (gradient,) = torch.autograd.grad(result[0], prediction)
                assert bool(torch.isfinite(result[0]))
                assert float(result[0].detach()) < 1e-6 or not torch.equal(prediction, right)
                assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) < 1e7


@pytest.mark.parametrize("config", ALL, ids=name)
def test_loss_gradient_equals_finite_differences(config: FlowConfig) -> None:
    noise, data, time = pair(config, (3, 2))
    right = truth(noise, data, time, config).to_vector()
    start = right + 0.2 * torch.randn(right.shape, generator=generator(4), dtype=right.dtype)

    def total(x: Tensor) -> Tensor:
        return flow.compute_loss(Action.from_vector(x), noise, data, time, config)[0]

    assert torch.autograd.gradcheck(total, (start.requires_grad_(),), atol=1e-6)
    if config.prediction == "velocity":  # right but for the speed
        for speed in (0.7, 1.4):
            assert torch.autograd.gradcheck(total, ((speed * right).requires_grad_(),), atol=1e-6)


def test_velocity_losses_are_the_papers_formulas() -> None:
    """Written out in NumPy: the paper's slerp and its difference quotient u, 1 - cos(v, u), ‖v - u‖² / 4,
    and the chord between the ends of a step along v and one along u."""
    noise, data, time = pair(S3)
    g = generator(7)
    said = Action(
        *(torch.randn(64, 5, size, generator=g, dtype=torch.float64) for size in (3, 4, 1))
    )
    q0, q1, t = noise.rotation.numpy(), data.rotation.numpy(), time.numpy()[:, None, None]
    angle = np.arccos(np.clip((q0 * q1).sum(-1, keepdims=True), -1, 1))

    def slerp(s: np.ndarray) -> np.ndarray:
        return (np.sin((1 - s) * angle) * q0 + np.sin(s * angle) * q1) / np.sin(angle)

    q, u = slerp(t), (slerp(t + 1e-6) - slerp(t - 1e-6)) / 2e-6
    v = said.rotation.numpy()
    v = v - (v * q).sum(-1, keepdims=True) * q  # what points along the sphere
    cosine = 1 - (v * u).sum(-1) / (np.linalg.norm(v, axis=-1) * np.linalg.norm(u, axis=-1))
    straight = {
        name: np.mean(
            (getattr(said, name) - (getattr(data, name) - getattr(noise, name))).numpy() ** 2
        )
        for name in ("translation", "gripper")
    }
    assert np.linalg.norm(u, axis=-1).min() > 0.01
    for kind, rotation in (("cosine", cosine), ("mse", ((v - u) ** 2).sum(-1) / 4)):
        parts = flow.compute_loss(said, noise, data, time, FlowConfig(rotation_loss=kind))[1]  # type: ignore[arg-type]
        assert parts["rotation"].item() == pytest.approx(rotation.mean(), rel=1e-6)
        for part, value in straight.items():
            assert parts[part].item() == pytest.approx(value, rel=1e-12)

    def after(w: np.ndarray, step: np.ndarray) -> np.ndarray:
        speed = np.linalg.norm(w, axis=-1, keepdims=True)
        return np.cos(speed * step) * q + np.sin(speed * step) * w / speed

    for delta in (None, 0.003, 0.05, 0.1, 0.5):
        step = np.minimum(1 - t, np.inf if delta is None else delta)
        ends, signs = (after(v, step), after(u, step)), np.array([1, -1]).reshape(2, 1, 1, 1)
        chord = np.linalg.norm(ends[0] + signs * ends[1], axis=-1).min(0).mean()
        found = flow.compute_loss(
            said, noise, data, time, dataclasses.replace(S3, geodesic_step=delta)
        )[1]
        assert found["geodesic"].item() == pytest.approx(chord, rel=1e-6)


def test_clean_losses_are_angles() -> None:
    angle, data = 0.03, robot_data((4, 5))
    turn = quat_exp(torch.tensor([0.0, angle, 0], dtype=torch.float64))
    wrong = Action(data.translation, -2 * quat_multiply(data.rotation, turn), data.gripper)
    noise, time = draw((4, 5), S3), torch.rand(4).double()
    for kind, expected in (("mse", angle**2), ("cosine", math.sin(angle / 2) ** 2)):
        config = FlowConfig(prediction="clean", rotation_loss=kind)  # type: ignore[arg-type]
        parts = flow.compute_loss(wrong, noise, data, time, config)[1]
        assert float(parts["rotation"]) == pytest.approx(expected, rel=1e-9)
        assert float(parts["geodesic"]) == pytest.approx(2 * math.sin(angle / 4), rel=1e-9)


def test_one_guess_for_sparse_turns() -> None:
    """Of many steps a fifth turns: a chord is best at their median, nano's squares at their mean."""
    angle, n = 0.35, 10
    turns = torch.zeros(1, n, 3, dtype=torch.float64)
    turns[:, : n // 5, 2] = angle
    data = dataclasses.replace(robot_data((1, n)), rotation=quat_exp(turns))
    for config, found in (
        (FlowConfig(prediction="clean"), 0.0),
        (FlowConfig(**get_preset("nano").flow), 0.2),
    ):
        guess = torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([guess], lr=0.01)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 400)
            said = dataclasses.replace(data, rotation=quat_exp(guess).expand(1, n, 4))
            optimizer.zero_grad()
            flow.compute_loss(said, data, data, torch.zeros(1).double(), config)[0].backward()
            optimizer.step()
        assert guess.tolist() == pytest.approx([0, 0, found * angle], abs=2e-3)


def test_weights_and_mask() -> None:
    noise, data, time = pair(S3)
    guess = Action.from_vector(torch.randn(64, 5, 8, generator=generator(5), dtype=torch.float64))
    config = FlowConfig(
        translation_weight=2, rotation_weight=3, gripper_weight=5, geodesic_weight=7
    )
    result = flow.compute_loss(guess, noise, data, time, config)
    p = result[1]
    expected = 2 * p["translation"] + 3 * (p["rotation"] + 7 * p["geodesic"]) + 5 * p["gripper"]
    torch.testing.assert_close(result[0], expected)

    mask = torch.rand(64, 5, generator=generator(6)) < 0.5
    mask[0] = False
    with pytest.raises(ValueError, match="64, 5"):
        flow.compute_loss(guess, noise, data, time, config, mask[:, :1])
    masked = flow.compute_loss(guess, noise, data, time, S3, mask)[1]
    flat = [x.to_vector()[mask][:, None] for x in (guess, noise, data)]
    chosen = flow.compute_loss(
        *map(Action.from_vector, flat), time[:, None].expand(64, 5)[mask], S3
    )[1]
    torch.testing.assert_close(masked, chosen)
    assert float(flow.compute_loss(guess, noise, data, time, S3, torch.zeros_like(mask))[0]) == 0


@pytest.mark.parametrize("config", ALL, ids=name)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_integrating_the_true_prediction_lands_on_the_data(config: FlowConfig, steps: int) -> None:
    noise, data, _ = pair(config)

    def predict(state: Action, time: Tensor) -> Action:
        assert time.shape == (64,)
        return (
            data if config.prediction == "clean" else velocity_from_clean(data, state, time, config)
        )

    found = flow.integrate(predict, noise, steps, config)
    torch.testing.assert_close(found.to_vector(), data.to_vector(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_each_action_at_a_time_of_its_own(config: FlowConfig) -> None:
    """As if each were a chunk of its own; and where all times are the same, as with one for the chunk."""
    noise, data, one = pair(config)
    said = Action.from_vector(torch.randn(64, 5, 8, generator=generator(5), dtype=torch.float64))
    times = torch.rand(64, 5, generator=generator(6), dtype=torch.float64)
    times[:, 0] = 1
    alone = [Action.from_vector(x.to_vector().reshape(320, 1, 8)) for x in (noise, data, said)]

    def everything(noise: Action, data: Action, said: Action, time: Tensor) -> list[Tensor]:
        state, velocity = flow.interpolate(noise, data, time, config)
        derived = velocity_from_clean(said, state, time, config)
        whole = [x.to_vector().reshape(320, 8) for x in (state, velocity, derived)]
        return [*whole, flow.compute_loss(said, noise, data, time, config)[0]]

    for a, b in zip(
        everything(noise, data, said, times), everything(*alone, times.flatten()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    alike = everything(noise, data, said, one[:, None].expand(64, 5))
    torch.testing.assert_close(everything(noise, data, said, one), alike, rtol=0, atol=0)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_integrating_leaves_committed_actions_as_they_are(config: FlowConfig) -> None:
    noise, data, _ = pair(config)
    decided, held = robot_data((64, 5), seed=9), flow.sample_committed((64, 5), 3, generator())
    seen: list[tuple[Action, Tensor]] = []

    def predict(state: Action, time: Tensor) -> Action:
        seen.append((state, time))
        return (
            data if config.prediction == "clean" else velocity_from_clean(data, state, time, config)
        )

    found = flow.integrate(predict, noise, 4, config, flow.CommittedPrefix(decided, held))
    for k, (state, time) in enumerate([*seen, (found, torch.ones(64, 5).double())]):
        assert torch.equal(state.to_vector()[held], decided.to_vector()[held])
        assert torch.equal(time, torch.where(held, 1.0, torch.full((64, 5), k / 4).double()))
    torch.testing.assert_close(
        found.to_vector()[~held], data.to_vector()[~held], rtol=0, atol=1e-12
    )


def test_what_is_held_is_a_beginning_of_any_length_as_often() -> None:
    held = flow.sample_committed((20_000, 2, 5), 3, generator())
    lengths = held.sum(-1)
    assert torch.equal(held, torch.arange(5) < lengths[..., None])
    share = torch.bincount(lengths.flatten(), minlength=5) / lengths.numel()
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0.25, 0.25, 0]), atol=0.01, rtol=0)
    assert not flow.sample_committed((4, 5), 0, generator()).any()


def test_mistakes_of_given_actions_are_made_up_for_by_the_next() -> None:
    """Arms that execute both: apart by the mistakes while actions are given, together from the next on."""
    shape, count = (4000, 5), 4000
    data, held = robot_data(shape), flow.sample_committed(shape, 3, generator(5))
    wrong = flow.perturb_committed(data, held, generator(6))
    assert torch.equal(wrong.gripper, data.gripper)
    x, q = other_x, other_q = (
        torch.zeros(count, 3).double(),
        quat_exp(torch.ones(count, 3).double()),
    )
    for i in range(shape[1]):
        x, q = apply_action(x, q, data.translation[:, i], data.rotation[:, i])
        other_x, other_q = apply_action(
            other_x, other_q, wrong.translation[:, i], wrong.rotation[:, i]
        )
        assert torch.equal((x - other_x).norm(dim=-1) > 1e-6, held[:, i])
        torch.testing.assert_close(x[~held[:, i]], other_x[~held[:, i]], rtol=0, atol=1e-9)
        torch.testing.assert_close(q[~held[:, i]], other_q[~held[:, i]], rtol=0, atol=1e-9)
    first, (spread, turn) = held[:, 0], flow.MISTAKE
    moved = (wrong.translation - data.translation)[first, 0] / data.translation.flatten(0, 1).std(0)
    turned = quat_distance(wrong.rotation, data.rotation)[first, 0]
    assert math.isclose(float(moved.std()), spread, rel_tol=0.05)
    known = torch.rand(shape, generator=generator(8)) < 0.7
    both = data, Action(data.translation + 30 * ~known[..., None], data.rotation, data.gripper)
    made = [
        flow.perturb_committed(x, held, generator(6), known).translation - x.translation
        for x in both
    ]
    torch.testing.assert_close(*made, rtol=0, atol=1e-9)  # whatever those are that do not count
    assert math.isclose(float(turned.square().mean().sqrt()), turn * 3**0.5, rel_tol=0.05)


@pytest.mark.parametrize("config", [c for c in ALL if c.prediction == "clean"], ids=name)
def test_a_length_that_the_loss_does_not_teach_changes_no_state_on_the_way(
    config: FlowConfig,
) -> None:
    """Else the network would meet states that it has not seen in training."""
    noise, data, time = pair(config)
    longer = Action(data.translation, 15 * data.rotation, data.gripper)
    taught = float(flow.compute_loss(longer, noise, data, time, config)[0]) > 1e-6
    assert taught == (config.rotation == "linear" and config.rotation_loss == "mse")
    states: list[Action] = []

    def predict(state: Action, time: Tensor) -> Action:
        states.append(state)
        return longer

    flow.integrate(predict, noise, 4, config)
    for k, state in enumerate(states):
        expected = flow.interpolate(
            noise, data, torch.full((64,), k / 4, dtype=torch.float64), config
        )[0]
        assert torch.allclose(state.rotation, expected.rotation, atol=1e-9) == (
            k == 0 or not taught
        )


def test_error_falls_as_one_over_steps() -> None:
    """A field that Euler does not integrate exactly, with a known end: x' = x, q' = ½ (a q + q b)."""
    noise = draw((16, 5), S3)
    a = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64)
    b = torch.tensor([-0.3, 1.1, 0.9], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)

    def predict(state: Action, _: Tensor) -> Action:
        assert float(state.rotation[..., 0].min()) >= 0  # as all states in training
        left = quat_multiply(torch.cat([zero, a]), state.rotation)
        right = quat_multiply(state.rotation, torch.cat([zero, b]))
        return Action(state.translation, (left + right) / 2, -state.gripper)

    rotation = quat_multiply(quat_multiply(quat_exp(a), noise.rotation), quat_exp(b))
    end = Action(noise.translation * math.e, rotation, noise.gripper / math.e)
    results = {n: flow.integrate(predict, noise, n, S3) for n in (50, 100, 200)}
    for n in (50, 100):
        for part in ("translation", "gripper"):
            error = [
                float((getattr(results[k], part) - getattr(end, part)).abs().max())
                for k in (n, 2 * n)
            ]
            assert error[0] / error[1] == pytest.approx(2, rel=0.05)
        error = [float(quat_distance(results[k].rotation, end.rotation).mean()) for k in (n, 2 * n)]
        assert error[0] / error[1] == pytest.approx(2, rel=0.05)
    assert error[1] < 0.01


def test_bad_configuration_is_one_line_with_a_suggestion() -> None:
    for field in ("rotation", "rotation_loss", "prediction"):
        refuses(f"{field} 'wrong'", FlowConfig, **{field: "wrong"})
    for steps in (0, 2.5):
        refuses("flow steps", FlowConfig, steps=steps)
    refuses(
        "at least 1", flow.integrate, lambda state, _: state, flow.sample_noise((1, 1), S3), 0, S3
    )
