"""LeRobot's own commands on SPEAR-1, compared with spear's own: `python check.py FOLDER`.

Runs in an environment with lerobot, spear and this plugin. It records two episodes in the
simulator, trains 20 steps, compares actions bit for bit, and evaluates nano in closed loop. Then it
makes up an arm of joint angles, trains on its data through LeRobot's kinematics, and drives it with
lerobot-rollout.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lerobot_policy_spear.robots import read_columns

from spear.errors import SpearError
from spear.train.optimize import compute_learning_rate_factor
from spear.train.recipes import get_recipe

# The made-up arm.
MOTORS = ["base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3"]
MOTOR_AXES = ["0 0 1", "0 1 0", "0 1 0", "1 0 0", "0 1 0", "1 0 0"]
JOINT_KEYS = [f"{name}.pos" for name in (*MOTORS, "gripper")]
REST_POSITION = np.array([0, -30, 60, 0, 30, 0, 50], np.float32)  # degrees; the gripper, percent
ARM_FPS = 10
IMAGE_SHAPE = (60, 80, 3)

EXTERNAL_KEY = "observation.images.external"
WRIST_KEY = "observation.images.wrist"
STATE_KEY = "observation.state"

Frame = dict[str, Any]


def run(command: str, *arguments: str) -> str:
    """Run a command of this environment and return what it prints; end the check if it fails."""
    path = str(Path(sys.executable).parent / command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [path, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if process.returncode:
        output = f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
        sys.exit(f"{command} {' '.join(arguments)}\n{output}")
    return process.stdout + process.stderr


def train(data: Path, out: Path, steps: int, *options: str) -> Path:
    """Train with lerobot-train and return the folder of the trained policy."""
    run(
        "lerobot-train",
        "--policy.type=spear1",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        f"--dataset.repo_id=local/{data.name}",
        f"--dataset.root={data}",
        f"--output_dir={out}",
        f"--steps={steps}",
        f"--save_freq={steps}",
        "--batch_size=8",
        "--num_workers=0",
        "--env_eval_freq=0",
        *options,
    )
    return (out / "checkpoints" / "last" / "pretrained_model").resolve()


def assert_refused(words: str, call: Callable[..., Any], *arguments: Any) -> None:
    """Assert that a call raises a SpearError with these words."""
    try:
        call(*arguments)
    except SpearError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


# Simulated episodes: train, compare, resume, evaluate


def check_resumed_training(saved: Path, steps: int) -> None:
    """Resume a training, and check that the learning rate falls until the last step.

    A schedule of more steps than the recipe's 600 is checked, too.
    """
    from lerobot.configs import PreTrainedConfig
    from torch import optim, zeros

    config_path = saved / "train_config.json"
    run("lerobot-train", f"--config_path={config_path}", "--resume=true", f"--steps={steps}")

    optimization = get_recipe("nano-post").optimization
    state_path = saved.parents[1] / "last" / "training_state" / "scheduler_state.json"
    state = json.loads(state_path.read_text())
    last_lr = state["_last_lr"][0]
    assert state["last_epoch"] == steps, state["last_epoch"]
    assert np.isclose(last_lr, optimization.final_lr * optimization.lr), last_lr

    num_steps = 4000
    preset = PreTrainedConfig.from_pretrained(saved).get_scheduler_preset()
    optimizer = optim.SGD([zeros(1)], lr=1.0)
    lr_factor = preset.build(optimizer, num_steps).lr_lambdas[0]
    longer = dataclasses.replace(optimization, steps=num_steps)
    for step in (0, 600, num_steps - 1):
        assert lr_factor(step) == compute_learning_rate_factor(step, longer)


def check_incomplete_observations(policy: Any, preprocess: Any, frame: Frame) -> None:
    """The wrist camera may be missing; the external one, some of the state or the task may not."""
    without_wrist = {key: value for key, value in frame.items() if key != WRIST_KEY}
    policy.reset()
    assert policy.select_action(preprocess(without_wrist)).isfinite().all()

    without_external = {key: value for key, value in frame.items() if key != EXTERNAL_KEY}
    assert_refused(EXTERNAL_KEY, policy.select_action, preprocess(without_external))
    short_state = {**frame, STATE_KEY: frame[STATE_KEY][:6]}
    assert_refused(STATE_KEY, policy.select_action, preprocess(short_state))
    without_task = {**frame, "task": ""}
    assert_refused("--task", policy.select_action, preprocess(without_task))


def check_gathered_weights(policy: Any, folder: Path) -> None:
    """Weights that LeRobot 0.6 has gathered from several processes are saved as others are.

    LeRobot 0.7 passes no weights, because the policy gathers them itself.
    """
    if "state_dict" not in inspect.signature(policy.save_pretrained).parameters:
        return
    gathered = {key: weight * 2 for key, weight in policy.state_dict().items()}
    policy.save_pretrained(folder, state_dict=gathered)
    loaded = type(policy).from_pretrained(folder, config=policy.config)
    for key, weight in loaded.state_dict().items():
        assert (weight == gathered[key]).all(), key


def compare_actions(saved: Path, data: Path) -> None:
    """Compare `select_action` on LeRobot's frames with spear's `infer` on spear's own.

    Also saves nano for LeRobot, beside the trained policy.
    """
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from spear.policy import Spear1Policy

    config = PreTrainedConfig.from_pretrained(saved)
    policy_class = get_policy_class("spear1")
    lerobot_policy = policy_class.from_pretrained(saved, config=config)
    preprocess, postprocess = make_pre_post_processors(config, str(saved))

    spear_policy = Spear1Policy.load(saved / "spear")
    distribution = spear_policy.training_distribution
    assert distribution, "no seen.json"
    cameras = ", ".join(distribution.red_minus_blue)
    print(f"seen.json: cameras {cameras}; episodes begin at {distribution.mean_initial_opening:g}")

    dataset = LeRobotDataset(f"local/{data.name}", root=data)
    spear_observations = read_spear_observations(data, dataset)
    indices = range(0, len(spear_observations), 4)
    max_difference = 0.0
    for index in indices:
        spear_action = spear_policy.infer(spear_observations[index])["actions"][0]
        frame = {
            key: value
            for key, value in dataset[index].items()
            if key.startswith("observation.") or key == "task"
        }
        lerobot_action = postprocess(lerobot_policy.select_action(preprocess(frame)))[0].numpy()
        difference = float(np.abs(spear_action - lerobot_action).max())
        max_difference = max(max_difference, difference)
    result = "equal bit for bit" if max_difference == 0 else f"up to {max_difference:g} apart"
    print(f"select_action and spear's infer, {len(indices)} frames: {result}")

    check_incomplete_observations(lerobot_policy, preprocess, frame)
    check_gathered_weights(lerobot_policy, saved.parent / "gathered")
    assert_refused("--peft", lerobot_policy.wrap_with_peft)
    assert_refused("streaming", read_columns, saved.parent, "index")

    # nano itself, with its own statistics.
    config.pretrained_path = None
    nano = saved.parent / "nano"
    for component in (policy_class(config), preprocess, postprocess):
        component.save_pretrained(nano)
    for folder, has_statistics_of_dataset in ((saved, True), (nano, False)):
        resumed = policy_class.from_pretrained(folder, config=config, dataset_meta=dataset.meta)
        assert resumed.spear.normalizer == spear_policy.normalizer, folder
        has_distribution = bool(resumed.spear.training_distribution)
        assert has_distribution is has_statistics_of_dataset, folder
    print("trained on from either, it has the dataset's statistics")


def read_spear_observations(data: Path, dataset: Any) -> list[dict[str, Any]]:
    """A dataset's frames as observations of spear's own policy, read without LeRobot."""
    import pyarrow.parquet as pq

    from spear.util.images import decode_image

    observations = []
    rows = pq.read_table(data / "data/chunk-000/file-000.parquet").to_pylist()
    for index, row in enumerate(rows):
        observation = {
            "observation/image": decode_image(row[EXTERNAL_KEY]["bytes"]),
            "observation/wrist_image": decode_image(row[WRIST_KEY]["bytes"]),
            "observation/state": np.float32(row[STATE_KEY]),
            "prompt": dataset[index]["task"],
        }
        observations.append(observation)
    return observations


def evaluate_nano(saved: Path, out: Path) -> None:
    """Evaluate nano in closed loop with lerobot-eval."""
    run(
        "lerobot-eval",
        f"--policy.path={saved.parent / 'nano'}",
        "--env.type=spear",
        "--env.task=put_on",
        "--eval.n_episodes=8",
        "--eval.batch_size=4",
        f"--output_dir={out}",
    )
    result = json.loads((out / "eval_info.json").read_text())["overall"]
    num_episodes = result["n_episodes"]
    print(f"lerobot-eval, nano on put_on: {result['pc_success']:g} % of {num_episodes} episodes")


# The made-up arm of joint angles


def write_arm_urdf(path: Path) -> None:
    """Write the arm: a chain of the motors, with links of 0.1 and 0.2 m."""
    inertia = '<inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/>'
    inertial = f'<inertial><mass value="1"/>{inertia}</inertial>'
    limits = '<limit lower="-3" upper="3" effort="9" velocity="9"/>'
    elements = [f'<link name="root">{inertial}</link>']
    parent = "root"
    for number, (name, axis) in enumerate(zip(MOTORS, MOTOR_AXES, strict=True)):
        # The first two joints are 0.1 m apart along z, and the others 0.2 m along x.
        x_m = 0.2 if number > 1 else 0
        z_m = 0.1 if number < 2 else 0
        child = f"{name}_link"
        elements.append(
            f'<joint name="{name}" type="revolute"><parent link="{parent}"/><child link="{child}"/>'
            f'<origin xyz="{x_m} 0 {z_m}"/><axis xyz="{axis}"/>{limits}</joint>'
        )
        elements.append(f'<link name="{child}">{inertial}</link>')
        parent = child
    path.write_text(f'<robot name="arm">{"".join(elements)}</robot>')


def write_joint_dataset(root: Path) -> None:
    """Write a LeRobot dataset of 30 frames in which the arm's joints wander."""
    from lerobot.datasets import LeRobotDataset

    numbers = {"dtype": "float32", "shape": (len(JOINT_KEYS),), "names": JOINT_KEYS}
    image = {"dtype": "image", "shape": IMAGE_SHAPE, "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        f"local/{root.name}",
        ARM_FPS,
        {STATE_KEY: numbers, "action": numbers, "observation.images.front": image},
        root=root,
        use_videos=False,
    )
    rng = np.random.default_rng(0)
    steps_deg = rng.normal(0, 1, (31, len(JOINT_KEYS)))  # random walk; 31 positions, 30 frames
    positions = REST_POSITION + np.cumsum(steps_deg, axis=0).astype(np.float32)
    for current_position, next_position in itertools.pairwise(positions):
        frame = {
            STATE_KEY: current_position,
            "action": next_position,
            "observation.images.front": rng.integers(0, 256, IMAGE_SHAPE, np.uint8),
            "task": "go",
        }
        dataset.add_frame(frame)
    dataset.save_episode()
    dataset.finalize()


