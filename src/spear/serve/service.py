"""A policy for one robot: observations in, commands out.

The *embodiment* is the adapter of the robot. It reads the robot's observations, and one of its
*controls* converts the policy's actions to *rows*: arrays of commands, which the robot executes one
after the other at the control's rate. A robot's file is a Python file of the user with such an
embodiment.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

import spear
from spear.embodiments import Embodiment
from spear.embodiments.actions import validate_chunk
from spear.embodiments.interface import keep_actions
from spear.embodiments.observations import (
    COMMITTED_KEY,
    CheckedObservation,
    get_camera_key,
    select_cameras,
)
from spear.errors import SpearError, format_count, notice, suppress_notices
from spear.types import CONTROL_RATE_HZ, Array, Policy, WidthAndHeight

LOG = logging.getLogger(__name__)


def _get_sizes_of_trained_cameras(policy: Policy) -> Mapping[str, WidthAndHeight]:
    """Return view -> (width, height) of the policy's cameras, without those that training lacked.

    A policy has the cameras of its preset. If its training data lacked one, it has learned nothing
    from that camera, and a robot should not send it.
    """
    image_sizes: Mapping[str, WidthAndHeight] = getattr(policy, "image_sizes", {})
    distribution = getattr(policy, "training_distribution", None)
    if distribution is None:
        return image_sizes
    # `red_minus_blue` has an entry for each camera of the training data.
    trained_views = distribution.red_minus_blue
    return {view: size for view, size in image_sizes.items() if view in trained_views}


class Answer(dict[str, Any]):
    """What the robot gets for a valid observation: {"actions", "policy_timing"}.

    Attributes:
        observation: what the policy observed.
        chunk: [H, 8] the policy's actions, from which the rows in "actions" were converted.
    """

    def __init__(self, rows: Array, observation: CheckedObservation, chunk: Array) -> None:
        super().__init__(actions=rows)
        self.observation = observation
        self.chunk = chunk


Result = dict[str, Any] | SpearError
"""What an observation gets: an answer, or the error that says what is wrong with it."""


class Service:
    """A policy behind an embodiment.

    Args:
        policy: the policy, which predicts the actions.
        embodiment: the adapter of the robot.
        name: the policy's name in what clients are told.
        robot: the embodiment's name in what clients are told.
        control: the name of one of the embodiment's controls; None for its default.
    """

    def __init__(
        self,
        policy: Policy,
        embodiment: Embodiment,
        name: str = "policy",
        robot: str = "generic",
        control: str | None = None,
    ) -> None:
        self.policy = policy
        embodiment = _with_frames_of_policy(embodiment, policy, name)
        self.embodiment = embodiment
        control_name, self.control = embodiment.select_control(control)
        self.metadata = self._make_metadata(name, robot, control_name)
        self.greeting = self.metadata
        if embodiment.greeting is not None:
            self.greeting = embodiment.greeting(control_name)

    def _make_metadata(
        self, policy_name: str, robot_name: str, control_name: str
    ) -> dict[str, Any]:
        """Return what clients are told about the policy and the robot."""
        image_sizes = _get_sizes_of_trained_cameras(self.policy)
        # How many committed actions, with which a chunk must begin, an observation may have.
        takes_committed = COMMITTED_KEY in self.embodiment.optional
        max_committed = getattr(self.policy, "committed", 0) if takes_committed else 0
        return {
            "policy": policy_name,
            "weights": getattr(self.policy, "identity", None),
            "embodiment": robot_name,
            "control": control_name,
            "action": self.control.description,
            "converted": self.control.convert is not keep_actions,
            "rate_hz": self.control.rate_hz,
            "observation": dict(self.embodiment.required),
            "optional": dict(self.embodiment.optional),
            "image_sizes": {view: list(size) for view, size in image_sizes.items()},
            "committed": max_committed,
            "server": f"spear {spear.__version__}",
        }

    def answer(self, observations: Sequence[Any], robots: Sequence[Hashable] = ()) -> list[Result]:
        """Answer observations together. A wrong observation does not affect the other answers.

        Args:
            observations: as the robots send them.
            robots: who sent each observation, if several robots are served.

        Returns:
            For each observation, in order, an `Answer` or the `SpearError` that
            says what is wrong with it. The timing, in ms, is that of the whole batch.
        """
        # Read and check the observations. `checked` has the valid ones by their index.
        start_time_s = time.perf_counter()
        readings = [_try(self.embodiment.read, observation) for observation in observations]
        checked: dict[int, CheckedObservation] = {}
        for index, reading in enumerate(readings):
            if isinstance(reading, CheckedObservation):  # otherwise it is an error
                checked[index] = select_cameras(self.policy, reading)
                checked[index].robot = robots[index] if robots else None

        inference_start_s = time.perf_counter()
        predictions = self._infer(list(checked.values())) if checked else []
        inference_end_s = time.perf_counter()

        # Wrong observations keep their errors. The others get rows of commands, or an error of the
        # policy or of the conversion.
        results = list(readings)
        for index, prediction in zip(checked, predictions, strict=True):
            results[index] = prediction
            if not isinstance(prediction, SpearError):
                results[index] = _try(
                    self._convert, prediction, checked[index], observations[index]
                )

        inference_s = inference_end_s - inference_start_s
        embodiment_s = time.perf_counter() - start_time_s - inference_s
        timing = {"infer_ms": 1000 * inference_s, "embodiment_ms": 1000 * embodiment_s}
        for result in results:
            if not isinstance(result, SpearError):
                result["policy_timing"] = timing
        return results

    def warm_up_and_count_rows(self) -> int:
        """Answer the embodiment's example, so that the first client does not have to wait.

        Prints a notice if the rows of the answer last for another time than the actions that they
        were converted from.

        Returns:
            The number of rows of the answer.

        Raises:
            SpearError: the example cannot be answered.
        """
        example = self.embodiment.example()
        with suppress_notices():  # notices about the example would not be about the robot
            result = self.answer([example])[0]
            if isinstance(result, SpearError):
                raise result
            # On a GPU, PyTorch compiles again when it meets the first instruction of another
            # length. From then on the compiled network takes any length.
            observation = select_cameras(self.policy, self.embodiment.read(example))
            chunk = self.policy.infer_batch([{**observation, "prompt": "go"}])[0]

        num_rows = len(result["actions"])
        num_actions = len(chunk["actions"])
        rate_hz = self.control.rate_hz
        if not math.isclose(num_rows * CONTROL_RATE_HZ, num_actions * rate_hz):
            notice(
                f"the robot's file makes {num_rows} rows at rate_hz {rate_hz:g} from "
                f"{format_count(num_actions, 'actions')} at {CONTROL_RATE_HZ:g} Hz. The arm will "
                "move too fast or too slowly, or stop early."
            )
        return num_rows

    def _convert(
        self,
        prediction: Mapping[str, Any],
        checked: CheckedObservation,
        observation: Mapping[str, Any],
    ) -> Answer:
        """Convert the policy's result to rows for the robot."""
        actions = validate_chunk(prediction["actions"])
        rows = np.asarray(self.control.convert(actions, checked["observation/state"], observation))
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise SpearError(
                "the robot's file makes no rows of finite numbers. Do not move, and repair the "
                "file."
            )
        return Answer(rows, checked, actions)

    def _infer(self, observations: Sequence[Mapping[str, Any]]) -> Sequence[Result]:
        """Infer all actions together; halve the batch on an error to find the wrong observation."""
        try:
            return self.policy.infer_batch(observations)
        except SpearError as error:
            if len(observations) == 1:
                return [error.with_traceback(None)]  # a traceback would keep the images in memory
        # At least one of several observations is wrong. The halves find out which.
        half = len(observations) // 2
        return [*self._infer(observations[:half]), *self._infer(observations[half:])]


