"""`RecordedEpisode`: the numbers and small pictures of one episode, which checks look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from spear.types import Array, WidthAndHeight

MIN_PICTURE_EPISODES = 8  # training episodes with a camera; with fewer it is not compared
CELL_PX = 2  # side of the cells over which small pictures are averaged


@dataclass(frozen=True)
class CameraPictures:
    """The T pictures of one camera in one episode.

    small        [T, h, w, 3] uint8, reduced to `pictures.PICTURE_WIDTH_PX` columns, fitted as the
                 policy fits them.
    fingerprint  [T] a number that is the same for the very same encoded picture.
    size         (width, height) in pixels, as recorded.
    """

    small: Array
    fingerprint: Array
    size: WidthAndHeight


def average_cells(pictures: Array) -> Array:
    """Average pictures [N, h, w] or [N, h, w, 3] over cells of `CELL_PX` pixels."""
    num, height, width, *channels = pictures.shape
    rows = height // CELL_PX
    columns = width // CELL_PX
    cut = pictures[:, : rows * CELL_PX, : columns * CELL_PX]
    return cut.reshape(num, rows, CELL_PX, columns, CELL_PX, *channels).mean((2, 4))


@dataclass(frozen=True)
class ServedTimes:
    """Times and answers of the T steps of an episode that a server recorded.

    arrival_s  [T] when each observation arrived, Unix time.
    answer_s   [T] when its answer was ready, Unix time.
    chunks     [T, H, 8] the answers.
    """

    arrival_s: Array
    answer_s: Array
    chunks: Array


@dataclass(frozen=True)
class RecordedEpisode:
    """The numbers and small pictures of one episode of T steps.

    source       names the episode in messages.
    instruction  what the robot was asked to do.
    rate_hz      steps per second.
    position     [T, 3] end-effector position, base frame, m.
    rotation     [T, 4] end-effector orientation, base frame.
    opening      [T] measured gripper opening, 0 closed … 1 open.
    action       [T, 8] the command of each step.
    is_known     [T] bool, whether each step's action is known.
    pictures     camera → its pictures.
    served       times and answers, if a server recorded the episode.
    """

    source: str
    instruction: str
    rate_hz: float
    position: Array
    rotation: Array
    opening: Array
    action: Array
    is_known: Array
    pictures: Mapping[str, CameraPictures] = field(default_factory=dict)
    served: ServedTimes | None = None

    def __len__(self) -> int:
        return len(self.position)