def register_made_up_arm() -> tuple[list[dict[str, Any]], list[float]]:
    """Make a stand-in for the arm known to LeRobot.

    Returns:
        A list of the commands that LeRobot sends to the stand-in, and a list of their times (s, on
        the monotonic clock). Both are filled while LeRobot drives the stand-in.
    """
    from lerobot.robots import Robot, RobotConfig

    commands: list[dict[str, Any]] = []
    times_s: list[float] = []

    @RobotConfig.register_subclass("made_up_arm")
    @dataclass
    class MadeUpArmConfig(RobotConfig):
        pass

    class MadeUpArm(Robot):
        """Reaches every command at once."""

        config_class = MadeUpArmConfig
        name = "made_up_arm"
        is_connected = True
        is_calibrated = True
        action_features = dict.fromkeys(JOINT_KEYS, float)
        observation_features = {**action_features, "front": IMAGE_SHAPE}  # noqa: RUF012

        def get_observation(self) -> dict[str, Any]:
            joints = dict(zip(JOINT_KEYS, REST_POSITION.tolist(), strict=True))
            if commands:
                joints = commands[-1]
            return {**joints, "front": np.zeros(IMAGE_SHAPE, np.uint8)}

        def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
            commands.append(action)
            times_s.append(time.monotonic())
            return action

        def do_nothing(self, *_: Any, **__: Any) -> None:
            pass

        connect = do_nothing
        calibrate = do_nothing
        configure = do_nothing
        disconnect = do_nothing

    # LeRobot imports a robot's class from the module of its config.
    module = type(sys)("made_up_arm")
    module.MadeUpArm = MadeUpArm  # type: ignore[attr-defined]
    sys.modules["made_up_arm"] = module
    MadeUpArmConfig.__module__ = "made_up_arm"
    MadeUpArm.__module__ = "made_up_arm"
    return commands, times_s