def check_has_cameras(
    embodiment: Embodiment, required_cameras: Collection[str], robot_name: str
) -> None:
    """Raise `SpearError` if a robot lacks a camera.

    Args:
        embodiment: the adapter of the robot; its example has all cameras that the robot can have.
        required_cameras: the cameras that a policy relies on.
        robot_name: the robot's name in the error.
    """
    reading = _try(embodiment.read, embodiment.example())
    if isinstance(reading, SpearError):
        raise reading
    missing_cameras = [
        camera for camera in required_cameras if get_camera_key(camera) not in reading
    ]
    if missing_cameras:
        raise SpearError(
            f"the policy was trained with the camera {missing_cameras[0]!r}, which {robot_name} "
            "does not have. Train a policy without this camera, or add --allow-missing-cameras if "
            "you accept worse actions."
        )


def _try(call: Callable[..., dict[str, Any]], *arguments: Any) -> Result:
    """Return what `call` returns, or the `SpearError` that it raises.

    Any other exception comes from a mistake in a robot's file, and is returned as a `SpearError`.
    """
    try:
        return call(*arguments)
    except SpearError as error:
        return error.with_traceback(None)  # it would keep the observation in memory
    except Exception as error:
        LOG.exception("the robot's file failed")
        return SpearError(
            f"the robot's file fails with {type(error).__name__}. See the server's log."
        )


def _with_frames_of_policy(embodiment: Embodiment, policy: Policy, policy_name: str) -> Embodiment:
    """Return the embodiment with the version of its end-effector frame in which the policy acts.

    The policy acts in the version of the data on which it was trained (see
    `Embodiment.with_frames`). A notice tells the user if that version is not the newest one.
    """
    frames = getattr(policy, "frames", {})
    fitted = embodiment.with_frames(frames)
    if fitted.frame_version != embodiment.frame_version:
        advice = "Train it again on data that are prepared again to change that."
        if frames is None:
            advice = (
                f"It records no version: if it learned nothing of {embodiment.frame}, write "
                '"frames": {} into its normalizer.json.'
            )
        notice(
            f"{policy_name} acts in version {fitted.frame_version} of the frames of "
            f"{embodiment.frame}, as when it was trained; they have version "
            f"{embodiment.frame_version} now. {advice}"
        )
    return fitted
