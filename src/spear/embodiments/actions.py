"""Where a chunk of actions leads, as poses and as rotations about the base frame's axes."""

import numpy as np
import torch

from spear.geometry import apply_action, quat_canonical, quat_conjugate, quat_multiply
from spear.types import Array


def compute_target_poses(state: Array, actions: Array) -> tuple[Array, Array]:
    """Compute the poses to which the actions of a chunk lead, one after the other.

    Args:
        state: [8] the state from which the chunk begins.
        actions: [H, 8] as `spear.types.Action` has them.

    Returns:
        Positions [H, 3] (m) and quaternions [H, 4] after each action, base frame, float64.

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
    """Compute the rotations of a chunk about the axes of the base frame.

    Args:
        state: [8] the state from which the chunk begins.
        actions: [H, 8] as `spear.types.Action` has them.

    Returns:
        [H, 4] canonical unit quaternions R of R_next = R · R_now, float64.
    """
    _, target_rotations = compute_target_poses(state, actions)
    rotations_after = torch.from_numpy(target_rotations)
    first = torch.from_numpy(np.float64(state[3:7]))
    rotations_before = torch.cat([first[None], rotations_after[:-1]])
    return quat_canonical(quat_multiply(rotations_after, quat_conjugate(rotations_before))).numpy()
