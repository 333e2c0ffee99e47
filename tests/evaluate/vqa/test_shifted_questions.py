"""3D questions about shifted scenes: the same scenes, with only the shift's axis changed."""

import json
from pathlib import Path

import numpy as np
import pytest

from refusals import Command
from spear.errors import SpearError
from spear.evaluate.vqa.ask import load_or_render_labeled_images, render_held_out_frames
from spear.evaluate.vqa.shift_suite import parse_picture_shift
from spear.policy import load_vlm
from spear.sim.shifts import Shift
from spear.types import Frame, LabeledImage
from spear.util.images import decode_image

SIZE = (96, 72)
FIRST_SEED = 7
ASK = (
    "evaluate", "vqa", "--model", "nano-vlm", "--labels", "sim", "--num-images", "1",
    "--question-types", "distance",
)  # fmt: skip


def render(shift: Shift | None) -> Frame:
    (frame,) = render_held_out_frames(1, FIRST_SEED, SIZE, shift=shift)
    return frame


def test_a_moved_camera_sees_the_same_objects_from_elsewhere() -> None:
    usual = render(None)
    shifted = render(Shift("camera", 3))

    assert usual.extrinsics is not None
    assert shifted.extrinsics is not None
    assert not np.allclose(usual.extrinsics, shifted.extrinsics)
    assert set(usual.names.values()) == set(shifted.names.values())


def test_another_background_changes_colors_and_no_distances() -> None:
    usual = render(None)
    shifted = render(Shift("background", 2))

    assert np.array_equal(usual.depth, shifted.depth)
    assert not np.array_equal(usual.image, shifted.image)


def test_noise_changes_the_image_and_no_truth() -> None:
    usual = render(None)
    noisy = render(Shift("noise", 2))

    assert np.array_equal(usual.depth, noisy.depth)
    assert np.array_equal(usual.instances, noisy.instances)
    assert not np.array_equal(usual.image, noisy.image)


def test_a_shifted_scene_is_the_same_every_time() -> None:
    assert np.array_equal(render(Shift("noise", 3)).image, render(Shift("noise", 3)).image)


def list_names(label: LabeledImage) -> list[str]:
    return [labeled_object.name for labeled_object in label.objects]


def test_labels_of_a_shifted_scene_show_the_shift() -> None:
    processor = load_vlm("nano-vlm").processor

    def load(shift: Shift | None) -> LabeledImage:
        (label,) = load_or_render_labeled_images("sim:7", 1, "external", processor, shift)
        return label

    usual = load(None)
    shifted = load(Shift("background", 3))

    assert list_names(usual) == list_names(shifted)
    assert not np.array_equal(decode_image(usual.image), decode_image(shifted.image))


def test_questions_have_no_instruction_that_could_shift() -> None:
    with pytest.raises(SpearError, match="there is none in 3D questions"):
        parse_picture_shift("language:1")


def test_scores_of_one_shift_are_not_replaced_by_those_of_another(
    tmp_path: Path, run_command: Command, run_refused_command: Command
) -> None:
    run_command(ASK, "--shift", "light", "--out", str(tmp_path))

    assert json.loads((tmp_path / "scores.json").read_text())["--shift"] == "light:2"
    message = run_refused_command(ASK, "--shift", "light:3", "--out", str(tmp_path))
    assert '--shift is "light:2" there, "light:3" here' in message


@pytest.mark.slow  # asks nineteen times
def test_all_shifts_make_one_table_and_one_page_and_are_not_asked_again(
    tmp_path: Path, run_command: Command
) -> None:
    output = run_command(ASK, "--shift", "all", "--out", str(tmp_path))
    written = (tmp_path / "noise-3" / "scores.json").stat().st_mtime_ns
    second_output = run_command(ASK, "--shift", "all", "--out", str(tmp_path))

    assert "median error" in output
    assert "shift camera:3" in output
    assert "Distance: median error" in (tmp_path / "shifts.html").read_text()
    assert "shift camera:3" not in second_output  # the line that is printed before it is asked
    assert (tmp_path / "noise-3" / "scores.json").stat().st_mtime_ns == written
