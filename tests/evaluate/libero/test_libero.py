"""LIBERO's tasks: names, limits and protocols; the scripted expert; one episode of each kind.

Tests that need LIBERO's environment (`spear evaluate libero --setup`) are skipped where it is
missing.
"""

import contextlib
import dataclasses
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from refusals import refuses
from spear.errors import SpearError
from spear.evaluate.libero import environment, oracle
from spear.evaluate.libero.process import WORKER, Box, LiberoMoment, LiberoProcess, Region
from spear.evaluate.libero.record import (
    RecordingSettings,
    begin_at_resting_start,
    record_episode,
    scale_pictures_to_fit_views,
)
from spear.evaluate.libero.run import Libero, OracleAgent, summarize_suites
from spear.evaluate.libero.starts import MARGIN_M, measure_distance_from_nearest_official_state_m
from spear.evaluate.libero.suites import PROTOCOLS, get_max_steps, resolve_original_suite
from spear.evaluate.libero.worker import simplify_meshes
from spear.evaluate.options import LiberoOptions
from spear.evaluate.results import Outcome, Results
from spear.geometry import quat_exp, quat_rotate
from spear.types import Array
from spear.util.images import fit_image

DOWN = [1.0, 0.0, 0.0, 0.0]
"""Orientation of a gripper that points down, and of an object that is not turned."""


def make_moment(
    position: tuple[float, float, float],
    is_open: bool = True,
    gripped_objects: tuple[str, ...] = (),
) -> LiberoMoment:
    """A bowl at (0.5, 0), a plate at (0.6, 0.3), and a gripper at rest."""
    pose = np.array([*position, *DOWN])
    bowl = Box(
        pose=np.array([0.5, 0, 0, *DOWN]),
        low=np.array([-0.056, -0.056, 0]),
        high=np.full(3, 0.056),
    )
    plate = Box(
        pose=np.array([0.6, 0.3, 0, *DOWN]),
        low=np.array([-0.07, -0.07, 0]),
        high=np.array([0.07, 0.07, 0.02]),
    )
    return LiberoMoment(
        pose=pose,
        commanded=pose.copy(),
        opening=1.0 if is_open else 0.1,
        base=np.zeros(3),
        objects={"bowl_1": bowl, "plate_1": plate},
        regions={"far": Region(np.array([0.6, -0.3, 0, *DOWN]), np.full(3, 0.01))},
        joints={},
        gripped_objects=gripped_objects,
        is_commanded_open=is_open,
        speed=0.0,
        finger_speed=0.0,
        success=False,
        steps=0,
    )


def open_drawer_above_bowl(moment: LiberoMoment) -> LiberoMoment:
    """A cabinet whose top drawer stands out until above the bowl, 13 cm high."""
    turned = [0.0, 0.0, 0.0, 1.0]  # half a turn about the vertical: the drawer opens towards +y
    cabinet = Box(
        np.array([0.6, -0.26, 0, *turned]), np.array([-0.12, -0.11, 0]), np.array([0.12, 0.11, 0.2])
    )
    drawer = Region(np.array([0.6, -0.12, 0.17, *turned]), np.full(3, 0.05))
    return dataclasses.replace(
        moment,
        objects={**moment.objects, "cabinet_1": cabinet},
        regions={**moment.regions, "cabinet_1_top_region": drawer},
        joints={"cabinet_1_top_level": -0.14},
    )


def choose(moment: LiberoMoment) -> Array:
    """The oracle's action for the goal that the bowl is on the plate."""
    return oracle.choose_action([["on", "bowl_1", "plate_1"]], moment)


