"""`spear export onnx`: writes acting as two ONNX graphs."""

import shutil
from pathlib import Path

from spear.util.files import check_new_or_empty_folder
from spear.util.options import Options, PolicyName

COPIED_FILES = (
    "config.json",
    "processor.json",
    "coordinates.json",
    "normalizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Small files of a policy that a program needs to prepare observations and to read actions."""


class ExportOnnxOptions(Options):
    policy: PolicyName
    out: Path = Path("runs/onnx")
    """New folder to write to."""
    int8: bool = False
    """Also write the graphs with matrix products in 8 bits."""


def export_onnx(options: ExportOnnxOptions) -> None:
    """Export a policy as two ONNX graphs: the prefix, and one flow step.

    Both are run by onnxruntime on a random observation, and compared with the network. Needs pip
    install 'spear-vla[onnx]'. How to act by the graphs: docs/howto/export.md.

    Examples:
        spear export onnx --policy nano --out runs/nano-onnx
        spear export onnx --policy runs/mine --int8
    """
    check_new_or_empty_folder(options.out)
    from spear.models.export import (
        GRAPHS,
        export_policy,
        measure_and_check_graph_difference,
        write_int8_graphs,
    )
    from spear.policy import Spear1Policy

    policy = Spear1Policy.load(options.policy, "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    export_policy(policy.model, policy.image_sizes, policy.processor.prompt_tokens, options.out)
    difference = measure_and_check_graph_difference(policy.model, options.out)
    if options.int8:
        write_int8_graphs(options.out)
    if policy.folder is not None:
        for name in COPIED_FILES:
            if (policy.folder / name).is_file():
                shutil.copyfile(policy.folder / name, options.out / name)

    for name in GRAPHS:
        print(f"{options.out / name}.onnx: {_measure_graph_size_mb(options.out, name):.1f} MB")
    print(f"the actions differ from the network's by {difference:.1e} of the largest number")


def _measure_graph_size_mb(folder: Path, name: str) -> float:
    """Return the size of a graph with its weights, which may be in a file of their own."""
    num_bytes = 0
    for suffix in (".onnx", ".onnx.data"):
        file = folder / f"{name}{suffix}"
        if file.is_file():
            num_bytes += file.stat().st_size
    return num_bytes / 1e6
