"""A robot without an arm, to try `spear diagnose`: recorded pictures, and a fault at will.

    spear serve --policy POLICY --record recordings                  # in one terminal
    python examples/replay_client.py EPISODES --fault turned-base    # in another one

EPISODES is a dataset in any format that spear reads. Pictures and instructions come from it. The
arm is made of numbers: it begins at the pose of the episode, executes the first action of each
answer, and stands still while it waits. Its pictures show the recorded arm, not this one.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spear.cli import run_reporting_errors
from spear.data.readers.formats import read_episodes
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import get_camera_key
from spear.serve.client import RemotePolicy
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util.images import decode_image


def turn_base(action: Array) -> Array:
    """Execute a translation in a base that is mounted a quarter turn wrong."""
    turned = action.copy()
    turned[0] = -action[1]
    turned[1] = action[0]
    return turned


def invert_gripper(action: Array) -> Array:
    """Open the gripper for closed, and the other way round."""
    return np.array([*action[:7], 1 - action[7]])


def mirror_picture(picture: Array) -> Array:
    """Exchange left and right of a picture [height, width, 3]."""
    return np.ascontiguousarray(picture[:, ::-1])


def leave_unchanged(value: Array) -> Array:
    """Change nothing."""
    return value


@dataclass(frozen=True)
class Fault:
    """What is wrong with the robot.

    execute         (action [8]) -> the action that the arm really executes.
    change_picture  (picture [height, width, 3]) -> the picture that the robot sends.
    """

    execute: Callable[[Array], Array] = leave_unchanged
    change_picture: Callable[[Array], Array] = leave_unchanged


FAULTS = {
    "none": Fault(),
    "turned-base": Fault(execute=turn_base),
    "inverted-gripper": Fault(execute=invert_gripper),
    "mirrored-camera": Fault(change_picture=mirror_picture),
}


def replay_episode(episode: Episode, policy: RemotePolicy, fault: Fault) -> int:
    """Let the made arm act in the pictures of an episode. Return the number of observations."""
    position = episode.position[0]
    rotation = episode.rotation[0]
    opening = episode.gripper[0]
    stride = max(1, round(episode.rate_hz / CONTROL_RATE_HZ))
    steps = range(0, len(episode), stride)
    for step in steps:
        state = np.array([*position, *rotation, opening], np.float32)
        observation = {"observation/state": state, "prompt": episode.instruction}
        for camera in policy.image_sizes:
            if camera in episode.images:
                picture = decode_image(episode.images[camera][step], f"{episode.source} {camera}")
                observation[get_camera_key(camera)] = fault.change_picture(picture)

        action = fault.execute(policy.infer(observation)["actions"][0])

        positions, rotations = compute_target_poses(state, action[None].astype(np.float32))
        position = positions[0]
        rotation = rotations[0]
        opening = np.clip(action[7], 0, 1)
        time.sleep(1 / CONTROL_RATE_HZ)  # while the arm moves
    return len(steps)


def main() -> None:
    """Replay episodes to a server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("episodes", type=Path, help="dataset, in any format that spear reads")
    parser.add_argument("--fault", choices=FAULTS, default="none", help="what is wrong")
    parser.add_argument("--num-episodes", type=int, default=6, help="how many are replayed")
    parser.add_argument("--url", default="ws://localhost:8000", help="the server's address")
    arguments = parser.parse_args()

    policy = RemotePolicy(arguments.url)
    episodes = read_episodes(arguments.episodes)
    for episode in itertools.islice(episodes, arguments.num_episodes):
        num_observations = replay_episode(episode, policy, FAULTS[arguments.fault])
        policy.close()  # a new connection begins a new recording
        print(f"{episode.source}: {num_observations} observations", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_reporting_errors(main))