class TestSuites:
    def test_a_perturbed_suite_has_the_limit_of_its_original(self) -> None:
        openpi = PROTOCOLS["openpi"]

        assert get_max_steps("libero_goal_swap", openpi) == get_max_steps("libero_goal", openpi)

    def test_lerobot_gives_spatial_more_steps(self) -> None:
        assert get_max_steps("libero_spatial", PROTOCOLS["openpi"]) == 220
        assert get_max_steps("libero_spatial", PROTOCOLS["lerobot"]) == 280

    def test_an_unknown_suite_is_refused(self) -> None:
        refuses("libero_space", resolve_original_suite, "libero_space")

    def test_the_success_of_a_suite_is_the_mean_of_its_tasks(self) -> None:
        outcomes = []
        for family, successes in {"libero_goal-0": [True], "libero_goal-1": [False] * 3}.items():
            for seed, success in enumerate(successes):
                outcome = Outcome(
                    family,
                    seed,
                    instruction="open it",
                    success=success,
                    reached=False,
                    grasped=False,
                    wrong_object_moved=False,
                    unreachable=0,
                    steps=10,
                )
                outcomes.append(outcome)

        results = Results("a policy", settings={}, outcomes=outcomes, seconds=1.0)
        suites = summarize_suites(results)

        assert suites["libero_goal"].value == 0.5


def test_recorded_pictures_get_their_bars_in_training() -> None:
    picture = np.random.default_rng(0).integers(1, 256, (256, 256, 3), dtype=np.uint8)
    observation = {"observation/image": picture}
    settings = RecordingSettings(sizes={"external": (168, 126)})

    recorded = scale_pictures_to_fit_views(observation, settings)["external"]

    # A bar that were recorded would be changed by the color jitter of training.
    assert recorded.shape == (126, 126, 3)
    np.testing.assert_array_equal(fit_image(recorded, 126, 168), fit_image(picture, 126, 168))


def test_fast_rendering_removes_triangles_that_are_too_small_to_be_seen() -> None:
    """A square of two triangles, one of whose sides is divided at a point within a cell."""
    model = SimpleNamespace(
        nmesh=1,
        mesh_vertadr=np.array([0]),
        mesh_vertnum=np.array([5]),
        mesh_vert=np.array([[0, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0], [0, 0.1, 0], [0.1, 1e-4, 0]]),
        mesh_faceadr=np.array([0]),
        mesh_facenum=np.array([3]),
        mesh_face=np.array([[0, 1, 4], [0, 4, 2], [0, 2, 3]]),
        mesh_facenormal=np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]]),
        mesh_facetexcoord=np.array([[0, 1, 4], [0, 4, 2], [0, 2, 3]]),
    )

    simplify_meshes(model)

    assert model.mesh_facenum == [2]
    np.testing.assert_array_equal(model.mesh_face[:2], [[0, 1, 2], [0, 2, 3]])
    np.testing.assert_array_equal(model.mesh_facenormal[:2], [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(model.mesh_facetexcoord[:2], [[0, 4, 2], [0, 2, 3]])


def test_a_missing_environment_is_reported_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))

    refuses("spear evaluate libero --setup", environment.resolve_python)


