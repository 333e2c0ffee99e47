"""Listing and reading images in files: photos, folders, patterns, archives and videos.

Test images are gray. `make_png(value)` makes one of a given gray value as PNG.
"""

import bz2
import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tiny import make_png
from refusals import refuses
from spear.errors import Notice, RetryableError, SpearError
from spear.evaluate.vqa.ask import load_or_render_picture
from spear.labels.inputs import Item, hash_content, list_images
from spear.labels.pipeline import read_and_encode_images
from spear.types import Frame
from spear.util.images import IMAGE_SUFFIXES, decode_image

FILM_RATE_HZ = 10


def read_values(items: Sequence[Item]) -> list[int | str]:
    """The gray value of each item's image, or the error why it cannot be read."""
    values: list[int | str] = []
    for image in read_and_encode_images(items):
        if image.frame is None or image.error:
            values.append(str(image.error))
        else:
            values.append(round(float(image.frame.image.mean())))
    return values


def assert_near(values: Sequence[int | str], expected: Sequence[int]) -> None:
    """Assert that gray values are equal up to what the compression of a video changes."""
    for value, expected_value in zip(values, expected, strict=True):
        assert abs(int(value) - expected_value) <= 2


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_film(path: Path, num_frames: int = 40, aspect: Fraction = Fraction(1)) -> None:
    """Write a video of 10 frames per second whose frame i has the gray value 5 i.

    Args:
        path: The video.
        num_frames: How many frames it has.
        aspect: Width of its pixels divided by their height.
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FILM_RATE_HZ)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 7  # every seventh frame is a key frame, to which one can seek
        stream.bit_rate = 8_000_000
        stream.codec_context.sample_aspect_ratio = aspect
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 5 * i, np.uint8), format="rgb24"
            )
            frame.pts = i
            frame.time_base = Fraction(1, FILM_RATE_HZ)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# Photos


def test_a_photo_that_exif_turns_is_read_upright_from_any_container(tmp_path: Path) -> None:
    """The networks see it upright, and the labels store it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the photo's top is stored at the left
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :16] = 250  # bright at the top, dark below
    photo = tmp_path / "photo.jpg"
    Image.fromarray(lying).save(photo, quality=95, exif=exif)
    write_tar(tmp_path / "photos.tar", {"photo.jpg": photo.read_bytes()})
    pq.write_table(pa.table({"image": [photo.read_bytes()]}), tmp_path / "photos.parquet")

    images = read_and_encode_images(list(list_images(str(tmp_path))))

    assert len(images) == 3  # in the photo itself, the tar and the Parquet file
    upright_images = [load_or_render_picture(str(photo), size=(64, 32)).image]
    for image in images:
        upright_images += [image.frame.image, decode_image(image.encoded)]
    for upright in upright_images:
        assert upright.shape == (64, 32, 3)
        # The upper 16 of 64 rows are bright; JPEG blurs the rows at their border.
        assert upright[:12].min() > 200
        assert upright[20:].max() < 50


# Folders and patterns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four images, one hidden image and one text file."""
    gray_values = {"b/2.png": 20, "b/1.PNG": 10, "a.png": 5, "c.png": 30, ".hidden.png": 9}
    (tmp_path / "b").mkdir()
    for name, value in gray_values.items():
        (tmp_path / name).write_bytes(make_png(value))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def list_names(argument: Path | str, folder: Path, **options: Any) -> list[str]:
    """The names of the images behind an argument, as paths relative to the folder."""
    items = list_images(str(argument), **options)
    return [Path(item.key).relative_to(folder).as_posix() for item in items]


def test_a_folder_gives_its_images_in_order(folder: Path) -> None:
    items = list(list_images(str(folder)))

    assert list_names(folder, folder) == ["a.png", "b/1.PNG", "b/2.png", "c.png"]
    assert read_values(items) == [5, 10, 20, 30]


def test_items_can_be_pickled(folder: Path) -> None:
    items = list(list_images(str(folder)))

    assert pickle.loads(pickle.dumps(items)) == items


def test_an_image_is_listed_by_its_path(folder: Path) -> None:
    assert list_names(folder / "a.png", folder) == ["a.png"]


def test_a_pattern_gives_the_images_that_it_matches(folder: Path) -> None:
    assert list_names(f"{folder}/**/*.png", folder) == ["a.png", "b/2.png", "c.png"]


def test_a_pattern_that_matches_a_folder_and_its_files_gives_each_once(folder: Path) -> None:
    assert list_names(f"{folder}/**", folder) == list_names(folder, folder)


