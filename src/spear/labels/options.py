"""The options of the commands `spear label` and `spear questions`.

The text below an option is its help.
"""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.question_types import QUESTION_TYPES
from spear.util.options import (
    Device,
    OptionalFolder,
    OptionalInt,
    Options,
    Preset,
    Range,
    RarelyUsed,
)

QUESTION_TYPES_HELP = f"Question types: {', '.join(QUESTION_TYPES)}. Default: all."


class WorkOptions(Options):
    """How the work is done. The labels do not depend on it."""

    engine: Literal["local", "ray"] = "local"
    """local, or ray to use a Ray cluster."""
    workers: Annotated[int, Range(0, 1024)] = 2
    """Processes that read images and fit boxes."""
    batch_size: Annotated[int, Range(1)] = 8
    """Images that go through a network together."""
    shard_size: Annotated[int, Range(1), RarelyUsed()] = 256
    """Images per file. What is not in a finished file is done again after an interruption."""
    replicas: Annotated[tuple[int, int, int], Range(1), RarelyUsed()] = (1, 1, 1)
    """With ray: how many detectors, segmenters and point maps run."""
    gpus: Annotated[tuple[float, float, float], Range(0), RarelyUsed()] = (0.0, 0.0, 0.0)
    """With ray: GPUs for each detector, segmenter and point map; 0.5 shares one."""


class SceneOptions(Options):
    """Scenes of the simulator, which are labeled when no photos are given."""

    num_scenes: Annotated[OptionalInt, Range(1)] = None
    """Label this many scenes of the simulator (two images each) instead of PHOTOS."""
    first_seed: Annotated[int, Range(0)] = 10_000
    """Seed of the first scene; the others follow it. Scenes below 10000 are held out for
    testing."""
    preset: Preset = "nano"
    """Model size whose cameras are used for scenes."""
    world: str = "default"
    """Surroundings of the scenes: default, colorful, varied or wild (other ones in every scene,
    from near the default ones to far from them), lab:N (laboratory number N), labs:K (the scenes
    are spread over K laboratories), colorful-lab:N or colorful-labs:K."""
    no_robot: bool = False
    """Leave the robot's arm out of the scenes."""
    suites: tuple[str, ...] = ()
    """LIBERO's suites whose tasks libero:SEED-SEED shows. Default: libero_spatial, libero_object,
    libero_goal and libero_10."""


class LabelOptions(Options):
    photos: Annotated[Positional[tuple[str, ...]], arg(metavar="[PHOTOS ...]")] = ()
    """What to label: images, folders, patterns, tar shards, Parquet files, videos, EgoExo4D takes,
    robot episodes, rgbd:FOLDER, sim:SEED-SEED, simpler:SEED-SEED or libero:SEED-SEED."""
    out: Path = Path("runs/labels")
    """Folder to write to."""
    scene: SceneOptions = SceneOptions()
    detector: str = "gemini"
    """gemini (its key in GEMINI_API_KEY), grounding-dino, owlv2, file:ANNOTATIONS.json or
    ground-truth. owlv2=HUB_NAME_OR_FOLDER is a model of your choice, and with file:A.json+gemini,
    Gemini does what the file lacks."""
    segmenter: str = "sam2"
    """sam2, file:ANNOTATIONS.json or ground-truth."""
    pointmap: str = "moge-2"
    """moge-2 (meters), moge (up to scale, as in the paper) or ground-truth."""
    vocabulary: str = ""
    """Names of objects to look for, separated by commas."""
    max_size: Annotated[int, Range(0)] = 840
    """Scale larger photos down to this many pixels on their longer side; 0 keeps their size. Frames
    of `rgbd:` and `sim:` keep theirs."""
    fps: Annotated[float, Range(0.001, 1000)] = 1.0
    """Frames per second of video."""
    frames_per_episode: Annotated[int, Range(1)] = 4
    """Frames of each robot episode."""
    cache: Annotated[OptionalFolder, RarelyUsed()] = None
    """Folder of Gemini's answers, which are paid for only once; default: OUT/.answers."""
    requests_per_minute: Annotated[int, Range(0)] = 0
    """Most requests to Gemini in a minute, by each detector; 0 leaves that to the service."""
    retry_skipped: bool = False
    """Make the files again in which images were skipped for a reason that may pass, such as no
    network."""
    dry_run: bool = False
    """Only print what labeling PHOTOS would cost in memory, time and Gemini's tokens."""
    questions: bool = False
    """Also write questions and answers, as spear questions does."""
    seed: Annotated[int, Range(0)] = 0
    """Decides which questions are asked."""
    device: Device = "auto"
    work: WorkOptions = WorkOptions()

    @property
    def vocabulary_names(self) -> tuple[str, ...]:
        """The vocabulary, name by name."""
        return tuple(name.strip() for name in self.vocabulary.split(",") if name.strip())


class QuestionOptions(Options):
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Folder that spear label has written."""
    seed: Annotated[int, Range(0)] = 0
    """The same seed gives the same questions."""
    questions_per_image: Annotated[tuple[int, int], Range(1)] = (1, 4)
    """Fewest and most questions per image."""
    question_types: Annotated[tuple[str, ...], arg(help=QUESTION_TYPES_HELP)] = ()