class TestOracle:
    def test_it_takes_a_bowl_by_its_rim(self) -> None:
        grasps = oracle.list_equally_good_grasps("bowl_1", make_moment((0.5, 0, 0.3)))

        for grasp in grasps:
            from_middle = grasp.position[:2] - [0.5, 0]
            assert np.linalg.norm(from_middle) == pytest.approx(0.052)  # 4 mm inside the rim
            # The fingers close along the gripper's y axis, across the rim.
            closing = [-math.sin(grasp.yaw), math.cos(grasp.yaw)]
            assert abs(from_middle @ closing) == pytest.approx(0.052)

    def test_it_moves_to_the_bowl_first(self) -> None:
        action = choose(make_moment((0.3, -0.2, 0.2)))

        assert action[0] > 0
        assert action[1] > 0
        assert action[7] == 1  # open

    @pytest.mark.parametrize("y", [-0.1, -0.03, 0.03, 0.1])
    def test_it_grasps_the_same_side_wherever_the_hand_is(self, y: float) -> None:
        """A bowl stands at y = 0. Otherwise a policy learns to hover between both sides."""
        action = choose(make_moment((0.5, y, 0.2)))

        is_left_of_grasp = y > -0.052
        assert (action[1] < 0) == is_left_of_grasp

    def test_it_closes_where_it_grasps(self) -> None:
        grasp = oracle.choose_grasp("bowl_1", make_moment((0.5, 0, 0.3)))
        x, y, z = grasp.position
        moment = make_moment((x, y, z))
        facing_grasp = [math.cos(grasp.yaw / 2), 0, 0, math.sin(grasp.yaw / 2)]
        moment.pose[3:] = facing_grasp
        moment.commanded[3:] = facing_grasp

        assert choose(moment)[7] == 0

    @pytest.mark.parametrize(("speed", "rises"), [(0.0, True), (0.1, False)])
    def test_it_rises_when_a_finger_stands_on_something(self, speed: float, rises: bool) -> None:
        """The arm is 4 cm above the grasp, to which it is commanded, and has stopped or has not."""
        grasp = oracle.choose_grasp("bowl_1", make_moment((0.5, 0, 0.3)))
        facing_grasp = [math.cos(grasp.yaw / 2), 0, 0, math.sin(grasp.yaw / 2)]
        x, y, z = grasp.position
        moment = dataclasses.replace(
            make_moment((x, y, z + 0.04)),
            pose=np.array([x, y, z + 0.04, *facing_grasp]),
            commanded=np.array([x, y, z, *facing_grasp]),
            speed=speed,
        )

        action = choose(moment)

        assert (action[2] > 0) == rises
        assert action[7] == 1  # open

    def test_it_grasps_an_object_that_stands_on_a_corner(self) -> None:
        moment = make_moment((0.5, 0, 0.3))
        turn = math.acos(3**-0.5) * np.array([1, -1, 0]) / math.sqrt(2)  # all axes as steep
        milk = Box(
            np.array([0.5, 0, 0, *quat_exp(torch.from_numpy(turn)).numpy()]),
            np.full(3, -0.03),
            np.full(3, 0.03),
        )
        tipping = dataclasses.replace(moment, objects={**moment.objects, "milk_1": milk})

        assert oracle.list_equally_good_grasps("milk_1", tipping)

    def test_it_lifts_what_it_holds(self) -> None:
        action = choose(make_moment((0.5, 0.05, 0.04), is_open=False, gripped_objects=("bowl_1",)))

        assert action[2] > 0
        assert action[7] == 0

    def test_it_opens_when_it_has_closed_on_nothing(self) -> None:
        assert choose(make_moment((0.5, 0.05, 0.04), is_open=False))[7] == 1

    def test_it_leans_away_from_an_open_drawer_above_a_bowl(self) -> None:
        moment = open_drawer_above_bowl(make_moment((0.3, -0.2, 0.2)))

        (grasp,) = oracle.list_equally_good_grasps("bowl_1", moment)

        # The drawer comes from -y, so the hand takes the rim at +y and leans farther there.
        hand_axis = quat_rotate(quat_exp(torch.from_numpy(grasp.lean)), oracle.VERTICAL).numpy()
        assert grasp.position[1] > 0.03
        assert hand_axis[1] > 0.3

    def test_it_moves_a_bowl_out_from_under_a_drawer_before_it_lifts_it(self) -> None:
        moment = make_moment((0.5, 0.05, 0.04), is_open=False, gripped_objects=("bowl_1",))

        action = oracle.choose_action(
            [["in", "bowl_1", "cabinet_1_top_region"]], open_drawer_above_bowl(moment)
        )

        assert action[1] > 0.03  # out, away from the drawer
        assert action[2] < 0.025  # and less far up

    def test_it_puts_a_bottle_on_the_slope_of_a_rack(self) -> None:
        """The z axis of the rack's region points up the slope, 60° from the vertical."""
        tilted = np.array([math.cos(math.pi / 6), math.sin(math.pi / 6), 0, 0])
        moment = make_moment((0.3, -0.2, 0.2))
        rack = Region(np.array([0.5, -0.3, 0.2, *tilted]), np.full(3, 0.02))
        moment = dataclasses.replace(moment, regions={"rack": rack})

        place = oracle.compute_rest_position(moment.objects["bowl_1"], "rack", moment)

        assert place[0] == pytest.approx(0.5)
        assert place[1] == pytest.approx(-0.3 - oracle.SLOPE_DISTANCE_M * math.sin(math.pi / 3))
        assert place[2] == pytest.approx(0.2 + oracle.SLOPE_DISTANCE_M * math.cos(math.pi / 3))

    def test_no_step_is_longer_than_the_longest(self) -> None:
        action = choose(make_moment((0.0, -0.5, 0.5)))

        assert np.linalg.norm(action[:3]) <= oracle.MAX_STEP_M + 1e-6

    def test_an_action_leads_from_the_measured_to_the_commanded_pose(self) -> None:
        """The commanded pose moves on from where it is, while the arm lags behind."""
        moment = make_moment(position=(0.3, 0, 0.3))
        lag = np.array([0.01, 0.02, 0.0])
        commanded_pose = np.concatenate([moment.pose[:3] + lag, moment.pose[3:]])

        action = choose(moment)
        action_with_lag = choose(dataclasses.replace(moment, commanded=commanded_pose))

        commanded_step = moment.pose[:3] + action_with_lag[:3] - commanded_pose[:3]
        assert np.linalg.norm(commanded_step) <= oracle.MAX_STEP_M + 1e-6
        assert np.linalg.norm(action_with_lag[:3]) > np.linalg.norm(action[:3])


