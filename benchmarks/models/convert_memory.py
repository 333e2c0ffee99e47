"""Memory that a conversion needs: the peak of the process, beside the size of the new weights.

    python benchmarks/models/convert_memory.py
    python benchmarks/models/convert_memory.py --sizes large full --dtypes bfloat16

Writes a PaliGemma with random weights and a MoGe (ViT-S; at full size ViT-L) into a temporary
folder, converts them in a process of their own, and prints how much more memory that process needed
at its peak than before, divided by the bytes of the weights: reading, building and saving, mapped
files included. Linux only.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from spear.cli import run_reporting_errors
from spear.models.moge.checkpoint import to_published_weights
from spear.models.moge.networks import MogeV1
from spear.models.weights.backbones import plan_backbones
from timing import format_header, format_row

TEXT = {
    "model_type": "gemma",
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 224,
    "vision_use_head": False,
}
Size = Literal["small", "medium", "large", "full"]
SIZES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 65536},
    "medium": {"vocab_size": 131072},
    "large": {
        "vocab_size": 65536,
        "hidden_size": 1024,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "head_dim": 256,
    },
    "full": {
        "vocab_size": 257152,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "head_dim": 256,
    },
}
FULL_VISION = {
    **VISION,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
MAX_SHARD_BYTES = 200 * 10**6  # of a file of the PaliGemma, about
NUM_NOISE = 2**22  # random numbers, which all weights repeat
COLUMNS = ["precision", "parameters", "weights", "peak above start", "over the weights", "ratio"]


class ShardWriter:
    """Writes weights into files of about `MAX_SHARD_BYTES`, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of_weight: dict[str, str] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._num_files = 0

    def add(self, name: str, weight: torch.Tensor) -> None:
        self._weights[name] = weight
        if sum(w.nbytes for w in self._weights.values()) > MAX_SHARD_BYTES:
            self._write()

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._weights:
            self._write()
        index = {"metadata": {}, "weight_map": self.file_of_weight}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _write(self) -> None:
        self._num_files += 1
        file_name = f"model-{self._num_files:05d}.safetensors"
        save_file(self._weights, self.folder / file_name)
        self.file_of_weight |= dict.fromkeys(self._weights, file_name)
        self._weights = {}


def write_paligemma(folder: Path, size: str) -> None:
    """Write a PaliGemma in bfloat16 under its published names of 2025, in several files; its
    weights are random."""
    text = {**TEXT, **SIZES[size]}
    width = text["hidden_size"]
    config = PaliGemmaConfig(
        vision_config=FULL_VISION if size == "full" else VISION,
        text_config=text,
        projection_dim=width,
        hidden_size=width,
    )
    with torch.device("meta"):
        shapes = PaliGemmaForConditionalGeneration(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(NUM_NOISE, generator=generator)).bfloat16()

    folder.mkdir()
    config.save_pretrained(folder)
    writer = ShardWriter(folder)
    for key, weight in shapes.items():
        if key.startswith("lm_head."):
            continue  # the embeddings again
        name = key.replace("model.vision_tower.", "model.vision_tower.vision_model.")
        num_repeats = math.ceil(weight.numel() / NUM_NOISE)
        values = noise.repeat(num_repeats)[: weight.numel()]
        writer.add(name, values.view(weight.shape))
    writer.close()


def write_moge(path: Path, size: str) -> None:
    """Write a random MoGe v1 with a ViT-S or, at full size, ViT-L encoder, under its published
    names."""
    encoder = "dinov2_vitl14" if size == "full" else "dinov2_vits14"
    config = {"encoder": encoder, "remap_output": "exp"}
    weights = to_published_weights(MogeV1(config).state_dict(), version=1)
    torch.save({"model_config": config, "model": weights}, path)


def read_peak_bytes() -> int:
    """Return the most memory that this process has had so far, mapped files included."""
    status = Path("/proc/self/status").read_text()
    kibibytes = status.partition("VmHWM:")[2].split()[0]
    return int(kibibytes) * 1024


def convert(folder: Path, dtype_name: str) -> None:
    """Convert, and print the peak over what was there before, and the bytes of the weights."""
    dtype = getattr(torch, dtype_name)
    # The linear algebra library's own memory is not the conversion's.
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
    plan = plan_backbones(folder / "paligemma", folder / "model.pt")
    start_bytes = read_peak_bytes()
    model = plan.save(folder / f"out-{dtype_name}", dtype)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    print(read_peak_bytes() - start_bytes, weight_bytes)


def measure(folder: Path, dtype_name: str) -> list[str]:
    """Convert in a process of its own, and return a row of the table."""
    command = [sys.executable, __file__, str(folder), dtype_name]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak_bytes, weight_bytes = map(int, result.stdout.split())
    num_parameters = weight_bytes // getattr(torch, dtype_name).itemsize
    return [
        dtype_name,
        f"{num_parameters / 1e6:,.0f} M",
        f"{weight_bytes / 1e6:,.0f} MB",
        f"{peak_bytes / 1e6:,.0f} MB",
        f"{(peak_bytes - weight_bytes) / 1e6:.0f} MB",
        f"{peak_bytes / weight_bytes:.3f}",
    ]


def main(
    sizes: tuple[Size, ...] = ("small", "medium"),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
) -> None:
    """Print a table.

    Args:
        sizes: of the PaliGemma; large writes up to 7 GB into the temporary folder, full (PaliGemma
            3B) 14 GB in bfloat16.
        dtypes: of the new weights.
    """
    print(format_header(COLUMNS))
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_paligemma(folder / "paligemma", size)
            write_moge(folder / "model.pt", size)
            for dtype_name in dtypes:
                print(format_row(measure(folder, dtype_name)), flush=True)


if __name__ == "__main__":
    is_child = len(sys.argv) == 3 and Path(sys.argv[1]).is_dir()
    if is_child:
        convert(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
