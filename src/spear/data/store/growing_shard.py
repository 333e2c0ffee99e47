"""A shard of one episode that is being recorded, and that can be read at any time.

The images of each step are appended to the images' file as they arrive. The Arrow file is written
anew from time to time (`save`), and replaces the earlier one. So the shard always has the steps up
to the last `save`, whatever ends the recording program: later images are in the images' file, but
nothing refers to them.

The files can be read by their owner only.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spear.data.store.shard import (
    GROWING_NOTE,
    SERVED_PREFIX,
    flush_to_disk,
    make_columns,
    to_list_column,
    write_table,
)
from spear.types import Array, Episode

PRIVATE_FILE_MODE = 0o600  # its owner may read and write a file, and nobody else may


class GrowingShard:
    """The two files of an episode that grows.

    Args:
        path: The Arrow file. The file of images, which must not exist yet, gets the same name with
            the suffix ".images".

    Attributes:
        num_table_bytes: The size of the Arrow file when it was last saved.
        num_image_bytes: The size of the file of images.

    Raises:
        OSError: The file of images exists, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_table_bytes = 0
        self.num_image_bytes = 0
        self._images_path = path.with_suffix(".images")
        self._image_places: dict[str, list[tuple[int, int]]] = {}  # camera -> (first byte, length)
        # Create the file empty; `O_EXCL` makes this fail if it exists.
        os.close(os.open(self._images_path, os.O_CREAT | os.O_EXCL, PRIVATE_FILE_MODE))

    def append_images(self, images: Mapping[str, bytes]) -> None:
        """Append the encoded images of the next step, of the same cameras at every step."""
        # A file that is open all the time would cost a file handle for each connected robot.
        with open(self._images_path, "ab") as file:
            for camera, image in images.items():
                camera_places = self._image_places.setdefault(camera, [])
                camera_places.append((self.num_image_bytes, len(image)))
                self.num_image_bytes += len(image)
                file.write(image)

    def save(
        self,
        episode: Episode,
        served_columns: Mapping[str, Array],
        note: Mapping[str, str],
        is_complete: bool,
    ) -> None:
        """Write all steps up to now, so that they are on the disk and can be read.

        Args:
            episode: The episode with canonical actions. Its images are those that were appended.
            served_columns: Column of `ServedSteps` → [T, …] its values.
            note: Key → text, to be kept with the shard.
            is_complete: Whether the episode has ended.

        Raises:
            OSError: A file cannot be written. What was saved before stays readable.
        """
        image_places: dict[str, Array] = {}  # camera -> [T, 2]
        for camera, camera_places in self._image_places.items():
            image_places[camera] = np.array(camera_places)
        columns = make_columns([episode], image_places)
        offsets = np.array([0, len(episode)])
        for field, values in served_columns.items():
            columns[SERVED_PREFIX + field] = to_list_column(offsets, values)
        metadata = {"bytes": str(self.num_image_bytes), **note}
        if not is_complete:
            metadata[GROWING_NOTE] = "yes"

        with open(self._images_path, "ab") as file:
            flush_to_disk(file)  # before the table that refers to the images
        temporary = self.path.with_name(f".{self.path.name}")
        with open(temporary, "wb", opener=_open_private) as file:
            write_table(file, columns, metadata)
            self.num_table_bytes = file.tell()
        os.replace(temporary, self.path)


def _open_private(path: str, flags: int) -> int:
    """Open a file that only its owner can read, for the argument `opener` of `open`."""
    return os.open(path, flags, PRIVATE_FILE_MODE)
