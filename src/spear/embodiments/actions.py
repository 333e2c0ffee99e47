"""Checks an action chunk, and converts it to target poses or to rotations about base axes."""

import numpy as np
import torch

from spear.embodiments.kinematics import Poses
from spear.errors import SpearError
from spear.geometry import (
    apply_action,
    quat_canonical,
    quat_conjugate,
    quat_multiply,
    validate_unit_quat,
)
from spear.types import (
    ACTION_DIM,
    CONTROL_RATE_HZ,
    MAX_EE_SPEED_M_S,
    MAX_EE_TURN_RAD_S,
    Array,
)

MAX_ACTION_LENGTH_M = MAX_EE_SPEED_M_S / CONTROL_RATE_HZ  # longer actions are implausible
MAX_ACTION_TURN_RAD = MAX_EE_TURN_RAD_S / CONTROL_RATE_HZ  # larger rotations are implausible


def validate_chunk(actions: Array) -> Array:
    """Check a policy's chunk before a robot executes it.

    Args:
        actions: what the policy returned as its action chunk.

    Returns:
        The chunk as an array [H, 8]: translation (m, base frame), rotation (unit quaternion,
        end-effector frame), gripper opening.

    Raises:
        SpearError: if it is not [H, 8] finite numbers with unit quaternions, or if one of its
            actions is longer than `MAX_ACTION_LENGTH_M` or turns by more than
            `MAX_ACTION_TURN_RAD`.

    Example:
        >>> still = np.tile([0.0, 0, 0, 1, 0, 0, 0, 1], (5, 1))
        >>> validate_chunk(still).shape
        (5, 8)
    """
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not np.isfinite(actions).all():
        raise SpearError(
            f"the actions, of shape {list(actions.shape)}, are not finite or not [H, 8], so the "
            "robot must not move. Check the policy's weights, and that a server of it has "
            "--embodiment generic."
        )
    # [2] the length (m) and the turn (rad) of the longest actions
    max_length_m, max_turn_rad = measure_lengths_and_angles(actions).max(axis=0, initial=0)
    if max_length_m > MAX_ACTION_LENGTH_M or max_turn_rad > MAX_ACTION_TURN_RAD:
        raise SpearError(
            f"the policy wants to go {max_length_m:.2g} m, or turn by {max_turn_rad:.2g} rad, "
            "in one step, so the robot must not move. Check the policy with `spear doctor`."
        )
    validate_unit_quat(torch.from_numpy(np.float64(actions[:, 3:7])), "actions[3:7]")
    return actions


def measure_lengths_and_angles(actions: Array) -> Array:
    """Measure the length of the translation (m) and the angle of the rotation (rad) of actions.

    Args:
        actions: [..., 8].

    Returns:
        [..., 2], the length first.
    """
    translation, real, imaginary, _ = np.split(np.float64(actions), (3, 4, 7), axis=-1)
    length_m = np.linalg.norm(translation, axis=-1)
    # The quaternion of a rotation by an angle α has real part cos(α/2), and the norm of its
    # imaginary part is sin(α/2). Computed here, because `quat_log` would take half a millisecond.
    sine = np.linalg.norm(imaginary, axis=-1)
    turn_rad = 2 * np.arctan2(sine, np.abs(real[..., 0]))
    return np.stack([length_m, turn_rad], axis=-1)


def compute_target_poses(state: Array, actions: Array) -> Poses:
    """Compute the poses to which the actions of a chunk lead, if they are executed in order.

    Args:
        state: [8] the state from which the chunk begins.
        actions: [H, 8] the action chunk, as `Action.to_vector` arranges it.

    Returns:
        The position [H, 3] (m) and the quaternion [H, 4] after each action, base frame, float64.

    Example:
        >>> state = np.array([0.4, 0, 0.2, 1, 0, 0, 0, 1])
        >>> step = np.array([[0.01, 0, 0, 1, 0, 0, 0, 1]])
        >>> compute_target_poses(state, np.repeat(step, 2, axis=0))[0]
        array([[0.41, 0.  , 0.2 ],
               [0.42, 0.  , 0.2 ]])
    """
    position = torch.from_numpy(np.float64(state[:3]))
    rotation = torch.from_numpy(np.float64(state[3:7]))
    positions = []
    rotations = []
    for action in torch.from_numpy(np.float64(actions)):
        position, rotation = apply_action(position, rotation, action[:3], action[3:7])
        positions.append(position)
        rotations.append(rotation)
    return Poses(torch.stack(positions).numpy(), torch.stack(rotations).numpy())


def compute_step_quats_about_base_axes(state: Array, actions: Array) -> Array:
    """Compute the rotation of each action of a chunk about the axes of the base frame.

    An action's own rotation is about the axes of the end-effector frame, but several robots take
    rotations about base axes.

    Args:
        state: [8] the state from which the chunk begins.
        actions: [H, 8] the action chunk, as `Action.to_vector` arranges it.

    Returns:
        [H, 4] canonical unit quaternions, float64. If the orientation is R_now before an action and
        R_next after it, the action's quaternion is that of the rotation R in R_next = R · R_now.
    """
    _, target_rotations = compute_target_poses(state, actions)
    rotations_after = torch.from_numpy(target_rotations)  # [H, 4]
    first_rotation = torch.from_numpy(np.float64(state[3:7]))
    rotations_before = torch.cat([first_rotation[None], rotations_after[:-1]])  # [H, 4]
    base_rotations = quat_multiply(rotations_after, quat_conjugate(rotations_before))
    return quat_canonical(base_rotations).numpy()
