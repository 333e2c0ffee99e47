"""What a chunk's actions are measured from: from the pose before each, or from the observed pose.

The package describes a chunk by steps: each action is the motion from the pose that the action
before it leads to ("previous"). Other projects, such as openpi, describe it by poses: each action
is the motion from the observed pose to the pose that it leads to ("observed"). The paper does not
say which of the two SPEAR-1 uses.

Both describe the same motions, so a policy may learn either. Only its normalization
(`spear.data.normalize`) knows which one it is: datasets, execution and robots always have steps.

Example:
    >>> import torch
    >>> steps = Action.from_vector(torch.tensor([[0.1, 0, 0, 1, 0, 0, 0, 1]] * 3))
    >>> convert_steps_to_motions_from_observed(steps).translation[:, 0]
    tensor([0.1000, 0.2000, 0.3000])
"""

import torch

from spear.geometry import quat_canonical, quat_conjugate, quat_multiply
from spear.types import Action


def convert_steps_to_motions_from_observed(steps: Action) -> Action:
    """Convert a chunk of steps to motions from the observed pose.

    Args:
        steps: chunks [..., H, ·], each action measured from the pose before it.

    Returns:
        Chunks [..., H, ·]. Translation k is the sum of the first k steps (base frame), rotation k
        the product of the first k (from the observed end-effector frame), with w >= 0. Gripper
        commands are absolute in either case.
    """
    rotation = steps.rotation[..., 0, :]
    rotations = [rotation]
    for step_rotation in steps.rotation[..., 1:, :].unbind(-2):
        # A step's rotation is about the axes of the end effector at that step.
        rotation = quat_multiply(rotation, step_rotation)
        rotations.append(rotation)
    return Action(
        translation=steps.translation.cumsum(-2),
        rotation=quat_canonical(torch.stack(rotations, -2)),
        gripper=steps.gripper,
    )


def convert_motions_to_steps(motions: Action) -> Action:
    """Convert motions from the observed pose back to steps.

    This inverts `convert_steps_to_motions_from_observed`.

    Args:
        motions: chunks [..., H, ·], each action measured from the observed pose.
    """
    translation = motions.translation
    rotation = motions.rotation
    first_translation = translation[..., :1, :]  # the first step begins at the observed pose
    first_rotation = rotation[..., :1, :]
    later_translations = translation[..., 1:, :] - translation[..., :-1, :]
    later_rotations = quat_multiply(quat_conjugate(rotation[..., :-1, :]), rotation[..., 1:, :])
    return Action(
        translation=torch.cat([first_translation, later_translations], -2),
        rotation=quat_canonical(torch.cat([first_rotation, later_rotations], -2)),
        gripper=motions.gripper,
    )
