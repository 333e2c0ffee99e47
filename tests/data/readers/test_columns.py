"""Columns of raw pixels are read as images, and other arrays are refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tiny import edit_json, make_episode
from refusals import refuses
from spear.audit.describe import propose_layout
from spear.audit.inspect import describe_dataset
from spear.data.readers.columns import read_encoded_images
from spear.data.readers.formats import read_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.util.images import decode_image

NUM_STEPS = 6  # of an episode of `make_episode`


def make_pixels(num_channels: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Random pixels [6, height, width, num_channels] uint8; `size` is (height, width)."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (NUM_STEPS, *size, num_channels)).astype(np.uint8)


@pytest.mark.parametrize("num_channels", [3, 4])
def test_raw_pixels_are_images(num_channels: int) -> None:
    pixels = make_pixels(num_channels)

    images = read_encoded_images({"wrist": pixels}, "wrist", "set#0")

    decoded = np.stack([decode_image(image) for image in images])
    np.testing.assert_array_equal(decoded, pixels[..., :3])  # without transparency


@pytest.mark.parametrize(
    ("values", "description"),
    [
        (make_pixels(3).astype(np.float32), r"float32 of shape \[6, 32, 48, 3\]"),
        (make_pixels(1), r"uint8 of shape \[6, 32, 48, 1\]"),
        (make_pixels(3).transpose(0, 3, 1, 2), r"uint8 of shape \[6, 3, 32, 48\]"),
        (np.zeros((NUM_STEPS, 7)), r"float64 of shape \[6, 7\]"),
    ],
)
def test_other_arrays_are_described(values: np.ndarray, description: str) -> None:
    message = f"column 'wrist' of set#0 contains no images, but {description}.*uint8"

    refuses(message, read_encoded_images, {"wrist": values}, "wrist", "set#0")


@pytest.mark.parametrize("size", [(32, 48), (20, 16)])  # wide, tall
def test_raw_pixels_of_a_lerobot_dataset_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    """Reading, describing and inspecting all find a column of nested lists of pixels."""
    folder = tmp_path / "set"
    write_lerobot([make_episode(0)], folder)
    (file,) = folder.glob("data/*/*.parquet")
    pixels = make_pixels(3, size)
    cells = pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    pq.write_table(pq.read_table(file).append_column("observation.wrist_pixels", cells), file)
    # Without the names of the action's components, `describe` does not take the folder for one of
    # our own, whose columns it knows.
    edit_json(folder / "meta/info.json", lambda info: info["features"]["action"].update(names=None))
    edit_json(
        folder / "spear.json",
        lambda layout: layout.update(images={"wrist": "observation/wrist_pixels"}),
    )

    (episode,) = read_episodes(folder)
    proposed_images = propose_layout(folder)["images"]
    overview = describe_dataset(folder)

    height, width = size
    np.testing.assert_array_equal(decode_image(episode.images["wrist"][3]), pixels[3])
    assert "observation/wrist_pixels" in proposed_images.values()
    assert f"raw image, {width} x {height} pixels" in overview
