"""Results stay the same if the program that uses spear changes PyTorch's default type or device."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from spear import embodiments
from spear.chunks import ChunkExecutor
from spear.flow import FlowConfig, sample_noise, sample_time
from spear.policy import Spear1Policy, load_vlm

DEFAULTS: dict[str, Callable[[], None]] = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "meta device": lambda: torch.set_default_device("meta"),
}


@pytest.fixture(params=DEFAULTS)
def change_defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A function that changes one of the defaults until the end of the test."""
    yield DEFAULTS[request.param]
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def infer(policy: Spear1Policy) -> np.ndarray:
    """Infer a chunk from the example of an observation, with fixed noise."""
    observation = embodiments.load("generic").example() | {"seed": 1}
    return policy.infer(observation)["actions"]


def test_a_policy_gives_the_same_actions(change_defaults: Callable[[], None]) -> None:
    expected = infer(Spear1Policy.load("nano"))
    policy = Spear1Policy.load("nano")

    change_defaults()

    assert np.array_equal(infer(policy), expected)


def test_a_policy_that_is_loaded_later_gives_the_same_actions(
    change_defaults: Callable[[], None],
) -> None:
    expected = infer(Spear1Policy.load("nano"))

    change_defaults()

    assert np.array_equal(infer(Spear1Policy.load("nano")), expected)


def test_a_spear_vlm_gives_the_same_answer(change_defaults: Callable[[], None]) -> None:
    vlm = load_vlm("nano-vlm")
    image = np.random.default_rng(0).integers(0, 255, (128, 192, 3)).astype(np.uint8)
    question = "How far away is the bowl?"
    (expected,) = vlm.answer([image], [question])

    change_defaults()

    (answer,) = vlm.answer([image], [question])
    assert answer.segments == expected.segments


def test_noise_and_flow_times_do_not_depend_on_the_defaults(
    change_defaults: Callable[[], None],
) -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        noise = sample_noise((2, 5), FlowConfig(), torch.Generator("cpu").manual_seed(0))
        tau = sample_time(4, FlowConfig(), torch.Generator("cpu").manual_seed(0))
        return noise.to_vector(), tau

    expected_noise, expected_tau = draw()

    change_defaults()

    noise, tau = draw()
    assert torch.equal(noise, expected_noise)
    assert torch.equal(tau, expected_tau)


def execute_two_chunks() -> np.ndarray:
    """Execute a chunk and one that arrives later, and return the actions [5, 8] where they join."""
    executor = ChunkExecutor("async", replan_interval=1)
    chunk = np.zeros((5, 8), np.float32)
    chunk[:, 0] = 0.01  # meters forward
    chunk[:, 3] = 1  # no rotation: the quaternion (1, 0, 0, 0)
    chunk[:, 7] = 1  # gripper open
    executor.add_chunk(chunk)
    actions = [executor.next_action()]
    later_chunk = chunk.copy()
    later_chunk[:, 0] = 0.02
    executor.add_chunk(later_chunk, observed_tick=0)
    actions += [executor.next_action() for _ in range(4)]
    return np.array(actions)


def test_joined_chunks_do_not_depend_on_the_defaults(change_defaults: Callable[[], None]) -> None:
    expected = execute_two_chunks()

    change_defaults()

    assert np.array_equal(execute_two_chunks(), expected)
