"""Options of evaluations, from the command line or in Python."""

from typing import Annotated, Literal

from tyro.conf import arg

from spear.question_types import QUESTION_TYPES
from spear.util.options import (
    CameraView,
    DatasetName,
    Device,
    Dtype,
    OptionalFolder,
    OptionalInt,
    Options,
    Quantize,
    Range,
    Seed,
)

Films = int | Literal["failures", "all"]
"""Which episodes of each family are filmed.

A number n stands for n successes and n failures, those with the lowest seeds first. "failures"
stands for all failures, and "all" for all episodes.
"""
DECODE_HELP = (
    "How numbers are read off the model's probabilities: the likeliest (mode), the mean or the "
    "median."
)
DecodeOption = Annotated[Literal["mode", "mean", "median"], arg(help=DECODE_HELP)]


class AgentOptions(Options):
    """Who acts, and how it is loaded."""

    policy: str = "nano"
    """Who acts: nano (comes with this package), a folder with a trained policy, the ws:// address
    of `spear serve --embodiment generic`, "expert" (a script that knows the true state; "oracle"
    for SIMPLER) or "nothing" (the arm stays where it is)."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    quantize: Quantize = None
    norm_stats: DatasetName = None
    flow_steps: Annotated[OptionalInt, Range(1)] = None
    """Euler steps from noise to actions. Default: the model's own number."""


class EpisodeOptions(Options):
    """Which episodes are run, and what is recorded of them, in every simulator."""

    num_scenes: Annotated[int, Range(1)] = 381
    """Scenes per family. 381 are enough to know each family's success rate to ±5 points."""
    first_seed: Annotated[int, Range(0)] = 0
    """Seed of the first scene; the others follow. In the embedded simulator seeds below 10000 are
    held out."""
    replan_steps: Annotated[int, Range(1)] = 1
    """Replan interval: number of predicted actions that are executed before the next inference.
    Fewer react sooner and cost more inferences."""
    videos: Annotated[Films, Range(0)] = 0
    """Number of successes and of failures per task to film; or "failures", for a film of every
    failure; or "all"."""
    out: OptionalFolder = None
    """Folder for the results. Outcomes are written as they come; episodes that it contains are not
    run again."""
    shard: str = "1/1"
    """Run only a part of the scenes, 2/5 for the second of five. Parts with the same --out are
    merged there; so are those of other machines when you copy their files there."""


class TabletopOptions(EpisodeOptions):
    """A closed-loop evaluation in the embedded simulator."""

    tasks: tuple[str, ...] = ()
    """Task families. Default: all."""
    batch_size: Annotated[int, Range(1)] = 32
    """Scenes that run at once: their observations go through the policy together."""
    execution: Literal["sync", "async", "rtc"] = "sync"
    """Execution mode: sync waits for each action chunk; async moves on during inference, slowly
    before the gripper is used; rtc is for a policy that was trained to continue a committed
    prefix."""
    latency_ms: Annotated[float, Range(0, 1e6)] = 0.0
    """Simulated inference latency in milliseconds. The control loop uses a chunk at its next step,
    so the latency counts in whole steps of 200 ms, rounded up."""
    world: str = "default"
    """Surroundings of the scenes: default, colorful, varied or wild (other ones in every scene,
    from near the default ones to far from them), lab:N (laboratory number N), labs:K (the scenes
    are spread over K laboratories), colorful-lab:N or colorful-labs:K."""
    shift: Annotated[str | None, arg(metavar="AXIS[:LEVEL]")] = None
    """Shift the scenes along one axis: camera, light, background, layout, robot, language or noise,
    by level 1, 2 (default) or 3; or all, for every axis and level."""


class SimplerOptions(EpisodeOptions):
    """A closed-loop evaluation in SIMPLER's tasks."""

    num_scenes: Annotated[int, Range(1)] = 384
    """Episodes per task. 384 are enough to know each task's success rate to ±5 points. A task has
    24 or 64 different starts, so each is used 16 or 6 times, with other noise for the policy.
    Baselines, which have no noise, use each start once."""
    tasks: tuple[str, ...] = ()
    """Tasks, by ManiSkill's names. Default: all four."""
    off_grid: bool = False
    """Use other starts than the official ones, a different one in each scene."""
    shift: Annotated[str | None, arg(metavar="AXIS[:LEVEL]")] = None
    """Shift the scenes along one axis: camera, light, background, language or noise, by level 1, 2
    (default) or 3; or all, for every axis and level. Camera, background and all leave out the
    eggplant's task, whose basket is a part of the photograph."""
    batch_size: Annotated[int | None, Range(1), arg(metavar="N")] = None
    """Scenes that run at once, each in its own process. Default: the number of cores."""
    assets: OptionalFolder = None
    """ManiSkill's asset folder, if it is neither ~/.maniskill nor named by MS_ASSET_DIR."""


class LiberoOptions(EpisodeOptions):
    """A closed-loop evaluation in LIBERO's tasks."""

    suites: tuple[str, ...] = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    """Suites, original ones or perturbed ones of LIBERO-PRO, for example libero_goal_swap."""
    num_scenes: Annotated[int, Range(1)] = 50
    """Official states per task. Further episodes begin in the same states again, with other noise
    for the policy."""
    tasks: tuple[int, ...] = ()
    """Numbers of the tasks of each suite, from 0. Default: all ten."""
    protocol: Literal["openpi", "oft", "lerobot"] = "openpi"
    """Whose seed of the environment and limits of steps to use."""
    fast_rendering: bool = False
    """Render pictures without multisampling and reflections, of simplified meshes, several times as
    fast. They differ from the official ones."""
    batch_size: Annotated[int | None, Range(1), arg(metavar="N")] = None
    """Scenes that run at once, each in its own process of 2 GB. Default: the number of cores."""


QUESTION_TYPES_HELP = f"Question types: {', '.join(QUESTION_TYPES)}. Default: all."
QuestionTypes = Annotated[tuple[str, ...], arg(help=QUESTION_TYPES_HELP)]


class QuestionOptions(Options):
    """Which questions a SPEAR-VLM is asked about labeled images, and how its answers are read."""

    questions_per_image: Annotated[int, Range(1)] = 2
    """Maximum number of questions of each type about an image."""
    question_types: QuestionTypes = ()
    decode: DecodeOption = "median"
    seed: Seed = 0
    view: CameraView = "external"
    """The camera that the images are from."""
    batch_size: Annotated[int, Range(1)] = 32
    """Questions that are answered at once."""
