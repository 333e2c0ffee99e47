"""The bench of planted faults: a fault changes what it says, and nothing else."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from serve_here import HomingPolicy
from spear.data.store.episode_store import EpisodeStore
from spear.geometry import UNIT_NORM_TOLERANCE
from spear.sim.render import Renderer
from spear.sim.scene import SceneSpec, sample_scene
from spear.types import Episode

RNG = np.random.default_rng(0)
# Position or translation (m), quaternion (w x y z), gripper. No two axes are alike, and the gripper
# is neither quite open nor quite closed, so that a fault changes some number.
STATE = np.array([0.5, 0.1, 0.2, np.sqrt(0.5), 0.0, 0.5, 0.5, 0.9], np.float32)
ACTION = np.array([0.01, 0.02, -0.03, 0.99, 0.08, 0.06, 0.02, 0.2], np.float32)
ACTION[3:7] /= np.linalg.norm(ACTION[3:7])
IMAGE_KEYS = {"external": "observation/image", "wrist": "observation/wrist_image"}
PICTURE_FAULTS = ("camera", "padding")
ROTATION_FAULTS = ("angle-unit", "quaternion-order", "euler-order")
GRIPPER_FAULTS = ("gripper-inverted", "gripper-scale", "gripper-late")
TRANSLATION_FAULTS = ("action-frame", "translation-unit")
SCENE_FAULTS = {
    "unseen-instruction": {"instruction"},
    "start-outside": {"ee_position", "ee_rotation"},
    "object-not-in-view": {"objects"},
}
"""Fault of the scene → the fields that it may change."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module benchmarks/diagnose/cases.py; the other modules are found afterwards, too."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks/diagnose")
    return importlib.import_module("cases")


def make_observation() -> dict[str, Any]:
    return {
        "observation/image": RNG.integers(1, 255, (128, 192, 3), np.uint8),
        "observation/wrist_image": RNG.integers(1, 255, (96, 96, 3), np.uint8),
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
    }


