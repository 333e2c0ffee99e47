"""One LIBERO task in a process of LIBERO's own Python environment.

This file runs where `spear` is not installed: it imports NumPy, robosuite and LIBERO only. The
process that starts it (`spear.evaluate.libero.process`) sends requests over a socket, each a pair
(method name, arguments), and gets (True, result) or (False, error text) back.

Conventions of this file, which are those of the whole package: meters, radians, quaternions with
the scalar first. A pose is [7], position and quaternion, in the frame of the robot's base. The
end-effector frame is at robosuite's grip site, and parallel to the base frame when the gripper
points down.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np

Array = np.ndarray
IsTaskFulfilled = bool

CONTROLLER_STEPS_PER_ACTION = 4
"""LIBERO's controller takes 20 commands a second, the policy 5 actions."""
MAX_TRANSLATION_M = 0.05
"""How far the controller's command 1 moves the goal, m."""
MAX_ROTATION_RAD = 0.5
"""By how much the controller's command 1 turns the goal, rad."""
NUM_SETTLING_STEPS = 10
"""Controller steps after an official state is set, in which objects come to rest."""
SETTLING_COMMAND = [0.0] * 6 + [-1.0]
"""The arm stays where it is, the gripper opens."""
MESH_CELL_M = 0.004
"""Side of the cells within which fast rendering joins the vertices of a mesh, m. A pixel of the
external camera shows about as much of the table."""
CAMERAS = {"external": "agentview", "wrist": "robot0_eye_in_hand"}
"""The policy's view → LIBERO's camera."""
EE_FROM_HAND = np.diag([1.0, -1.0, -1.0])
"""Rotation from our end-effector frame to robosuite's `right_hand`, whose z axis points out of the
gripper."""
REWORDED_SUITES = ("_lan", "_task")
"""Ends of the names of LIBERO-PRO's suites with other instructions. The package reads instructions
from the names of the tasks' files, which these suites share with the original ones. Their own
instructions are in the files."""
CAMERA_AXES = np.diag([1.0, -1.0, -1.0])
"""Rotation from our camera frame (x right, y down, z forward) to MuJoCo's camera frame (x right, y
up, z backward)."""


