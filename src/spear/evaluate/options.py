"""What an evaluation can be told, from the command line or in Python."""

from typing import Annotated, Literal

from tyro.conf import arg

from spear.util.options import (
    DatasetName,
    Device,
    Dtype,
    OptionalFolder,
    OptionalInt,
    Options,
    Range,
    Seed,
)

Films = int | Literal["failures", "all"]
"""Of a family: so many successes and as many failures, lowest seeds first; all failures; or all."""
_READ = "Which of the numbers that the model holds possible: the likeliest (mode), the mean or the median."
Decode = Annotated[Literal["mode", "mean", "median"], arg(help=_READ)]


class AgentOptions(Options):
    """Who acts, and how it is loaded."""

    policy: str = "nano"
    """nano (comes with this package), a folder with a trained policy, the ws:// address of `spear serve
    --embodiment generic`, or a reference: expert (oracle for SIMPLER: a script that knows the true state) or
    nothing."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    dataset: DatasetName = None
    flow_steps: Annotated[OptionalInt, Range(1)] = None
    """Euler steps from noise to actions. Default: the model's own number."""


class EpisodeOptions(Options):
    """Which episodes, and what is kept of them: the same in every simulator."""

    scenes: Annotated[int, Range(1)] = 381
    """Scenes per family. 381 are enough to know each family's success rate to ±5 points."""
    first_seed: Annotated[int, Range(0)] = 0
    """Scenes first-seed, first-seed + 1, … In the embedded simulator those below 10000 are for testing."""
    replan: Annotated[int, Range(1)] = 1
    """How many of the predicted actions are executed before the policy looks again: fewer react sooner and
    cost more inferences."""
    films: Annotated[Films, Range(0)] = 0
    """Films of so many successes and failures per family; failures, for a film of every failure; or all."""
    out: OptionalFolder = None
    """Folder for the results. Outcomes are written as they come; those that it holds are not run again."""
    shard: str = "1/1"
    """Run only a part of the scenes, 2/5 for the second of five. Parts with the same --out come together
    there; so do those of other machines, when their files are copied there."""


class TabletopOptions(EpisodeOptions):
    """A closed loop in the embedded simulator."""

    families: tuple[str, ...] = ()
    """Task families; all of them when none is given."""
    batch: Annotated[int, Range(1)] = 32
    """Scenes that run at once: their observations go through the policy together."""
    execution: Literal["sync", "async", "rtc"] = "sync"
    """sync waits for each chunk of actions; async moves on meanwhile, slowly before the gripper is used;
    rtc is for a policy that has learned to go on from the actions executed meanwhile."""
    latency_ms: Annotated[float, Range(0, 1e6)] = 0.0
    """Simulated time that the policy takes to answer, in milliseconds. The control loop takes a chunk up at
    its next step: it counts in whole steps of 200 ms, rounded up."""


class SimplerOptions(EpisodeOptions):
    """A closed loop in SIMPLER's tasks."""

    scenes: Annotated[int, Range(1)] = 384
    """Episodes per task. 384 are enough to know each task's success rate to ±5 points. A task has 24 or 64
    different starts: each comes up 16 or 6 times, with other noise for the policy; references, which have no
    noise, see each once."""
    tasks: tuple[str, ...] = ()
    """ManiSkill's names; all four when none is given."""
    off_grid: bool = False
    """Other starts than the official ones: each scene has a start of its own."""
    batch: Annotated[int | None, Range(1), arg(metavar="N")] = None
    """Scenes that run at once, each in a process of its own; without it, as many as there are cores."""
    assets: OptionalFolder = None
    """ManiSkill's asset folder, where it is neither ~/.maniskill nor named by MS_ASSET_DIR."""


class QuestionOptions(Options):
    """What a SPEAR-VLM is asked about labelled images, and what is scored."""

    per_image: Annotated[int, Range(1)] = 2
    """At most so many questions of each kind about an image."""
    families: tuple[str, ...] = ()
    """Kinds of questions; all when none is given: box_vertices, keypoint, offset, distance, back_projection,
    chain_of_thought."""
    decode: Decode = "median"
    seed: Seed = 0
    view: str = "external"
    """The camera that the images are from, external or wrist."""
    batch: Annotated[int, Range(1)] = 32
    """Questions that are answered at once."""