@pytest.mark.parametrize("pattern", ["", "/**"])  # the folder itself, and all that it contains
def test_an_excluded_folder_is_not_entered(folder: Path, pattern: str) -> None:
    names = list_names(f"{folder}{pattern}", folder, excluded_folder=folder / "b")

    assert names == ["a.png", "c.png"]


def test_a_link_to_a_folder_that_contains_it_is_not_followed(folder: Path) -> None:
    names_without_link = list_names(folder, folder)

    (folder / "b" / "back").symlink_to(folder)

    assert list_names(folder, folder) == names_without_link


def test_a_folder_of_labels_is_ignored_with_a_notice(folder: Path) -> None:
    names_of_images = list_names(folder, folder)
    (folder / "b" / "old").mkdir()
    for name in ("run.json", "labels-00000.parquet"):
        (folder / "b" / "old" / name).touch()

    with pytest.warns(Notice, match="b/old contains labels"):
        assert list_names(folder, folder) == names_of_images


def test_files_of_unsupported_formats_are_counted_in_a_notice(folder: Path) -> None:
    names_of_images = list_names(folder, folder)
    for name in ("IMG_1.HEIC", "IMG_2.CR2", "film.MTS"):
        (folder / "b" / name).touch()

    with pytest.warns(Notice, match=r"1 \.cr2, 1 \.heic, 1 \.mts"):
        assert list_names(folder, folder) == names_of_images


def test_a_stereo_picture_is_listed(folder: Path) -> None:
    (folder / "z.MPO").touch()  # contains a JPEG for each eye, of which the first one is read

    assert list_names(folder, folder)[-1] == "z.MPO"


NEEDS_AVIF = pytest.mark.skipif(".avif" not in IMAGE_SUFFIXES, reason="Pillow reads no AVIF")


@NEEDS_AVIF
@pytest.mark.parametrize("name", ["photo.avif", "PHOTO.AVIF"])
def test_avif_is_read_by_name_and_in_a_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.new("RGB", (64, 48), (90, 90, 90)).save(path, format="AVIF")

    assert_near(read_values(list(list_images(str(path)))), [90])
    assert list_names(tmp_path, tmp_path) == [name]


@NEEDS_AVIF
def test_avif_is_read_in_a_tar_shard(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 90, 90)).save(encoded, format="AVIF")
    write_tar(tmp_path / "shard.tar", {"0.avif": encoded.getvalue()})

    assert_near(read_values(list(list_images(str(tmp_path / "shard.tar")))), [90])


@pytest.mark.parametrize(
    ("name", "image_format"), [("a.gif", "GIF"), ("a.tga", "TGA"), ("photo", "PNG")]
)
def test_an_image_named_by_itself_is_read_whatever_its_suffix(
    tmp_path: Path, name: str, image_format: str
) -> None:
    path = tmp_path / name
    Image.new("RGB", (64, 48), (90, 90, 90)).save(path, format=image_format)

    assert_near(read_values(list(list_images(str(path)))), [90])
    assert round(float(load_or_render_picture(str(path), size=(64, 48)).image.mean())) == 90


@pytest.mark.parametrize("name", ["notes.txt", "a.heic"])
def test_what_is_no_image_is_refused_though_it_is_named_by_itself(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("no image")

    refuses("contains no images", lambda: list(list_images(str(tmp_path / name))))


# Archives


def test_a_tar_shard_gives_its_images(tmp_path: Path) -> None:
    truncated_image = make_png(50)[:60]
    files = {"x/0.png": make_png(40), "x/0.json": b"{}", "x/1.jpg": truncated_image}
    write_tar(tmp_path / "shard.tar", files)

    items = list(list_images(str(tmp_path)))

    names = [item.key.removeprefix(f"{tmp_path}/") for item in items]
    assert names == ["shard.tar/x/0.png", "shard.tar/x/1.jpg"]
    value, reason = read_values(items)
    assert value == 40
    assert "not a readable image" in str(reason)


def test_a_parquet_file_gives_its_images_in_any_order(tmp_path: Path) -> None:
    """The last of six rows has no image; a row group has two rows."""
    rows = [{"bytes": make_png(60 + i), "path": None} for i in range(5)] + [None]
    table = pa.table({"image": rows, "label": list(range(6))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)

    items = list(list_images(str(tmp_path)))

    assert [item.key for item in items] == [f"{tmp_path}/t.parquet#{i}" for i in range(6)]
    *values, reason = read_values(items)
    assert values == [60, 61, 62, 63, 64]
    assert "no image" in str(reason)
    assert read_values([items[4], items[1]]) == [64, 61]


def test_the_only_column_of_bytes_is_that_of_the_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [make_png(80)], "n": [1]}), tmp_path / "u.parquet")

    assert read_values(list(list_images(str(tmp_path)))) == [80]


