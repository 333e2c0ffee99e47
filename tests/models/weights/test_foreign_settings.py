"""`compare_settings` reads the small files of a release, without running them, and compares."""

import json
import tomllib
from pathlib import Path

import pytest

from refusals import Command, refuses
from spear.models.presets import get_preset
from spear.models.weights import foreign_settings
from spear.models.weights.foreign_settings import COLUMNS, Comparison, compare_settings
from spear.types import FlowConfig

CONFIG = {
    "processor": {
        "max_text_tokens": 75,
        "resize_modes": {"main": "PAD"},
        "quaternionHalfCover": True,
        "translation_bounds": [[-0.12, -0.08, -0.1], [0.12, 0.08, 0.1]],
    }
}
CODE = """
raise SystemExit("this code must not run")

class RotationConfig:
    quat_order: str = "xyzw"

def make_control(control_horizon=5, *, dt=0.2, frame):
    pass
"""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with a config and code, as a release may have them."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "processing_spear.py").write_text(CODE)
    return tmp_path


def find(comparisons: list[Comparison], name: str) -> Comparison:
    """Return the first comparison of a setting."""
    return next(comparison for comparison in comparisons if comparison.setting.name == name)


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("prompt tokens", "75", "differs"),
        ("resize mode", '{"main": "PAD"}', "agrees"),
        ("quaternion half cover", "true", "agrees"),
        ("quaternion order", '"xyzw"', "differs"),
        ("actions per chunk", "5", "agrees"),
        ("control step", "0.2", "agrees"),
        ("translation bounds, m", "[[-0.12, -0.08, -0.1], [0.12, 0.08, 0.1]]", "compare"),
    ],
)
def test_a_value_is_found_and_compared(release: Path, name: str, value: str, verdict: str) -> None:
    comparison = find(compare_settings(release), name)

    assert comparison.foreign is not None
    assert comparison.foreign.value == value
    assert comparison.verdict == verdict


def test_the_place_of_a_value_is_named(release: Path) -> None:
    order = find(compare_settings(release), "quaternion order")

    assert (
        order.to_row()[COLUMNS.index("place")] == "processing_spear.py: RotationConfig.quat_order"
    )


def test_a_setting_that_no_file_has_is_not_found(release: Path) -> None:
    flow_steps = find(compare_settings(release), "flow steps")

    assert flow_steps.verdict == "not found"
    assert flow_steps.to_row()[COLUMNS.index("theirs")] == "–"


def test_our_values_are_those_of_the_full_size_preset() -> None:
    preset = get_preset("spear1")
    file = Path(foreign_settings.__file__).with_name("names_spear1_franka.toml")
    our_values = {
        setting["name"]: setting["our_value"]
        for setting in tomllib.loads(file.read_text())["settings"]
    }

    assert our_values["prompt tokens"] == str(preset.prompt_tokens)
    assert our_values["actions per chunk"] == str(preset.horizon)
    assert our_values["flow steps"] == str(FlowConfig(**preset.flow).steps)
    for view, (width, height) in preset.image_sizes.items():
        assert f"{view} {width} × {height}" in our_values["image size, px"]


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    refuses("has no file with settings", compare_settings, tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("processing_spear.py", "def ("),
        ("common.yaml", "a: &a [1, 2]\nb: [*a, *a]"),
        ("common.yaml", "a: ["),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    refuses(name, compare_settings, tmp_path)


def test_the_doctor_prints_the_comparison(release: Path, run_command: Command) -> None:
    output = run_command("doctor", "--checkpoint", str(release))

    assert (
        "| prompt tokens | 75 | config.json: processor.max_text_tokens | 64 | differs |" in output
    )
    assert output.splitlines()[-1].endswith("(unverified)")
