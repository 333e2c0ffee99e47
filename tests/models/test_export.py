"""The exported graphs act like the network. The SPEAR-1 here is tiny, with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models_tiny import TINY, make_spear1
from refusals import refuses
from spear.errors import SpearError
from spear.models import export
from spear.models.export import (
    MAX_DIFFERENCE,
    ExportedPolicy,
    export_policy,
    load_onnxruntime_graphs,
    load_openvino_graphs,
    make_example,
    measure_and_check_graph_difference,
    sample_by_graphs,
    sample_by_network,
    write_int8_graphs,
)
from spear.models.sampling import relative_difference

PROMPT_TOKENS = 8
NEEDED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_import(module: str, extra: str, feature: str) -> Any:
        raise SpearError(f"{feature} needs {module}: {extra}")

    monkeypatch.setattr(export, "import_optional", refuse_import)

    refuses("needs onnx", export_policy, make_spear1(), TINY.image_sizes, PROMPT_TOKENS, tmp_path)


def test_half_of_the_example_prompt_is_padding() -> None:
    """So the check of the graphs also checks that padding is not seen."""
    exported = ExportedPolicy(
        image_sizes=dict(TINY.image_sizes),
        prompt_tokens=PROMPT_TOKENS,
        num_visual_tokens=10,
        horizon=TINY.horizon,
        steps=2,
        flow={},
    )

    example = make_example(exported)

    assert example["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert example["noisy_actions"].shape == (1, TINY.horizon, 8)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_spear1()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported graphs."""
    for name in NEEDED_PACKAGES:
        pytest.importorskip(name, reason="needs the extra onnx")
    folder = tmp_path_factory.mktemp("onnx")
    export_policy(model, TINY.image_sizes, PROMPT_TOKENS, folder)
    return folder


@pytest.mark.slow
class TestGraphs:
    """The graphs, of which the export takes most of the time."""

    def test_onnxruntime_samples_the_networks_actions(self, model: Any, folder: Path) -> None:
        assert measure_and_check_graph_difference(model, folder) <= MAX_DIFFERENCE

    def test_openvino_samples_the_networks_actions(self, model: Any, folder: Path) -> None:
        pytest.importorskip("openvino", reason="needs the extra openvino")
        exported = ExportedPolicy.load(folder)
        inputs = make_example(exported, seed=2)

        actions = sample_by_graphs(load_openvino_graphs(folder), exported, inputs)

        expected = sample_by_network(model, exported, inputs)
        assert relative_difference(actions, expected) <= MAX_DIFFERENCE

    def test_the_number_of_flow_steps_is_free(self, model: Any, folder: Path) -> None:
        exported = ExportedPolicy.load(folder)
        inputs = make_example(exported, seed=2)
        graphs = load_onnxruntime_graphs(folder)

        actions = sample_by_graphs(graphs, exported, inputs, steps=3)

        assert not torch.equal(actions, sample_by_graphs(graphs, exported, inputs))

    def test_graphs_of_another_network_are_refused(self, folder: Path) -> None:
        refuses(
            "differ from the network",
            measure_and_check_graph_difference,
            make_spear1(seed=1),
            folder,
        )

    def test_8_bits_change_actions_little(self, model: Any, folder: Path) -> None:
        write_int8_graphs(folder)
        exported = ExportedPolicy.load(folder)
        inputs = make_example(exported, seed=2)

        actions = sample_by_graphs(load_onnxruntime_graphs(folder, "_int8"), exported, inputs)

        expected = sample_by_network(model, exported, inputs)
        assert torch.nn.functional.cosine_similarity(actions, expected, dim=-1).min() > 0.99

    def test_sizes_are_written_down(self, folder: Path) -> None:
        content = json.loads((folder / "export.json").read_text())

        assert content["image_sizes"] == {"external": [48, 32], "wrist": [32, 32]}
        assert content["num_visual_tokens"] == 3 * 2 + 2 * 2
