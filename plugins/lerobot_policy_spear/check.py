"""LeRobot's own commands on SPEAR-1, and what they give against spear's own: `python check.py FOLDER`.

In an environment with lerobot, spear and this plugin. Records two episodes of the simulator, trains 20 steps,
compares actions bit for bit, evaluates nano in closed loop; then an arm of joint angles, made up here,
through LeRobot's kinematics: trained on, and driven by lerobot-rollout.
"""

from __future__ import annotations

import dataclasses
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
from lerobot_policy_spear.robots import columns

from spear.errors import SpearError
from spear.train.optimize import learning_rate
from spear.train.recipes import get_recipe

MOTORS = ["base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3"]
KEYS = [f"{name}.pos" for name in (*MOTORS, "gripper")]
AXES = ["0 0 1", "0 1 0", "0 1 0", "1 0 0", "0 1 0", "1 0 0"]
STILL = np.array([0, -30, 60, 0, 30, 0, 50], np.float32)


def run(*command: str) -> str:
    """A command of this environment; what it prints. Ends the check when it fails."""
    path = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(path, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def train(data: Path, out: Path, steps: int, *options: str) -> Path:
    """The folder of the trained policy."""
    often = f"--save_freq={steps} --num_workers=0 --env_eval_freq=0 --batch_size=8 --steps={steps}".split()
    where = [
        f"--dataset.repo_id=local/{data.name}",
        f"--dataset.root={data}",
        f"--output_dir={out}",
    ]
    policy = ["--policy.type=spear1", "--policy.device=cpu", "--policy.push_to_hub=false", *options]
    run("lerobot-train", *policy, *where, *often)
    return (out / "checkpoints" / "last" / "pretrained_model").resolve()


def resume(saved: Path, steps: int) -> None:
    """Training goes on; its learning rate falls until the last step, also where these are more than the
    recipe's 600."""
    from lerobot.configs import PreTrainedConfig
    from torch import optim, zeros

    run(
        "lerobot-train",
        f"--config_path={saved / 'train_config.json'}",
        "--resume=true",
        f"--steps={steps}",
    )
    state = saved.parents[1] / "last" / "training_state" / "scheduler_state.json"
    step, (rate, *_) = (json.loads(state.read_text())[key] for key in ("last_epoch", "_last_lr"))
    opt = get_recipe("nano-post").optimization
    assert step == steps and np.isclose(rate, opt.final_lr * opt.lr), (step, rate)
    preset = PreTrainedConfig.from_pretrained(saved).get_scheduler_preset()
    factor = preset.build(optim.SGD([zeros(1)], lr=1.0), 4000).lr_lambdas[0]
    longer = dataclasses.replace(opt, steps=4000)
    assert [factor(at) for at in (0, 600, 3999)] == [
        learning_rate(at, longer) for at in (0, 600, 3999)
    ]


def refuse(words: str, call: Callable[..., Any], *given: Any) -> None:
    """This call must be refused in these words."""
    try:
        call(*given)
    except SpearError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def ends(policy: Any, before: Any, frame: dict[str, Any], folder: Path) -> None:
    """Without a wrist camera it acts; without an external one, the state's numbers or a task it is refused,
    as adapters are, and a dataset without its data. Gathered weights are saved as others are."""
    front, wrist = (f"observation.images.{name}" for name in ("external", "wrist"))
    policy.reset()
    without = {key: value for key, value in frame.items() if key != wrist}
    assert policy.select_action(before(without)).isfinite().all()
    refuse(
        front, policy.select_action, before({key: v for key, v in frame.items() if key != front})
    )
    state = "observation.state"
    refuse(state, policy.select_action, before({**frame, state: frame[state][:6]}))
    refuse("--task", policy.select_action, before({**frame, "task": ""}))
    refuse("--peft", policy.wrap_with_peft)
    refuse("streaming", columns, folder, "index")
    gathered = {key: weight * 2 for key, weight in policy.state_dict().items()}
    policy.save_pretrained(folder / "gathered", state_dict=gathered)
    again = type(policy).from_pretrained(folder / "gathered", config=policy.config)
    assert all((weight == gathered[key]).all() for key, weight in again.state_dict().items())


def compare(saved: Path, data: Path) -> None:
    """`select_action` of the loaded policy on LeRobot's frames, against spear's `infer` on its own. Saves
    nano for LeRobot, beside."""
    import pyarrow.parquet as pq
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from spear.policy import Spear1Policy
    from spear.util.images import decode_image

    config = PreTrainedConfig.from_pretrained(saved)
    theirs = get_policy_class("spear1").from_pretrained(saved, config=config)
    before, after = make_pre_post_processors(config, str(saved))
    ours, worst = Spear1Policy.load(saved / "spear"), 0.0
    assert ours.training_distribution, "no seen.json"
    print(
        f"seen.json: cameras {', '.join(ours.training_distribution.red_minus_blue)}; "
        f"episodes begin at {ours.training_distribution.mean_initial_opening:g}"
    )
    rows = pq.read_table(data / "data/chunk-000/file-000.parquet").to_pylist()
    frames = LeRobotDataset(f"local/{data.name}", root=data)
    places = range(0, len(rows), 4)
    for i in places:
        image, wrist = (
            rows[i][f"observation.images.{name}"]["bytes"] for name in ("external", "wrist")
        )
        seen = {
            "observation/image": decode_image(image),
            "observation/wrist_image": decode_image(wrist),
        }
        state, words = np.float32(rows[i]["observation.state"]), frames[i]["task"]
        own = ours.infer({**seen, "observation/state": state, "prompt": words})["actions"][0]
        sent = {k: v for k, v in frames[i].items() if k.startswith("observation.") or k == "task"}
        other = after(theirs.select_action(before(sent)))[0].numpy()
        worst = max(worst, float(np.abs(own - other).max()))
    ends(theirs, before, sent, saved.parent)
    equal = "equal bit for bit" if worst == 0 else f"up to {worst:g} apart"
    print(f"select_action and spear's infer, {len(places)} frames: {equal}")
    config.pretrained_path = None  # nano itself, with its own units
    for part in (get_policy_class("spear1")(config), before, after):
        part.save_pretrained(saved.parent / "nano")
    for start, same in ((saved, True), (saved.parent / "nano", False)):
        goes_on = get_policy_class("spear1").from_pretrained(
            start, config=config, dataset_meta=frames.meta
        )
        assert (
            goes_on.spear.normalizer == ours.normalizer
            and bool(goes_on.spear.training_distribution) is same
        ), start
    print("trained on from either, it has the dataset's statistics")


def made_up_arm(folder: Path) -> None:
    """`arm.urdf`, and `joints`: a dataset of its joint angles at 10 Hz."""
    from lerobot.datasets import LeRobotDataset

    mass = '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'
    parts = [f'<robot name="arm"><link name="root">{mass}</link>']
    for i, (name, axis) in enumerate(zip(MOTORS, AXES, strict=True)):
        ends = f'<parent link="{MOTORS[i - 1] + "_link" if i else "root"}"/><child link="{name}_link"/>'
        limits = '<limit lower="-3" upper="3" effort="9" velocity="9"/>'
        place = f'<origin xyz="{0.2 if i > 1 else 0} 0 {0.1 if i < 2 else 0}"/><axis xyz="{axis}"/>'
        parts.append(f'<joint name="{name}" type="revolute">{ends}{place}{limits}</joint>')
        parts.append(f'<link name="{name}_link">{mass}</link>')
    (folder / "arm.urdf").write_text("".join([*parts, "</robot>"]))
    numbers = {"dtype": "float32", "shape": (7,), "names": KEYS}
    image = {"dtype": "image", "shape": (60, 80, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": numbers, "action": numbers, "observation.images.front": image}
    data = LeRobotDataset.create(
        "local/joints", 10, features, root=folder / "joints", use_videos=False
    )
    rng = np.random.default_rng(0)
    way = STILL + np.cumsum(rng.normal(0, 1, (31, 7)), axis=0).astype(np.float32)
    for now, then in itertools.pairwise(way):
        shown = rng.integers(0, 256, (60, 80, 3), np.uint8)
        data.add_frame(
            {
                "observation.state": now,
                "action": then,
                "observation.images.front": shown,
                "task": "go",
            }
        )
    data.save_episode()
    data.finalize()


def rollout(saved: Path) -> None:
    """lerobot-rollout on a stand-in for the arm, in this process."""
    from lerobot.robots import Robot, RobotConfig
    from lerobot.scripts import lerobot_rollout

    told: list[dict[str, Any]] = []
    times: list[float] = []

    @RobotConfig.register_subclass("made_up_arm")
    @dataclass
    class MadeUpArmConfig(RobotConfig):
        pass

    class MadeUpArm(Robot):
        config_class, name, is_connected, is_calibrated = MadeUpArmConfig, "made_up_arm", True, True
        action_features = dict.fromkeys(KEYS, float)
        observation_features = {**action_features, "front": (60, 80, 3)}  # noqa: RUF012

        def get_observation(self) -> dict[str, Any]:
            now = told[-1] if told else dict(zip(KEYS, STILL.tolist(), strict=True))
            return {**now, "front": np.zeros((60, 80, 3), np.uint8)}

        def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
            told.append(action)
            times.append(time.monotonic())
            return action

        connect = calibrate = configure = disconnect = lambda self, *_, **__: None

    MadeUpArmConfig.__module__ = MadeUpArm.__module__ = "made_up_arm"
    sys.modules["made_up_arm"] = type(sys)("made_up_arm")
    sys.modules["made_up_arm"].MadeUpArm = MadeUpArm  # type: ignore[attr-defined]
    policy = [f"--policy.path={saved}", "--policy.device=cpu", "--device=cpu"]
    sys.argv = ["lerobot-rollout", *policy, "--robot.type=made_up_arm", "--task=go", "--duration=3"]
    lerobot_rollout.main()
    moved = max(
        abs(told[0][key] - start) for key, start in zip(KEYS[:-1], STILL.tolist(), strict=False)
    )
    print(
        f"lerobot-rollout: commands of {len(told[0])} joints, the first {moved:.2f} degrees from the start"
    )
    print(
        f"without --fps (30 then) it gets {20 / (times[21] - times[1]):.1f} in a second, made for 10"
    )


def main(folder: Path) -> None:
    """All of it, in a new folder."""
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    folder.mkdir(parents=True)
    packages = ("lerobot", "torch", "transformers")
    print(f"Python {sys.version.split()[0]}, " + ", ".join(f"{p} {version(p)}" for p in packages))
    run(
        "spear",
        "record",
        "--episodes",
        "2",
        "--families",
        "put_on",
        "--out",
        str(folder / "recorded"),
    )
    run("spear", "data", "export", str(folder / "recorded"), "--out", str(folder / "my_robot"))
    saved = train(folder / "my_robot", folder / "trained", 20)
    print("lerobot-train: 20 steps")
    compare(saved, folder / "my_robot")
    resume(saved, 24)
    env = ["--env.type=spear", "--env.task=put_on", "--eval.n_episodes=8", "--eval.batch_size=4"]
    run(
        "lerobot-eval",
        f"--policy.path={saved.parent / 'nano'}",
        *env,
        f"--output_dir={folder / 'eval'}",
    )
    result = json.loads((folder / "eval" / "eval_info.json").read_text())["overall"]
    print(
        f"lerobot-eval, nano on put_on: {result['pc_success']:g} % of {result['n_episodes']} episodes"
    )
    made_up_arm(folder)
    options = [
        f"--policy.urdf={folder / 'arm.urdf'}",
        "--policy.tip=wrist_3_link",
        "--policy.fps=10",
    ]
    rollout(
        train(folder / "joints", folder / "arm", 2, *options, "--policy.cameras={front: external}")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