# Videos


def test_a_video_gives_frames_at_a_rate(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4")  # 40 frames, 10 per second

    items = list(list_images(str(tmp_path / "film.mp4"), rate=2.5))  # every fourth frame

    assert [item.key.rpartition("#")[2] for item in items] == [str(4 * n) for n in range(10)]
    assert_near(read_values(items), [20 * n for n in range(10)])
    assert_near(read_values([items[7]]), [20 * 7])  # one frame alone, after a seek


def test_a_rate_above_that_of_the_video_gives_every_frame_once(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4")

    items = list(list_images(str(tmp_path / "film.mp4"), rate=1000))

    assert len(items) == 40
    assert_near(read_values(items[30:]), [5 * n for n in range(30, 40)])


def test_a_time_after_the_end_of_a_video_is_refused(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4")
    items = list(list_images(str(tmp_path / "film.mp4")))

    item_after_end = items[0]._replace(location=99.0)  # the location in a video is a time in s
    _, reason = read_values([items[-1], item_after_end])

    assert "ends before 99.00 s" in str(reason)


def write_recording(path: Path, times_ms: Sequence[int], end_ms: int, sound_ms: int = 0) -> None:
    """Write a video of variable frame rate whose frame i has the gray value 20 i.

    Args:
        path: The video.
        times_ms: When each frame is shown.
        end_ms: When the last frame ends.
        sound_ms: How long the sound lasts; 0 for a video without sound.
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.max_b_frames = 0
        sound = container.add_stream("aac", rate=16000, layout="mono") if sound_ms else None
        packets = []
        for i, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24"
            )
            frame.pts = time_ms
            frame.time_base = Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        ends_ms = [*times_ms[1:], end_ms]
        for packet, packet_end_ms in zip(packets, ends_ms, strict=True):
            packet.duration = packet_end_ms - packet.pts
            container.mux(packet)
        if sound is not None:
            write_silence(container, sound, sound_ms)


def write_silence(container: Any, stream: Any, duration_ms: int) -> None:
    """Write silence, 16 samples per millisecond in frames of 1024 samples."""
    av = pytest.importorskip("av")
    samples = np.zeros((1, 1024), np.float32)
    for first in range(0, 16 * duration_ms, 1024):
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = first
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("times_ms", "end_ms"),
    [
        ([0, 100, 200, 300], 6000),  # the last frame is shown for 5.7 s
        ([0, 50, 1000, 1030, 2500], 9000),  # the last frame is shown for 6.5 s
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_of_a_screen_recording_is_shown_until_its_end(
    tmp_path: Path, suffix: str, times_ms: list[int], end_ms: int
) -> None:
    write_recording(tmp_path / f"screen.{suffix}", times_ms, end_ms)

    values = read_values(list(list_images(str(tmp_path / f"screen.{suffix}"), rate=1.0)))

    last_value = 20 * (len(times_ms) - 1)
    assert_near(values[-3:], [last_value] * 3)  # the last three seconds


@pytest.mark.parametrize(("end_ms", "sound_ms"), [(2000, 8000), (3000, 4500)])
def test_sound_that_lasts_longer_does_not_add_frames(
    tmp_path: Path, end_ms: int, sound_ms: int
) -> None:
    times_ms = list(range(0, end_ms, 250))  # four frames per second
    write_recording(tmp_path / "film.mkv", times_ms, end_ms, sound_ms)

    values = read_values(list(list_images(str(tmp_path / "film.mkv"), rate=1.0)))

    # At 1 Hz every fourth frame is read, and frame i has the gray value 20 i.
    assert_near(values, [20 * index for index in range(0, len(times_ms), 4)])


def test_a_video_with_wide_pixels_is_stretched(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", num_frames=2, aspect=Fraction(4, 3))

    (image,) = read_and_encode_images(list(list_images(str(tmp_path / "film.mp4"))))

    assert image.frame is not None
    assert image.frame.image.shape == (48, 85, 3)  # 64 · 4 / 3 columns


def test_frames_of_a_real_video_are_those_that_a_full_decoding_gives(shared: Path) -> None:
    av = pytest.importorskip("av")
    path = next((shared / "data/lerobot/v2.1_video").rglob("*.mp4"))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    items = list(list_images(str(path), rate=1000))

    assert len(items) == len(frames)
    indices = [2, 3, 5, len(frames) - 1]
    images = read_and_encode_images([items[index] for index in indices])
    for image, index in zip(images, indices, strict=True):
        np.testing.assert_array_equal(image.frame.image, frames[index])


@pytest.fixture
def take(tmp_path: Path) -> Path:
    """An EgoExo4D take that has only the smaller copies of its videos, of one second each.

    aria01_1201-1, aria01_1201-2 and aria01_211-1 are not color cameras.
    """
    take = tmp_path / "takes" / "cooking_7"
    copies = take / "frame_aligned_videos" / "downscaled" / "448"
    copies.mkdir(parents=True)
    for camera in ("cam01", "aria01_214-1", "aria01_1201-1", "aria01_1201-2", "aria01_211-1"):
        write_film(copies / f"{camera}.mp4", num_frames=10)
    return take


def test_a_take_gives_the_copies_of_its_color_cameras(take: Path) -> None:
    names = {Path(item.path).name for item in list_images(str(take.parent))}

    assert names == {"cam01.mp4", "aria01_214-1.mp4"}


def test_a_take_gives_its_full_videos_rather_than_the_copies(take: Path) -> None:
    video = take / "frame_aligned_videos" / "cam02.mp4"
    write_film(video, num_frames=30)

    keys = [item.key for item in list_images(str(take.parent))]

    assert keys == [f"{video}#{n}" for n in (0, 10, 20)]  # one frame per second, the default


# Images that cannot be read


def test_an_image_that_cannot_be_read_is_skipped_alone_with_its_reason(tmp_path: Path) -> None:
    files = {"good": make_png(7), "tiny": make_png(7, 1, 1), "zero": b""}  # in order of their names
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    items = list(list_images(str(tmp_path)))
    # An item whose file was removed after it was listed
    removed = items[0]._replace(key="gone.png", path=str(tmp_path / "gone.png"))

    value, tiny_reason, zero_reason, removed_reason = read_values([*items, removed])

    assert value == 7
    assert "1×1 pixels" in str(tiny_reason)
    assert "not a readable" in str(zero_reason)
    assert "No such file" in str(removed_reason)


def test_only_a_file_that_cannot_be_opened_may_be_retried(tmp_path: Path) -> None:
    (tmp_path / "zero.png").write_bytes(b"")
    (item,) = list_images(str(tmp_path))
    removed = item._replace(key="gone.png", path=str(tmp_path / "gone.png"))

    images = read_and_encode_images([item, removed])

    assert [type(image.error) for image in images] == [SpearError, RetryableError]


@pytest.mark.parametrize(
    ("name", "part_of_message"),
    [
        ("absent", "does not exist"),
        ("empty", "no image"),  # an empty folder
        ("*.jpg", "pattern"),  # matches no file
        ("notes.txt", ".jpg"),  # the message lists the suffixes of images
        ("cut.tar", "tar"),
        ("bad.parquet", "Parquet"),
        ("words.parquet", "`image`"),  # without a column of bytes
        ("two.parquet", "(a, b)"),  # with two columns of bytes, a and b
        ("bad.mp4", "video"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, part_of_message: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("notes.txt", "bad.parquet", "bad.mp4"):
        (tmp_path / file).write_text("words")
    # A tar of two files, each with a header of 512 bytes and padded to 5120 bytes, is cut off after
    # the second header has begun.
    write_tar(tmp_path / "whole.tar", dict.fromkeys(("0.png", "1.png"), bytes(5000)))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:5700])
    pq.write_table(pa.table({"x": ["y"]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"a": [b"y"], "b": [b"y"]}), tmp_path / "two.parquet")

    message = refuses("", list, list_images(str(tmp_path / name)))

    assert part_of_message in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda data: data[:5700], "interrupted. Repeat it"),  # ends within the second header
        (gzip.compress, "compressed, so unpack it"),
        (bz2.compress, "compressed, so unpack it"),
    ],
)
def test_each_kind_of_broken_tar_has_its_cure(
    tmp_path: Path, change: Callable[[bytes], bytes], cure: str
) -> None:
    write_tar(tmp_path / "whole.tar", dict.fromkeys(("0.png", "1.png"), bytes(5000)))
    (tmp_path / "bad.tar").write_bytes(change((tmp_path / "whole.tar").read_bytes()))

    refuses(cure, list, list_images(str(tmp_path / "bad.tar")))


def test_hashes_of_frames_are_those_of_older_versions() -> None:
    """Labels keep hashes of pickled frames, so the pickle must have the old names of fields.

    Otherwise folders that older versions labeled could not be continued.
    """
    frame = Frame("pixels", source="sim/clutter/0/external", is_turned=True)

    assert hash_content(frame) == "99a539aff3883232"
    assert pickle.loads(pickle.dumps(frame)).is_turned