class LiberoTask:
    """A task, with its scene.

    Args:
        suite: name of the suite, for example "libero_spatial".
        task_index: number of the task in its suite, from 0.
        seed: seed of the environment. It draws where the cabinet and the stove stand, which the
            official states do not contain.
        fast_rendering: whether pictures are rendered without multisampling, without reflections
            and from meshes with fewer triangles.
    """

    def __init__(self, suite: str, task_index: int, seed: int, fast_rendering: bool) -> None:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        benchmarks = benchmark.get_benchmark_dict()
        if suite not in benchmarks:
            raise ValueError(f"LIBERO has no suite {suite!r}, only {', '.join(sorted(benchmarks))}")
        tasks = benchmarks[suite]()
        if not 0 <= task_index < tasks.n_tasks:
            raise ValueError(
                f"{suite} has {tasks.n_tasks} tasks and no task with number {task_index}"
            )
        task = tasks.get_task(task_index)
        self._states = np.asarray(tasks.get_task_init_states(task_index))
        self._env = ControlEnv(
            bddl_file_name=os.path.join(
                get_libero_path("bddl_files"), task.problem_folder, task.bddl_file
            ),
            # The renderer takes longer to open than the scene. It is opened for the first picture.
            use_camera_obs=False,
            has_offscreen_renderer=False,
        )
        self._instruction = task.language
        if suite.endswith(REWORDED_SUITES):
            self._instruction = self._env.language_instruction
        self._env.seed(seed)
        self._seed = seed
        self._num_resets = 0  # since the environment was seeded
        self._fast_rendering = fast_rendering
        self._is_prepared = False
        self._has_renderer = False
        self._commanded = np.zeros(7)
        self._num_steps = 0
        self._has_succeeded = False
        self._is_commanded_open = True
        self._boxes: dict[str, tuple[Array, Array]] = {}

    def describe(self) -> dict[str, Any]:
        """The instruction, the number of official states, and what the task is about."""
        problem = self._env.env.parsed_problem
        return {
            "instruction": self._instruction,
            "num_states": len(self._states),
            "goal": [list(condition) for condition in problem["goal_state"]],
        }

    def list_official_object_positions(self) -> dict[str, Array]:
        """Where each loose object is in each official state: name → [states, 3], world frame, m.

        Loose objects are those that are not part of the room's furniture.
        """
        if not self._is_prepared:
            self._soft_reset_environment()
        model = self._env.sim.model
        positions = {}
        for name, loose_object in self._env.env.objects_dict.items():
            first_qpos, _ = model.get_joint_qpos_addr(loose_object.joints[-1])
            # A state is the time, then all positions of joints, then their speeds. The first three
            # numbers of a loose object's joint are x, y and z.
            x_column = 1 + first_qpos
            positions[name] = self._states[:, x_column : x_column + 3]
        return positions

    def reset(
        self,
        state_index: int,
        changes: dict[str, Any] | None = None,
        num_resets_since_seeding: int | None = None,
    ) -> dict[str, Any]:
        """Begin an episode from an official state, as openpi's and OpenVLA-OFT's scripts do.

        Args:
            state_index: number of the official state.
            changes: what of that state is changed, see `_change_state`. None changes nothing.
            num_resets_since_seeding: how many resets there have been since the environment was
                seeded, this one included. Each reset draws anew where cabinet and stove stand. None
                stands for one more than before.

        Returns:
            The moment, see `_make_moment`.
        """
        if num_resets_since_seeding is None:
            num_resets_since_seeding = self._num_resets + 1
        if num_resets_since_seeding <= self._num_resets:
            self._env.seed(self._seed)
            self._num_resets = 0
        while self._num_resets < num_resets_since_seeding:
            self._soft_reset_environment()  # counts itself in `_num_resets`
        self._env.set_init_state(self._states[state_index])
        if changes is not None:
            self._change_state(changes)
        for _ in range(NUM_SETTLING_STEPS):
            self._step(SETTLING_COMMAND)

        self._commanded = self._read_ee_pose()
        self._num_steps = 0
        self._has_succeeded = False
        self._is_commanded_open = True
        return self._make_moment()

    def run(self, pose_steps: Array, max_episode_steps: int) -> dict[str, Any]:
        """Execute actions, four controller steps for each, until the task is fulfilled.

        Args:
            pose_steps: [n, 7] as `spear.embodiments.libero` makes them: translation (m) and
                rotation vector (rad) from the pose that is measured when the action begins to the
                commanded pose, about the axes of the base, and the gripper's command, -1 (open) to
                1 (closed).
            max_episode_steps: controller steps after which an episode ends.
        """
        for pose_step in np.asarray(pose_steps, np.float64):
            self._set_commanded_pose(pose_step)
            self._is_commanded_open = bool(pose_step[6] < 0)
            for _ in range(CONTROLLER_STEPS_PER_ACTION):
                if self._has_succeeded or self._num_steps >= max_episode_steps:
                    return self._make_moment()
                self._has_succeeded = self._step(self._compute_command(pose_step[6]))
                self._num_steps += 1
        return self._make_moment()

    def run_controller(self, commands: Array, max_episode_steps: int) -> dict[str, Any]:
        """Execute commands [n, 7] in the controller's own units, as other projects' clients do."""
        for command in np.asarray(commands, np.float64):
            if self._has_succeeded or self._num_steps >= max_episode_steps:
                break
            self._has_succeeded = self._step(command)
            self._num_steps += 1
        self._commanded = self._read_ee_pose()
        return self._make_moment()

    def render(self, size: int) -> dict[str, Array]:
        """Pictures of both cameras, upright: view → uint8 [size, size, 3]."""
        self._ensure_renderer_is_open()
        pictures = {}
        for view, camera in CAMERAS.items():
            raw_picture = self._env.sim.render(width=size, height=size, camera_name=camera)
            pictures[view] = np.ascontiguousarray(raw_picture[::-1])  # OpenGL's first row is below
        return pictures

    def render_external_ground_truth(
        self, size_px: int, appearance_changes: dict[str, Any]
    ) -> dict[str, Any]:
        """Render the external camera, with the ground truth.

        Args:
            size_px: side of the square picture, px.
            appearance_changes: how the scene looks in this picture only, see `_changed_appearance`.

        Returns:
            "image"       uint8 [size_px, size_px, 3], upright.
            "depth"       float32 [size_px, size_px] along the camera's z axis, m.
            "instances"   int32 [size_px, size_px], the number of the object at each pixel, 0: none.
            "names"       number → name of the object; "" for the gripper.
            "intrinsics"  [3, 3], px.
            "extrinsics"  [4, 4], from the camera's frame to that of the robot's base.
        """
        self._ensure_renderer_is_open()
        sim = self._env.sim
        camera = CAMERAS["external"]
        camera_index = sim.model.camera_name2id(camera)
        with self._changed_appearance(camera_index, appearance_changes):
            image, depth_buffer = sim.render(
                width=size_px, height=size_px, camera_name=camera, depth=True
            )
            geoms = self._render_geom_numbers_upside_down(camera_index, size_px)
            model = sim.model._model
            focal_length = 0.5 * size_px / np.tan(np.radians(model.cam_fovy[camera_index]) / 2)
            camera_rotation = sim.data.cam_xmat[camera_index].reshape(3, 3) @ CAMERA_AXES
            pose = self._to_base_frame(sim.data.cam_xpos[camera_index], camera_rotation)

        # OpenGL's depth buffer is linear in 1 / depth: 0 at the near and 1 at the far plane.
        far_m = model.vis.map.zfar * model.stat.extent
        near_m = model.vis.map.znear * model.stat.extent
        depth_m = near_m / (1 - depth_buffer * (1 - near_m / far_m))
        instances, names = self._number_objects(geoms)
        extrinsics = np.eye(4)
        extrinsics[:3, :3] = quaternion_to_matrix(pose[3:])
        extrinsics[:3, 3] = pose[:3]
        return {
            "image": np.ascontiguousarray(image[::-1]),  # OpenGL's first row is below
            "depth": np.ascontiguousarray(depth_m[::-1]).astype(np.float32),
            "instances": np.ascontiguousarray(instances[::-1]),
            "names": names,
            "intrinsics": np.array(
                [[focal_length, 0, size_px / 2], [0, focal_length, size_px / 2], [0, 0, 1]]
            ),
            "extrinsics": extrinsics,
        }

    @contextlib.contextmanager
    def _changed_appearance(self, camera_index: int, changes: dict[str, Any]) -> Iterator[None]:
        """Move a camera and change the light for a while.

        changes:
            "camera": (translation [3] in the world (m), rotation vector [3] in the camera's frame).
            "light": factors [3] on the light's red, green and blue.
        """
        model = self._env.sim.model._model
        original_positions = model.cam_pos.copy()
        original_rotations = model.cam_quat.copy()
        original_lights = model.light_diffuse.copy()
        original_ambient = np.array(model.vis.headlight.ambient)
        original_headlight = np.array(model.vis.headlight.diffuse)
        try:
            if "camera" in changes:
                translation, rotation_vector = changes["camera"]
                turn = rotation_vector_to_quaternion(np.asarray(rotation_vector))
                model.cam_pos[camera_index] += translation
                model.cam_quat[camera_index] = multiply_quaternions(
                    model.cam_quat[camera_index], turn
                )
            factors = np.asarray(changes.get("light", (1.0, 1.0, 1.0)))
            model.light_diffuse[:] *= factors
            model.vis.headlight.ambient[:] *= factors
            model.vis.headlight.diffuse[:] *= factors
            self._env.sim.forward()
            yield
        finally:
            model.cam_pos[:] = original_positions
            model.cam_quat[:] = original_rotations
            model.light_diffuse[:] = original_lights
            model.vis.headlight.ambient[:] = original_ambient
            model.vis.headlight.diffuse[:] = original_headlight
            self._env.sim.forward()

    def _render_geom_numbers_upside_down(self, camera_index: int, size: int) -> Array:
        """Render the number of the geom (MuJoCo's shape) at each pixel, [size, size]; -1 for none.

        As always in OpenGL, the first row is the lowest one of the picture.
        robosuite has such a function, which fails with the NumPy of this environment.
        """
        import mujoco

        context = self._env.sim._render_context_offscreen
        context.render(width=size, height=size, camera_id=camera_index, segmentation=True)
        colors = np.empty((size, size, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_readPixels(rgb=colors, depth=None, viewport=viewport, con=context.con)
        # The color of a pixel is the number of its segment, with red as the lowest byte.
        segments = colors.astype(np.int64) @ [1, 2**8, 2**16]  # 0 is the background

        geom_of_segment = np.full(context.scn.ngeom + 1, -1)
        for index in range(context.scn.ngeom):
            drawn_geom = context.scn.geoms[index]
            if drawn_geom.segid != -1 and drawn_geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geom_of_segment[drawn_geom.segid + 1] = drawn_geom.objid
        return geom_of_segment[np.minimum(segments, context.scn.ngeom)]

    def _number_objects(self, geoms: Array) -> tuple[Array, dict[int, str]]:
        """Number the objects, fixtures and the gripper from 1 on.

        Args:
            geoms: [h, w] number of the geom at each pixel, -1 for none.

        Returns:
            The number of the object at each pixel, [h, w] int32; number → name, "" for the gripper.
        """
        environment = self._env.env
        model = self._env.sim.model._model
        roots = {name: environment.obj_body_id[name] for name in self._boxes}
        roots[""] = self._env.sim.model.body_name2id(environment.robots[0].gripper.root_body)
        instances = np.zeros(geoms.shape, np.int32)
        names = {}
        for number, (name, root) in enumerate(roots.items(), 1):
            names[number] = name
            for geom in np.unique(geoms[geoms >= 0]):
                if self._is_part_of(model, int(model.geom_bodyid[geom]), root):
                    instances[geoms == geom] = number
        return instances, names

    def _soft_reset_environment(self) -> None:
        """Reset robosuite's environment.

        A hard reset would build the model again. A soft one gives the same to the bit, and takes a
        hundredth of the time, if the gripper forgets its last command.
        """
        self._env.env.hard_reset = False
        self._env.reset()
        self._num_resets += 1
        self._env.env.robots[0].gripper.current_action[:] = 0
        if not self._is_prepared:
            self._is_prepared = True
            self._boxes = self._measure_bounds_in_body_frames()

    def _step(self, command: Sequence[float] | Array) -> IsTaskFulfilled:
        """Execute one command of the controller. Returns whether the task is fulfilled.

        This gives the same as LIBERO's own `step`, to the bit, in half the time. That one computes
        everything that follows from positions and speeds three times in each physics step, and
        observations that nobody reads.
        """
        import mujoco

        environment = self._env.env
        sim = environment.sim
        model = sim.model._model
        data = sim.data._data
        environment.timestep += 1
        # The controller would call this once more. What it computes is known by then.
        sim.forward = lambda: None
        try:
            num_physics_steps = int(environment.control_timestep / environment.model_timestep)
            for index in range(num_physics_steps):
                mujoco.mj_step1(model, data)
                environment._pre_action(command, policy_step=index == 0)
                mujoco.mj_step2(model, data)
        finally:
            del sim.forward  # the method of the class is back
        environment.cur_time += environment.control_timestep
        environment._post_action(command)
        return bool(environment._check_success())

    def _ensure_renderer_is_open(self) -> None:
        """Open the renderer if it is not open, for simpler pictures if that was asked for.

        Those are pictures without multisampling and reflections, of meshes with fewer triangles.
        """
        if self._has_renderer:
            return
        self._has_renderer = True
        if self._fast_rendering:
            model = self._env.sim.model._model
            model.vis.quality.offsamples = 0
            model.mat_reflectance[:] = 0
            simplify_meshes(model)
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        context = MjRenderContextOffscreen(self._env.sim, device_id=-1)
        context.vopt.geomgroup[0] = 0  # collision shapes, as robosuite hides them
        context.vopt.geomgroup[1] = 1
        self._env.sim.add_render_context(context)

    def _change_state(self, changes: dict[str, Any]) -> None:
        """Move objects and the arm in a state that was just set.

        changes:
            "objects": name → (x, y, yaw) by which the object is moved (m, rad).
            "joints": [7] by which the arm's joints are turned (rad).
        """
        sim = self._env.sim
        for name, (x, y, yaw) in changes.get("objects", {}).items():
            # The last joint of an object is its free joint; others move its parts.
            joint = self._env.env.objects_dict[name].joints[-1]
            pose = np.array(sim.data.get_joint_qpos(joint))
            pose[:2] += (x, y)
            turn = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
            pose[3:] = multiply_quaternions(turn, pose[3:])
            sim.data.set_joint_qpos(joint, pose)
        if "joints" in changes:
            robot = self._env.env.robots[0]
            joints = sim.data.qpos[robot._ref_joint_pos_indexes] + changes["joints"]
            sim.data.qpos[robot._ref_joint_pos_indexes] = joints
        sim.forward()
        self._env.env.robots[0].controller.update(force=True)
        self._env.env.robots[0].controller.reset_goal()

    def _set_commanded_pose(self, pose_step: Array) -> None:
        """Set the commanded pose to the measured one, moved by a translation and a rotation vector
        (base frame)."""
        measured = self._read_ee_pose()
        turn = rotation_vector_to_quaternion(pose_step[3:6])
        rotation = multiply_quaternions(turn, measured[3:])
        self._commanded[:3] = measured[:3] + pose_step[:3]
        self._commanded[3:] = rotation / np.linalg.norm(rotation)

    def _compute_command(self, gripper: float) -> Array:
        """The controller's command [7] that takes the arm from where it is to the commanded
        pose."""
        measured = self._read_ee_pose()
        translation = self._commanded[:3] - measured[:3]
        turn = multiply_quaternions(self._commanded[3:], conjugate_quaternion(measured[3:]))
        rotation = quaternion_to_rotation_vector(turn)
        arm = np.concatenate([translation / MAX_TRANSLATION_M, rotation / MAX_ROTATION_RAD])
        return np.append(np.clip(arm, -1, 1), np.clip(gripper, -1, 1))

    def _read_ee_pose(self) -> Array:
        """The end-effector's pose [7] in the frame of the robot's base."""
        robot = self._env.env.robots[0]
        sim = self._env.sim
        position = sim.data.site_xpos[robot.eef_site_id]
        hand = sim.data.get_body_xmat(robot.robot_model.eef_name).reshape(3, 3)
        return self._to_base_frame(position, hand @ EE_FROM_HAND)

    def _to_base_frame(self, position: Array, rotation: Array) -> Array:
        """Convert position [3] and rotation matrix [3, 3] from the world to a pose [7]."""
        base = self._env.env.robots[0].robot_model.root_body
        base_position = self._env.sim.data.get_body_xpos(base)
        base_rotation = self._env.sim.data.get_body_xmat(base).reshape(3, 3)
        position_in_base = base_rotation.T @ (position - base_position)
        return np.concatenate([position_in_base, matrix_to_quaternion(base_rotation.T @ rotation)])

    def _make_moment(self) -> dict[str, Any]:
        """What is known between two actions.

        pose               [7] of the end-effector.
        commanded          [7] pose that the controller has to reach.
        fingers            [2] joint positions of the fingers, m.
        base               [3] position of the robot's base in the world, m.
        objects            name → (pose [7], smallest and largest corner [3] of its box, in its own
                           frame).
        sites              name of a region → (pose [7], half sizes [3]).
        joints             name of a joint of a fixture → its position (m or rad).
        gripped_objects    names of the objects that both fingers touch.
        is_commanded_open  whether the last command was to open the gripper.
        speed              of the end-effector, m/s.
        finger_speed       of the faster finger, m/s.
        success            whether the task has been fulfilled.
        steps              controller steps since the episode began.
        """
        sim = self._env.sim
        environment = self._env.env
        robot = environment.robots[0]

        objects = {}
        for name, (low, high) in self._boxes.items():
            body = environment.obj_body_id[name]
            rotation = sim.data.body_xmat[body].reshape(3, 3)
            objects[name] = (self._to_base_frame(sim.data.body_xpos[body], rotation), low, high)
        sites = {}
        for name, site in environment.object_sites_dict.items():
            rotation = sim.data.get_site_xmat(name).reshape(3, 3)
            pose = self._to_base_frame(sim.data.get_site_xpos(name), rotation)
            sites[name] = (pose, np.array(site.size))
        joints = {}
        for fixture in environment.fixtures_dict.values():
            for joint in fixture.joints:
                joints[joint] = float(sim.data.get_joint_qpos(joint))
        gripped_objects = []
        for name in environment.objects_dict:
            if environment._check_grasp(robot.gripper, environment.objects_dict[name]):
                gripped_objects.append(name)

        return {
            "pose": self._read_ee_pose(),
            "commanded": self._commanded.copy(),
            "fingers": np.array(sim.data.qpos[robot._ref_gripper_joint_pos_indexes]),
            "base": np.array(sim.data.get_body_xpos(robot.robot_model.root_body)),
            "objects": objects,
            "sites": sites,
            "joints": joints,
            "gripped_objects": gripped_objects,
            "is_commanded_open": self._is_commanded_open,
            "speed": float(np.linalg.norm(robot._hand_vel)),
            "finger_speed": float(
                np.abs(sim.data.qvel[robot._ref_gripper_joint_vel_indexes]).max()
            ),
            "success": self._has_succeeded,
            "steps": self._num_steps,
        }

    def _measure_bounds_in_body_frames(self) -> dict[str, tuple[Array, Array]]:
        """Name of each object and fixture → the smallest and the largest x, y and z of its shapes.

        Both are [3], in the frame of its body, m.
        """
        environment = self._env.env
        boxes = {}
        for name in (*environment.objects_dict, *environment.fixtures_dict):
            corners = self._list_points_spanning_body(environment.obj_body_id[name])
            boxes[name] = (corners.min(axis=0), corners.max(axis=0))
        return boxes

    def _list_points_spanning_body(self, body: int) -> Array:
        """Points [n, 3] that span the shapes of a body and its parts, in its own frame.

        Meshes that only collide do not count.
        """
        model = self._env.sim.model._model
        data = self._env.sim.data._data
        body_rotation = data.xmat[body].reshape(3, 3)
        points = []
        for geom in range(model.ngeom):
            if not self._is_part_of(model, int(model.geom_bodyid[geom]), body):
                continue
            # Group 0 has the collision shapes, which are not visible. Meshes among them are convex
            # hulls and left out; boxes, cylinders and the like count.
            if model.geom_group[geom] == 0 and model.geom_type[geom] == _MESH:
                continue
            in_geom = _list_points_spanning_geom(model, geom)
            rotation = data.geom_xmat[geom].reshape(3, 3)
            in_world = in_geom @ rotation.T + data.geom_xpos[geom]
            points.append((in_world - data.xpos[body]) @ body_rotation)
        return np.concatenate(points)

    @staticmethod
    def _is_part_of(model: Any, body: int, root: int) -> bool:
        while body != 0:
            if body == root:
                return True
            body = int(model.body_parentid[body])
        return False


_MESH = 7  # mujoco.mjtGeom.mjGEOM_MESH


def _list_points_spanning_geom(model: Any, geom: int) -> Array:
    """Points [n, 3] that span a shape, in its own frame."""
    if model.geom_type[geom] == _MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return np.array(model.mesh_vert[first : first + model.mesh_vertnum[mesh]])
    half_size = model.geom_aabb[geom, 3:]
    center = model.geom_aabb[geom, :3]
    return np.stack([center - half_size, center + half_size])


def simplify_meshes(model: Any) -> None:
    """Remove the triangles of a MuJoCo model's meshes that are too small to be seen.

    Vertices within the same cell of a grid become one vertex. Triangles that have no area then are
    removed. Physics does not change, because it does not use triangles.
    """
    for mesh in range(model.nmesh):
        first_vertex = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
        cells = np.floor(vertices / MESH_CELL_M).astype(np.int64)
        cells -= cells.min(axis=0)
        cell_numbers = np.ravel_multi_index(tuple(cells.T), tuple(cells.max(axis=0) + 1))
        _, vertex_of_cell, cell_of_vertex = np.unique(
            cell_numbers, return_index=True, return_inverse=True
        )
        first_face = model.mesh_faceadr[mesh]
        faces = slice(first_face, first_face + model.mesh_facenum[mesh])
        corners = vertex_of_cell[cell_of_vertex[model.mesh_face[faces]]]  # [triangles, 3]
        has_area = (
            (corners[:, 0] != corners[:, 1])
            & (corners[:, 1] != corners[:, 2])
            & (corners[:, 2] != corners[:, 0])
        )
        # The remaining triangles move to the beginning of the mesh's part of MuJoCo's arrays.
        num_remaining = int(has_area.sum())
        remaining = slice(first_face, first_face + num_remaining)
        # Normals and texture coordinates stay those of the original corners.
        model.mesh_facenormal[remaining] = model.mesh_facenormal[faces][has_area]
        model.mesh_facetexcoord[remaining] = model.mesh_facetexcoord[faces][has_area]
        model.mesh_face[remaining] = corners[has_area]
        model.mesh_facenum[mesh] = num_remaining


def multiply_quaternions(first: Array, second: Array) -> Array:
    """The product of two quaternions [4], scalar first."""
    w1, x1, y1, z1 = first
    w2, x2, y2, z2 = second
    return np.array(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ]
    )


def conjugate_quaternion(quaternion: Array) -> Array:
    return quaternion * np.array([1, -1, -1, -1])


def rotation_vector_to_quaternion(vector: Array) -> Array:
    angle = np.linalg.norm(vector)
    # sin(angle / 2) / angle, which is 1/2 in the limit of no rotation
    factor = np.sinc(angle / (2 * np.pi)) / 2
    return np.concatenate([[np.cos(angle / 2)], factor * vector])


def quaternion_to_rotation_vector(quaternion: Array) -> Array:
    if quaternion[0] < 0:
        quaternion = -quaternion
    sine = np.linalg.norm(quaternion[1:])
    if sine < 1e-12:
        return 2 * quaternion[1:]
    angle = 2 * np.arctan2(sine, quaternion[0])
    return angle / sine * quaternion[1:]


def matrix_to_quaternion(matrix: Array) -> Array:
    """The unit quaternion [4] of a rotation matrix, scalar first and not negative."""
    # Each case divides by one component of the quaternion, so the largest one is chosen. It belongs
    # to the largest of these four numbers, each of which grows with the square of its component.
    trace = np.trace(matrix)
    component_sizes = np.array([trace, *np.diag(matrix)])
    largest = int(np.argmax(component_sizes))
    if largest == 0:
        quaternion = np.array(
            [
                1 + trace,
                matrix[2, 1] - matrix[1, 2],
                matrix[0, 2] - matrix[2, 0],
                matrix[1, 0] - matrix[0, 1],
            ]
        )
    else:
        i = largest - 1
        j = (i + 1) % 3
        k = (i + 2) % 3
        quaternion = np.empty(4)
        quaternion[0] = matrix[k, j] - matrix[j, k]
        quaternion[1 + i] = 1 + matrix[i, i] - matrix[j, j] - matrix[k, k]
        quaternion[1 + j] = matrix[i, j] + matrix[j, i]
        quaternion[1 + k] = matrix[i, k] + matrix[k, i]
    quaternion = quaternion / np.linalg.norm(quaternion)
    return -quaternion if quaternion[0] < 0 else quaternion


def quaternion_to_matrix(quaternion: Array) -> Array:
    """The rotation matrix [3, 3] of a unit quaternion [4], scalar first."""
    axes = []
    for axis in np.eye(3):
        rotated = multiply_quaternions(
            multiply_quaternions(quaternion, np.append(0, axis)), conjugate_quaternion(quaternion)
        )
        axes.append(rotated[1:])
    return np.stack(axes, axis=1)


def serve(connection: Connection) -> None:
    """Answer requests until the other side closes the connection or sends None."""
    task: LiberoTask | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        method, arguments = request
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints notices
                if method == "open":
                    task = LiberoTask(*arguments)
                    result: Any = task.describe()
                else:
                    result = getattr(task, method)(*arguments)
            connection.send((True, result))
        except Exception as error:
            last_lines = traceback.format_exc().strip().splitlines()[-3:]
            connection.send((False, f"{type(error).__name__}: {error} ({' '.join(last_lines)})"))


def main() -> None:
    address = sys.argv[1]
    key = bytes.fromhex(os.environ.pop("SPEAR_LIBERO_KEY"))
    with Client(address, authkey=key) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
