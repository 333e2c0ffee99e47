"""Memory that a conversion needs: the peak of the process, beside the size of the new weights.

    python benchmarks/convert_memory.py

Writes a PaliGemma and a MoGe ViT-S with random weights, together some 145 M parameters, into a temporary folder,
converts them in a process of their own, and prints how much more memory that process needed at its peak than before,
divided by the bytes of the weights: reading, building and saving, mapped files included. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from spear.models.backbones import plan_backbones
from spear.models.moge_checkpoint import _CONSTANTS, _PREFIXES, _published
from spear.models.moge_v1 import MogeV1, MogeV1Config

TEXT = {
    "model_type": "gemma",
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 131072,
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


def write_paligemma(folder: Path) -> None:
    """A random PaliGemma in float32, in shards of 200 MB."""
    config = PaliGemmaConfig(vision_config=VISION, text_config=TEXT, projection_dim=512, hidden_size=512)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder, max_shard_size="200MB")


def write_moge(path: Path) -> None:
    """A random MoGe v1 with a ViT-S encoder, under its published names."""
    weights: dict[str, torch.Tensor] = {}
    for ours, weight in MogeV1(MogeV1Config(encoder="dinov2_vits14")).state_dict().items():
        name = _published(ours, _PREFIXES[1])
        weights[name] = torch.cat([weights[name], weight]) if name in weights else weight
    for name, values in _CONSTANTS.items():
        weights[name] = torch.tensor(values).view(1, 3, 1, 1)
    torch.save({"model": weights}, path)


def peak() -> int:
    """The most memory that this process has had so far, mapped files included, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def convert(folder: Path, dtype: str) -> None:
    """Convert, and print the peak over what was there before, and the bytes of the weights."""
    kind = getattr(torch, dtype)
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))  # the library's own memory is not the weights'
    plan = plan_backbones(folder / "paligemma", folder / "model.pt")
    before = peak()
    model = plan.save(folder / f"out-{dtype}", kind)
    print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_paligemma(folder / "paligemma")
        write_moge(folder / "model.pt")
        print("dtype      weights   peak above start   ratio")
        for dtype in sys.argv[1:] or ("float32", "bfloat16"):
            argv = [sys.executable, __file__, str(folder), dtype]
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
            over, size = map(int, done.stdout.split())
            print(
                f"{dtype:<9}  {size / 1e6:>4.0f} MB   {over / 1e6:>13.0f} MB   {over / size:.3f}", flush=True
            )


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_dir():
        convert(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