def has_libero() -> bool:
    try:
        environment.resolve_python()
    except SpearError:
        return False
    return True


needs_libero = pytest.mark.skipif(
    not has_libero(), reason="LIBERO's environment is missing: spear evaluate libero --setup"
)


@pytest.fixture(scope="module")
def process() -> Iterator[LiberoProcess]:
    """The first task of LIBERO-Object."""
    seed = PROTOCOLS["openpi"].seed
    process = LiberoProcess("libero_object", task_index=0, seed=seed, fast_rendering=True)
    with contextlib.closing(process):
        yield process


@needs_libero
@pytest.mark.slow
class TestLibero:
    def test_a_reset_gives_the_same_again(self, process: LiberoProcess) -> None:
        first_moment = process.reset(3)
        process.run(np.array([[0.03, 0, 0, 0, 0, 0, 1.0]] * 3), max_episode_steps=100)

        second_moment = process.reset(3)

        np.testing.assert_array_equal(second_moment.pose, first_moment.pose)
        for name, box in first_moment.objects.items():
            np.testing.assert_array_equal(second_moment.objects[name].pose, box.pose)

    def test_the_commanded_pose_is_the_measured_one_moved_by_the_row(
        self, process: LiberoProcess
    ) -> None:
        row = np.array([0.03, 0, 0, 0, 0, 0, -1.0])
        process.reset(3)
        first_moment = process.run(row[None], max_episode_steps=100)

        second_moment = process.run(row[None], max_episode_steps=100)

        expected_position = first_moment.pose[:3] + row[:3]
        np.testing.assert_allclose(second_moment.commanded[:3], expected_position, atol=1e-9)

    def test_a_step_gives_the_same_as_that_of_libero(self) -> None:
        script = Path(__file__).with_name("compare_steps.py")
        environment_variables = {
            **os.environ,
            "LIBERO_CONFIG_PATH": str(environment.resolve_folder() / "config"),
        }
        environment_variables.pop("PYTHONPATH", None)  # packages of another Python

        result = subprocess.run(
            [str(environment.resolve_python()), str(script), str(WORKER)],
            env=environment_variables,
            capture_output=True,
            text=True,
            check=True,
        )

        assert float(result.stdout) == 0.0

    def test_the_number_of_resets_fixes_where_furniture_stands(self) -> None:
        with contextlib.closing(
            LiberoProcess("libero_goal", 1, PROTOCOLS["openpi"].seed, fast_rendering=True)
        ) as process:
            second = process.reset(1, num_resets_since_seeding=2).objects["wooden_cabinet_1"]
            first = process.reset(0, num_resets_since_seeding=1).objects["wooden_cabinet_1"]
            second_again = process.reset(1, num_resets_since_seeding=2).objects["wooden_cabinet_1"]

        np.testing.assert_array_equal(second_again.pose, second.pose)
        assert np.linalg.norm(first.pose[:3] - second.pose[:3]) > 1e-4

    def test_the_robot_reads_the_pose_that_the_simulator_has(self, process: LiberoProcess) -> None:
        from spear.embodiments import load

        moment = process.reset(0)
        observation = moment.make_observation(process.instruction, process.render())

        state = load("libero").read(observation)["observation/state"]

        np.testing.assert_allclose(state[:7], moment.pose, atol=1e-5)
        assert state[7] == pytest.approx(moment.opening, abs=1e-5)

    def test_official_positions_are_those_that_a_reset_sets(self, process: LiberoProcess) -> None:
        official = process.list_official_object_positions()

        moment = process.reset(3)

        assert len(official) > 3
        for name, positions in official.items():
            assert positions.shape == (process.num_states, 3)
            settled = moment.objects[name].pose[:3] + moment.base
            np.testing.assert_allclose(settled[:2], positions[3, :2], atol=0.01)

    def test_a_demonstration_begins_where_no_official_state_is(
        self, process: LiberoProcess
    ) -> None:
        moment = begin_at_resting_start(process, 10_000)

        official = process.list_official_object_positions()
        names = sorted(official)
        places = np.stack([moment.objects[name].pose[:2] + moment.base[:2] for name in names])
        all_official = np.stack([official[name][:, :2] for name in names], axis=1)
        distance_m = measure_distance_from_nearest_official_state_m(all_official, places)
        assert distance_m > 0.8 * MARGIN_M  # less what settling moves

    def test_a_demonstration_is_an_episode_to_train_on(self, process: LiberoProcess) -> None:
        settings = RecordingSettings(sizes={"external": (192, 128), "wrist": (96, 96)})

        episode = record_episode(process, "libero_object", index=0, seed=10_001, settings=settings)

        assert episode.instruction == process.instruction
        assert episode.source == "libero/libero_object-0/10001"
        assert len(episode.images["external"]) == len(episode.images["wrist"]) == len(episode)
        assert episode.action is not None
        assert np.isfinite(episode.action).all()

    def test_a_reworded_suite_has_instructions_of_its_own(self, process: LiberoProcess) -> None:
        seed = PROTOCOLS["openpi"].seed

        with contextlib.closing(
            LiberoProcess("libero_object_lan", task_index=0, seed=seed, fast_rendering=True)
        ) as reworded:
            assert reworded.instruction == "grab alphabet soup and put it into basket"
        assert process.instruction == "pick up the alphabet soup and place it in the basket"

    def test_an_unknown_task_is_an_error_that_names_it(self) -> None:
        refuses(
            "no task with number 99",
            LiberoProcess,
            "libero_object",
            task_index=99,
            seed=7,
            fast_rendering=True,
        )

    def test_the_oracle_fulfills_a_task(self) -> None:
        options = LiberoOptions(batch_size=1, fast_rendering=True)

        with contextlib.closing(Libero(options)) as simulator:
            [(outcome, _, _)] = simulator.run_episodes(
                OracleAgent(), "libero_object-0", [0], filming=False
            )

        assert outcome.success
        assert outcome.reached
        assert outcome.grasped
