"""Observations from outside: what is refused, with which words, and what is quietly put right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spear.errors import SpearError
from spear.policy import Spear1Policy, load_vlm, locate

STATE = np.array([0.45, 0, 0.2, 0, 1, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def policy() -> Spear1Policy:
    return Spear1Policy.load("nano")


def observation(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = {"image": "observation/image", "wrist": "observation/wrist_image", "state": "observation/state"}
    whole = {
        "observation/image": rng.integers(0, 256, (210, 280, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (112, 112, 3), dtype=np.uint8),
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
        "seed": 1,
    }
    return {**whole, **{names.get(k, k): v for k, v in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": None}, "observation without 'observation/state'"),
        ({"state": STATE[:7]}, r"shape \(7,\): give 8 numbers"),
        ({"state": STATE * np.nan}, "not finite"),
        ({"state": STATE * 1.1}, "not a unit quaternion: observation/state"),
        ({"image": None}, "observation without 'observation/image'"),
        ({"image": np.zeros((210, 280, 3), np.float32)}, "wrong image type: float32"),
        ({"wrist": np.zeros((3, 112, 112), np.uint8)}, "wrong image type: uint8"),
        ({"prompt": "  "}, "empty instruction"),
        ({"prompt": "put " * 200}, "prompt too long"),
    ],
)
def test_what_cannot_be_acted_on_is_refused(
    policy: Spear1Policy, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpearError, match=message):
        policy.infer(observation(**changes))


def test_a_quaternion_that_is_nearly_unit_is_normalised(policy: Spear1Policy) -> None:
    exact = policy.infer(observation())["actions"]
    rounded = STATE.copy()
    rounded[3:7] *= 1.0005
    np.testing.assert_allclose(policy.infer(observation(state=rounded))["actions"], exact, atol=1e-5)
    np.testing.assert_allclose(
        policy.infer(observation(state=STATE * [1, 1, 1, -1, -1, -1, -1, 1]))["actions"], exact, atol=1e-5
    )


def test_the_wrist_camera_may_be_missing(policy: Spear1Policy) -> None:
    without = policy.infer(observation(wrist=None))["actions"]
    assert without.shape == (5, 8) and np.isfinite(without).all()
    assert not np.allclose(without, policy.infer(observation())["actions"])


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(SpearError, match=r"no model 'nanno'.*nano"):
        locate("nanno")
    with pytest.raises(SpearError, match="no model"):
        load_vlm("nowhere/at/all")


def test_weights_in_bfloat16_act_alike(policy: Spear1Policy) -> None:
    half = Spear1Policy.load("nano", dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    one, two = (p.infer(observation())["actions"] for p in (policy, half))
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(one, two, atol=0.02)