def find_changes(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """The keys whose values differ."""
    return {key for key in old if not np.array_equal(old[key], new.get(key))}


def list_plants(bench: ModuleType, *prefixes: str) -> list[Any]:
    """List the faults whose names begin with one of these prefixes, at all of their strengths."""
    return [plant for plant in bench.list_plantings() if plant.fault.startswith(prefixes)]


def test_there_are_thirty_kinds_of_faults_that_can_be_made(bench: ModuleType) -> None:
    plants = bench.list_plantings()

    for plant in plants:
        plant.make()
    assert len({plant.fault for plant in plants}) >= 30


def test_faults_of_pictures_change_only_the_pictures_of_their_cameras(bench: ModuleType) -> None:
    for plant in list_plants(bench, *PICTURE_FAULTS):
        fault = plant.make()
        camera = plant.settings.get("camera", "both")
        expected = {IMAGE_KEYS[view] for view in IMAGE_KEYS if camera in (view, "both")}

        changes = set()
        for _ in range(12):  # some faults show only after some observations
            observation = make_observation()
            changes |= find_changes(observation, fault.change_observation(observation))

        assert changes == expected, plant
        assert np.array_equal(fault.change_action(ACTION, STATE), ACTION)


def test_wide_pictures_come_back_to_the_usual_size(bench: ModuleType) -> None:
    for plant in list_plants(bench, "camera-stretched", "padding-bars"):
        fault = plant.make()
        camera = plant.settings["camera"]
        changed_sizes = fault.change_image_sizes({"external": (192, 128), "wrist": (96, 96)})
        width, height = changed_sizes[camera]
        key = IMAGE_KEYS[camera]
        usual = make_observation()

        wide = {**usual, key: RNG.integers(1, 255, (height, width, 3), np.uint8)}

        assert fault.change_observation(wide)[key].shape == usual[key].shape


def test_faults_of_commands_change_one_part_of_the_action(bench: ModuleType) -> None:
    numbers_of_faults = {
        TRANSLATION_FAULTS: slice(0, 3),
        ROTATION_FAULTS: slice(3, 7),
        GRIPPER_FAULTS: slice(7, 8),
    }
    for faults, numbers in numbers_of_faults.items():
        for plant in list_plants(bench, *faults):
            fault = plant.make()
            is_state_fault = plant.settings.get("quantity") == "state"

            first_action = fault.change_action(ACTION, STATE)
            opposite_action = np.append(ACTION[:7], np.float32(1 - ACTION[7]))
            second_action = fault.change_action(opposite_action, STATE)

            other_numbers = np.delete(np.arange(8), numbers)
            assert np.allclose(first_action[other_numbers], ACTION[other_numbers]), plant
            is_same = np.allclose(first_action, ACTION)
            is_later_same = np.allclose(second_action, opposite_action)
            assert (is_same and is_later_same) == is_state_fault, plant


def test_commands_stay_unit_quaternions(bench: ModuleType) -> None:
    for plant in bench.list_plantings():
        action = plant.make().change_action(ACTION, STATE)

        assert abs(np.linalg.norm(action[3:7]) - 1) < UNIT_NORM_TOLERANCE, plant


def test_faults_of_states_change_only_the_state(bench: ModuleType) -> None:
    plants = [p for p in bench.list_plantings() if p.settings.get("quantity") == "state"]
    assert plants
    for plant in plants:
        observation = make_observation()

        changed = plant.make().change_observation(observation)

        assert find_changes(observation, changed) == {"observation/state"}, plant


def test_faults_of_scenes_change_only_their_part(bench: ModuleType) -> None:
    scene = sample_scene("put_on", 8301)
    for fault, fields in SCENE_FAULTS.items():
        for plant in list_plants(bench, fault):
            changed: SceneSpec = plant.make().change_scene(scene)

            differing = {
                name for name, value in vars(scene).items() if getattr(changed, name) != value
            }
            assert differing, plant
            assert differing <= fields, plant


def test_no_scene_is_used_twice(bench: ModuleType) -> None:
    cases = bench.list_cases(
        bench.Plan(clean_runs=range(300), repetitions=range(2), pairs=range(40))
    )

    scenes = [scene for case in cases for scene in case.scenes]

    assert len(set(scenes)) == len(scenes)
    assert all(7000 <= seed < 9000 for _, seed in scenes)


def test_a_run_keeps_its_scenes_in_smaller_benches(bench: ModuleType) -> None:
    large_plan = bench.Plan(clean_runs=range(40), repetitions=range(2), pairs=range(20))
    small_plan = bench.Plan(
        clean_runs=range(30, 40),
        repetitions=range(1, 2),
        pairs=range(15, 20),
        has_all_strengths=False,
    )
    large = {case.name: case for case in bench.list_cases(large_plan)}
    small = bench.list_cases(small_plan)

    assert all(large[case.name] == case for case in small)


def test_a_plan_of_one_strength_has_each_fault_once(bench: ModuleType) -> None:
    plan = bench.Plan(
        clean_runs=range(0), repetitions=range(1, 2), pairs=range(0), has_all_strengths=False
    )

    faults = [case.faults[0] for case in bench.list_cases(plan)]

    assert len(set(faults)) == len(faults) == len(bench.STRENGTHS)


def test_a_rollout_is_recorded_with_the_faults_in_it(
    bench: ModuleType, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording shows the actions that the policy sent, and the motion that the arm made."""
    robot = importlib.import_module("robot")
    monkeypatch.setattr(robot, "MAX_ACTIONS", 5)
    plants = [
        None,
        bench.Planting("action-sign", strength=0),
        bench.Planting("control-rate", strength=0),
    ]
    recordings = []
    for index, plant in enumerate(plants):
        faults = [] if plant is None else [plant.make()]
        scene = sample_scene("put_on", 8302)
        only_robot = robot.Robot(
            scene, faults, robot.ClientHabits(), client=index, start_s=1e9, seed=1
        )
        recordings.append(robot.Recording(tmp_path / str(index), [only_robot]))

    robot.record(HomingPolicy(), recordings, "test")

    clean, inverted, fast = (EpisodeStore(recording.folder) for recording in recordings)
    # Motion along x in the first step
    clean_motion = clean[0].position[1, 0] - clean[0].position[0, 0]
    inverted_motion = inverted[0].position[1, 0] - inverted[0].position[0, 0]
    assert np.sign(inverted_motion) == -np.sign(clean_motion)
    clean_interval_s = np.diff(clean.served_steps(0).arrival_s).mean()
    fast_interval_s = np.diff(fast.served_steps(0).arrival_s).mean()
    assert fast_interval_s < 0.7 * clean_interval_s


def test_states_of_a_recorded_episode_follow_the_faulty_commands(bench: ModuleType) -> None:
    """With 0.4 of each motion, a recorded arm gets 0.4 as far; without a fault nothing changes."""
    bridge = importlib.import_module("bridge")
    actions = np.tile(np.array([0.02, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (6, 1))
    states = np.tile(np.array([0.3, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (6, 1))
    states[:, 0] += 0.02 * np.arange(6)

    shortened = bench.Planting("controller-short", 2).make()  # 0.4 of the way
    moved = bridge.move_states(states, actions, shortened)
    unmoved = bridge.move_states(states, actions, importlib.import_module("planted").PlantedFault())

    assert np.allclose(unmoved, states, atol=1e-6)
    full_distance_m = 5 * 0.02
    assert moved[-1, 0] - moved[0, 0] == pytest.approx(0.4 * full_distance_m, abs=1e-6)


def test_a_recorded_arm_that_tracks_badly_keeps_its_states_without_a_fault(
    bench: ModuleType,
) -> None:
    """The real arm turned less and elsewhere than commanded, and its gripper stopped half-way."""
    bridge = importlib.import_module("bridge")
    actions = np.tile(ACTION, (6, 1))
    states = np.tile(STATE, (6, 1))
    states[:, :3] += RNG.normal(0, 0.01, (6, 3)).astype(np.float32)
    states[:, 3:7] += RNG.normal(0, 0.1, (6, 4)).astype(np.float32)
    states[:, 3:7] /= np.linalg.norm(states[:, 3:7], axis=1, keepdims=True)
    states[:, 7] = np.linspace(1, 0.4, 6)

    moved = bridge.move_states(states, actions, importlib.import_module("planted").PlantedFault())

    assert np.allclose(moved, states, atol=1e-5)


def test_a_recorded_gripper_follows_commands_in_another_unit(bench: ModuleType) -> None:
    """A command to open, read as one of 8 %, leaves the gripper nearly closed."""
    bridge = importlib.import_module("bridge")
    actions = np.tile(np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (3, 1))
    states = np.tile(np.array([0.3, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (3, 1))

    scaled = bench.Planting("gripper-scale", 0).make()  # 0.08 of the command
    moved = bridge.move_states(states, actions, scaled)

    assert np.allclose(moved[1:, 7], 0.08, atol=1e-6)


def test_runs_of_recorded_episodes_plant_each_kind_and_no_fault_of_a_camera_that_is_not_there(
    bench: ModuleType,
) -> None:
    bridge = importlib.import_module("bridge")

    runs = bridge.list_bridge_cases(num_episodes=6, repetitions=range(1))

    plants = [plant for case, _ in runs for plant in case.plants]
    clean_choices = [numbers for case, numbers in runs if case.kind == "clean"]
    assert {plant.fault for plant in plants} == set(bridge.FAULTS)
    assert all(plant.settings.get("camera") != "wrist" for plant in plants)
    assert len(set(clean_choices)) == len(clean_choices) == 15


def test_another_run_of_the_same_strength_has_other_recorded_episodes(bench: ModuleType) -> None:
    bridge = importlib.import_module("bridge")

    runs = bridge.list_bridge_cases(num_episodes=6, repetitions=range(3))

    choices = [numbers for case, numbers in runs if case.faults == ["camera-missing"]]
    assert len(set(choices)) == 3


def test_a_lagging_arm_leaves_its_recorded_way_over_several_steps(bench: ModuleType) -> None:
    """It follows 0.6 of a command in its step, and keeps 0.25 of its last motion.

    The recorded arm stands still, although each action commands a motion. With the opposite sign,
    an action differs from the recorded one by -2 times the command, and the arm moves accordingly.
    """
    bridge = importlib.import_module("bridge")
    command_m = 0.02
    actions = np.tile(np.array([command_m, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (20, 1))
    states = np.tile(np.array([0.3, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (20, 1))
    inverted = bench.Planting("action-sign", 0).make()

    moved = bridge.move_states(states, actions, inverted, bridge.ArmResponse(0.6, 0.25))

    motions_m = np.diff(moved[:, 0])
    assert motions_m[0] == pytest.approx(-2 * command_m * 0.6, abs=1e-6)
    assert motions_m[1] == pytest.approx(-2 * command_m * 0.6 * 1.25, abs=1e-6)
    # In the end 1 + 0.25 + 0.25² + … = 1 / 0.75
    assert motions_m[-1] == pytest.approx(-2 * command_m * 0.6 / 0.75, abs=1e-6)


def test_the_response_of_a_lagging_arm_is_fitted_to_its_motions(bench: ModuleType) -> None:
    simpler = importlib.import_module("simpler")
    rng = np.random.default_rng(0)
    actions = np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (30, 1))
    actions[:, :3] = rng.normal(0, 0.02, (30, 3))
    positions_m = [np.zeros(3)]
    motion_m = np.zeros(3)
    for action in actions[:-1]:
        motion_m = 0.6 * action[:3] + 0.3 * motion_m
        positions_m.append(positions_m[-1] + motion_m)
    episode = Episode(
        images={},
        position=np.array(positions_m),
        rotation=np.tile([1.0, 0.0, 0.0, 0.0], (30, 1)),
        gripper=np.ones(30),
        instruction="put the carrot on the plate",
        rate_hz=5.0,
        source="test",
        action=actions,
    )

    response = simpler.fit_response([episode])

    assert response.share == pytest.approx(0.6, abs=1e-5)
    assert response.carry == pytest.approx(0.3, abs=1e-5)


def test_runs_of_simpler_have_two_episodes_of_each_task(bench: ModuleType) -> None:
    simpler = importlib.import_module("simpler")

    runs = simpler.list_simpler_cases([3, 4])

    clean_choices = [choice for case, choice in runs if case.kind == "clean"]
    assert len(set(clean_choices)) == len(clean_choices) == 3 * 6
    for _, (first_task, second_task) in runs:
        assert len(set(first_task)) == 2
        assert len(set(second_task)) == 2
    assert len({fault for case, _ in runs for fault in case.faults}) >= 20


def test_an_unseen_instruction_can_be_planted_in_a_recorded_episode(bench: ModuleType) -> None:
    simpler = importlib.import_module("simpler")
    plants = [p for p in simpler.list_simpler_plantings() if p.fault == "unseen-instruction"]
    assert plants
    for plant in plants:
        observation = make_observation()

        changed = plant.make().change_observation(observation)

        assert find_changes(observation, changed) == {"prompt"}