def roll_out(saved: Path) -> None:
    """Drive the stand-in for the arm with lerobot-rollout, in this process."""
    from lerobot.scripts import lerobot_rollout

    commands, times_s = register_made_up_arm()
    sys.argv = [
        "lerobot-rollout",
        f"--policy.path={saved}",
        "--policy.device=cpu",
        "--device=cpu",
        "--robot.type=made_up_arm",
        "--task=go",
        "--duration=3",
    ]
    lerobot_rollout.main()

    changes_deg = []
    for key, rest_deg in zip(JOINT_KEYS[:-1], REST_POSITION[:-1].tolist(), strict=True):
        changes_deg.append(abs(commands[0][key] - rest_deg))
    # The rate over 20 periods; the first period is left out.
    num_periods = 20
    commands_per_s = num_periods / (times_s[1 + num_periods] - times_s[1])
    print(
        f"lerobot-rollout: commands of {len(commands[0])} joints, the first {max(changes_deg):.2f}"
        " degrees from the start"
    )
    print(
        f"asked 30 times in a second, the policy sends {commands_per_s:.1f} commands, as "
        f"--policy.fps={ARM_FPS} says"
    )


def main(folder: Path) -> None:
    """Run all checks in a new folder."""
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    folder.mkdir(parents=True)
    versions = [f"{name} {version(name)}" for name in ("lerobot", "torch", "transformers")]
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}")

    # Record and export two episodes.
    recorded = str(folder / "recorded")
    data = folder / "my_robot"
    run("spear", "record", "--num-episodes", "2", "--tasks", "put_on", "--out", recorded)
    run("spear", "data", "export", recorded, "--out", str(data))

    # Train on them, compare, go on, and evaluate.
    saved = train(data, folder / "trained", 20)
    print("lerobot-train: 20 steps")
    compare_actions(saved, data)
    check_resumed_training(saved, 24)
    evaluate_nano(saved, folder / "eval")

    # An arm of joint angles.
    write_arm_urdf(folder / "arm.urdf")
    write_joint_dataset(folder / "joints")
    arm_policy = train(
        folder / "joints",
        folder / "arm",
        2,
        f"--policy.urdf={folder / 'arm.urdf'}",
        "--policy.tip=wrist_3_link",
        f"--policy.fps={ARM_FPS}",
        "--policy.cameras={front: external}",
    )
    roll_out(arm_policy)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
