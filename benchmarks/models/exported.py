"""Acting by the exported graphs: onnxruntime and OpenVINO beside our own inference, on a CPU.

    python benchmarks/models/exported.py --processor-time
    python benchmarks/models/exported.py --preset small --repeats 3

Needs the extras onnx and openvino. Exports a SPEAR-1 (nano with the weights that come with the
package, others with random weights) into a temporary folder, and samples the actions of one random
observation. "ours" is `sample_actions` in float32 on the same padded prompt, "int8" the graphs of
`write_int8_graphs`. The difference is `relative_difference` from ours, the cosine that of all
actions in the model's units. Times are medians (least–most).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spear.cli import run_reporting_errors
from spear.doctor import list_machine_facts
from spear.models.export import (
    ExportedPolicy,
    export_policy,
    load_onnxruntime_graphs,
    load_openvino_graphs,
    make_example,
    sample_by_graphs,
    sample_by_network,
    write_int8_graphs,
)
from spear.models.presets import build_spear1_config, get_preset
from spear.models.sampling import relative_difference
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.models.weights.load import load
from timing import format_header, format_ratio, format_row, race

COLUMNS = ["contender", "difference", "cosine", "ms", "ours ÷ contender"]


@dataclass(frozen=True)
class Options:
    """What is compared."""

    preset: Literal["nano", "small", "spear1"] = "nano"
    exported: Path | None = None
    """Folder of `spear export onnx --policy nano --int8`, instead of exporting nano now."""
    repeats: int = 5
    threads: int = 1
    processor_time: bool = False
    """Measure the processor time of all threads, which other work on the machine changes less."""


def make_model(preset: str) -> Any:
    """Return the shipped nano, or a model with random weights."""
    if preset == "nano":
        return load(Spear1ForActionPrediction, BUNDLED_WEIGHTS / "nano", torch.float32)
    torch.manual_seed(0)
    return Spear1ForActionPrediction(build_spear1_config(get_preset(preset))).eval()


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    size = get_preset(options.preset)
    for name, description in list_machine_facts(size, torch.device("cpu"))[:2]:
        print(f"{name}: {description}")
    model = make_model(options.preset)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.exported or Path(scratch)
        if options.exported is None:
            export_policy(model, size.image_sizes, size.prompt_tokens, folder)
            write_int8_graphs(folder)
        compare(options, model, folder)


def compare(options: Options, model: Any, folder: Path) -> None:
    """Print how near the graphs in a folder are to the model, and how fast."""
    exported = ExportedPolicy.load(folder)
    inputs = make_example(exported)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": partial(sample_by_network, model, exported, inputs)
    }
    for library, load_graphs in (
        ("onnxruntime", load_onnxruntime_graphs),
        ("OpenVINO", load_openvino_graphs),
    ):
        for name, suffix in (("float32", ""), ("int8", "_int8")):
            graphs = load_graphs(folder, suffix, options.threads)
            runs[f"{library}, {name}"] = partial(sample_by_graphs, graphs, exported, inputs)

    times = race(runs, "cpu", options.repeats, options.processor_time)
    expected = runs["ours"]()
    print(f"\n{options.preset}, flow steps: {exported.steps}, threads: {options.threads}\n")
    print(format_header(COLUMNS))
    for name, run in runs.items():
        if isinstance(times[name], str):
            print(format_row([name, "–", "–", str(times[name]), "–"]))
            continue
        actions = run()
        difference = relative_difference(actions, expected)
        cosine = cosine_similarity(actions.flatten(), expected.flatten(), dim=0)
        ratio = format_ratio(times["ours"], times[name])
        cells = [name, f"{difference:.1e}", f"{cosine:.5f}", str(times[name]), ratio]
        print(format_row(cells))


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
