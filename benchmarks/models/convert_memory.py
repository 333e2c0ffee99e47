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
from spear.models.moge.checkpoint import IMAGE_STATISTICS, NAME_PREFIXES, to_published_name
from spear.models.moge.networks import MogeV1
from spear.models.weights.backbones import plan_backbones

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
SHARD = 200 * 10**6
"""Bytes in a file of the PaliGemma, about."""


def write_paligemma(folder: Path, size: str) -> None:
    """A PaliGemma in bfloat16 under its published names of 2025, in several files; its weights are
    random."""
    text = {**TEXT, **SIZES[size]}
    width = text["hidden_size"]
    vision = FULL_VISION if size == "full" else VISION
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=width, hidden_size=width
    )
    with torch.device("meta"):
        wanted = PaliGemmaForConditionalGeneration(config).state_dict()
    noise = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).bfloat16()
    folder.mkdir()
    config.save_pretrained(folder)
    parts: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(parts):05d}.safetensors"
        save_file(parts[-1], folder / name)
        places.update(dict.fromkeys(parts[-1], name))
        parts.append({})

    for key, weight in wanted.items():
        if key.startswith("lm_head."):
            continue  # the embeddings again
        name = key.replace("model.vision_tower.", "model.vision_tower.vision_model.")
        parts[-1][name] = noise.repeat(-(-weight.numel() // len(noise)))[: weight.numel()].view(
            weight.shape
        )
        if sum(w.nbytes for w in parts[-1].values()) > SHARD:
            write()
    write()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_moge(path: Path, size: str) -> None:
    """A random MoGe v1 with a ViT-S or, at full size, ViT-L encoder, under its published names."""
    encoder = "dinov2_vitl14" if size == "full" else "dinov2_vits14"
    weights: dict[str, torch.Tensor] = {}
    config = {"encoder": encoder, "remap_output": "exp"}
    for ours, weight in MogeV1(config).state_dict().items():
        name = to_published_name(ours, NAME_PREFIXES[1])
        weights[name] = torch.cat([weights[name], weight]) if name in weights else weight
    for name, values in IMAGE_STATISTICS.items():
        weights[name] = torch.tensor(values).view(1, 3, 1, 1)
    torch.save({"model_config": config, "model": weights}, path)


def peak() -> int:
    """The most memory that this process has had so far, mapped files included, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def convert(folder: Path, dtype: str) -> None:
    """Convert, and print the peak over what was there before, and the bytes of the weights."""
    kind = getattr(torch, dtype)
    torch.linalg.eigh(
        torch.eye(8, dtype=torch.float64)
    )  # the library's own memory is not the weights'
    plan = plan_backbones(folder / "paligemma", folder / "model.pt")
    before = peak()
    model = plan.save(folder / f"out-{dtype}", kind)
    print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))


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
    print("| precision | parameters | weights | peak above start | over the weights | ratio |")
    print("|---" * 6 + "|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_paligemma(folder / "paligemma", size)
            write_moge(folder / "model.pt", size)
            for dtype in dtypes:
                argv = [sys.executable, __file__, str(folder), dtype]
                done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
                peaked, held = map(int, done.stdout.split())
                count = held // torch.empty(0, dtype=getattr(torch, dtype)).element_size()
                cells = [
                    dtype,
                    f"{count / 1e6:,.0f} M",
                    f"{held / 1e6:,.0f} MB",
                    f"{peaked / 1e6:,.0f} MB",
                    f"{(peaked - held) / 1e6:.0f} MB",
                    f"{peaked / held:.3f}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_dir():
        convert(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
