"""Converts an action chunk to target poses, and to rotations about the axes of the base frame."""

import numpy as np
import torch

from spear.geometry import apply_action, quat_canonical, quat_conjugate, quat_multiply
from spear.types import Array


def compute_target_poses(state: Array, actions: Array) -> tuple[Array, Array]:
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
    return torch.stack(positions).numpy(), torch.stack(rotations).numpy()


def compute_base_rotations(state: Array, actions: Array) -> Array:
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
