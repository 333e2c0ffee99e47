"""Every kind of input is listed without reading it, under keys that stay the same, and read item by item."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tiny import make_png
from refusals import refuses
from spear.errors import Notice, RetryableError, SpearError
from spear.evaluate.vqa.ask import load_picture
from spear.labels.inputs import Item, list_images
from spear.labels.pipeline import read_images
from spear.util.images import decode_image


def grey(items: Sequence[Item], **options: int) -> list[int | str]:
    """The grey value of each item's image, or why there is none."""
    return [
        str(work.error)
        if work.frame is None or work.error
        else round(float(work.frame.image.mean()))
        for work in read_images(items, **options)
    ]


def tarred(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def film(
    path: Path, frames: int = 40, fps: int = 10, gop: int = 7, aspect: Fraction = Fraction(1)
) -> None:
    """A video whose frame i is grey of value 5 i, of pixels so many times as wide as high."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        stream.bit_rate, stream.codec_context.sample_aspect_ratio = 8_000_000, aspect
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 5 * i, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_photo_of_a_phone_held_upright_stands_whatever_it_is_in(tmp_path: Path) -> None:
    """In what the networks see, and in what is kept of it for people and for training."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: the top is at the left
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :16] = 250
    Image.fromarray(lying).save(file := tmp_path / "photo.jpg", quality=95, exif=exif)
    tarred(tmp_path / "photos.tar", {"photo.jpg": file.read_bytes()})
    pq.write_table(pa.table({"image": [file.read_bytes()]}), tmp_path / "photos.parquet")
    works = read_images(list(list_images(str(tmp_path))))
    seen = [work.frame.image for work in works if work.frame] + [
        decode_image(w.encoded) for w in works
    ]
    for image in [*seen, load_picture(str(file), (64, 32)).image]:
        assert image.shape == (64, 32, 3) and image[:12].min() > 200 and image[20:].max() < 50
    assert len(seen) == 6


def test_a_folder_is_walked_in_order_and_passes_over_what_is_no_image(tmp_path: Path) -> None:
    for name, value in (
        ("b/2.png", 20),
        ("b/1.PNG", 10),
        ("a.png", 5),
        ("c.png", 30),
        (".hidden.png", 9),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_png(value))
    (tmp_path / "notes.txt").write_text("no image")
    items = list(list_images(str(tmp_path)))
    names = [Path(i.key).relative_to(tmp_path).as_posix() for i in items]
    assert names == ["a.png", "b/1.PNG", "b/2.png", "c.png"]
    assert grey(items) == [5, 10, 20, 30] and pickle.loads(pickle.dumps(items)) == items
    assert [Path(i.key).name for i in list_images(f"{tmp_path}/**/*.png")] == [
        "a.png",
        "2.png",
        "c.png",
    ]
    assert [i.key for i in list_images(str(tmp_path / "a.png"))] == [str(tmp_path / "a.png")]
    assert list(list_images(str(tmp_path), excluded_folder=tmp_path / "b")) == [items[0], items[-1]]
    assert (
        list(list_images(f"{tmp_path}/**")) == items
    )  # the pattern names a folder and each file in it
    assert [i.key for i in list_images(f"{tmp_path}/**", excluded_folder=tmp_path / "b")] == [
        items[0].key,
        items[-1].key,
    ]
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "b" / "old").mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.CR2", "film.MTS", "old/run.json", "old/labels-00000.parquet"):
        (tmp_path / "b" / name).touch()
    aside = pytest.warns(Notice, match=r"1 \.cr2, 1 \.heic, 1 \.mts")
    with aside, pytest.warns(Notice, match="b/old contains labels"):
        assert list(list_images(str(tmp_path))) == items
    (tmp_path / "z.MPO").touch()  # a JPEG for each eye, the first of which is read
    with pytest.warns(Notice):
        assert [i.key for i in list_images(str(tmp_path))][-1] == str(tmp_path / "z.MPO")


def test_a_tar_shard_and_a_parquet_file_give_their_images(tmp_path: Path) -> None:
    tarred(
        tmp_path / "shard.tar",
        {"x/0.png": make_png(40), "x/0.json": b"{}", "x/1.jpg": make_png(50)[:60]},
    )
    rows = [{"bytes": make_png(60 + i), "path": None} for i in range(5)] + [None]
    table = pa.table({"image": rows, "label": list(range(6))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    pq.write_table(pa.table({"jpg": [make_png(80)], "n": [1]}), tmp_path / "u.parquet")
    items = list(list_images(str(tmp_path)))
    assert [i.key.removeprefix(f"{tmp_path}/") for i in items] == [
        "shard.tar/x/0.png", "shard.tar/x/1.jpg", *(f"t.parquet#{i}" for i in range(6)), "u.parquet#0"
    ]  # fmt: skip
    first, broken, *others = grey(items)
    assert first == 40 and "not a readable image" in str(broken)
    assert others[:5] == [60, 61, 62, 63, 64] and "no image" in str(others[5]) and others[6] == 80
    assert grey([items[6], items[3]]) == [64, 61]  # any item, in any order


def test_a_video_gives_frames_at_a_rate(tmp_path: Path) -> None:
    film(tmp_path / "film.mp4")
    items = list(list_images(str(tmp_path / "film.mp4"), rate=2.5))
    assert [i.key.rpartition("#")[2] for i in items] == [str(4 * n) for n in range(10)]
    assert np.abs(np.array([int(v) for v in grey(items)]) - 20 * np.arange(10)).max() <= 2
    assert abs(int(grey([items[7]])[0]) - 140) <= 2  # alone, after a seek
    every = list(list_images(str(tmp_path / "film.mp4"), rate=1000))
    assert len(every) == 40
    assert np.abs(np.array([int(v) for v in grey(every[30:])]) - 5 * np.arange(30, 40)).max() <= 2
    assert "ends before 99.00 s" in str(grey([items[9], items[0]._replace(location=99.0)])[1])


def test_a_video_of_pixels_that_are_not_square_is_seen_as_it_is_shown(tmp_path: Path) -> None:
    film(tmp_path / "film.mp4", frames=2, aspect=Fraction(4, 3))
    (work,) = read_images(list(list_images(str(tmp_path / "film.mp4"))))
    assert work.frame is not None and work.frame.image.shape == (48, 85, 3)


def test_frames_of_a_real_video_are_those_that_a_full_decoding_gives(shared: Path) -> None:
    av = pytest.importorskip("av")
    path = next((shared / "data/lerobot/v2.1_video").rglob("*.mp4"))
    with av.open(str(path)) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    items = list(list_images(str(path), rate=1000))
    assert len(items) == len(truth)
    chosen = [2, 3, 5, len(truth) - 1]
    for work, index in zip(read_images([items[i] for i in chosen]), chosen, strict=True):
        np.testing.assert_array_equal(work.frame.image, truth[index])


def test_a_take_gives_its_colour_cameras_once(tmp_path: Path) -> None:
    take = tmp_path / "takes" / "cooking_7"
    small = take / "frame_aligned_videos" / "downscaled" / "448"
    small.mkdir(parents=True)
    names = (
        "cam01.mp4",
        "aria01_214-1.mp4",
        "aria01_1201-1.mp4",
        "aria01_1201-2.mp4",
        "aria01_211-1.mp4",
    )
    for name in names:
        film(small / name, frames=10)
    assert {Path(i.path).name for i in list_images(str(tmp_path / "takes"))} == {
        "cam01.mp4",
        "aria01_214-1.mp4",
    }
    film(take / "frame_aligned_videos" / "cam02.mp4", frames=30)
    keys = [i.key for i in list_images(str(tmp_path))]
    assert keys == [str(take / "frame_aligned_videos" / f"cam02.mp4#{n}") for n in (0, 10, 20)]


def test_what_cannot_be_read_is_set_aside_alone(tmp_path: Path) -> None:
    for name, data in {"good": make_png(7), "tiny": make_png(7, 1, 1), "zero": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    items = list(list_images(str(tmp_path)))
    gone = items[0]._replace(key="gone.png", path=str(tmp_path / "gone.png"))
    kinds = [type(work.error) for work in read_images([*items, gone])]
    assert kinds == [type(None), SpearError, SpearError, RetryableError]
    good, tiny, zero, missing = grey([*items, gone])
    assert good == 7
    assert (
        "1×1 pixels" in str(tiny)
        and "not a readable" in str(zero)
        and "No such file" in str(missing)
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("absent", "does not exist"),
        ("empty", "no image"),
        ("*.jpg", "pattern"),
        ("notes.txt", ".jpg"),
        ("cut.tar", "tar"),
        ("bad.parquet", "Parquet"),
        ("words.parquet", "`image`"),
        ("two.parquet", "(a, b)"),
        ("bad.mp4", "video"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("notes.txt", "bad.parquet", "bad.mp4"):
        (tmp_path / file).write_text("words")
    tarred(tmp_path / "whole.tar", dict.fromkeys(("0.png", "1.png"), bytes(5000)))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:5700])
    pq.write_table(pa.table({"x": ["y"]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"a": [b"y"], "b": [b"y"]}), tmp_path / "two.parquet")
    said = refuses("", list, list_images(str(tmp_path / name)))
    assert hint in said and str(tmp_path) in said
