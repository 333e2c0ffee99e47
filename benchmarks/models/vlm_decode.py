"""Answers of 24 3D tokens (a box) per second: ours against Transformers' `generate` on the same random
weights.

    python benchmarks/models/vlm_decode.py --presets nano small
    python benchmarks/models/vlm_decode.py --device cuda --presets spear1 --dtypes bfloat16

PaliGemma on both sides, MoGe off, the preset's whole vocabulary, one square image and a prompt of 16 tokens,
images included. Ours holds the answer to its form, so every token is one of the 1,024 3D tokens; `generate`
is given the same number of tokens, greedily and freely, with its cache. Processor time or the clock's, runs
in turn, medians (least–most). The answers must agree: `generate` is once asked with all but the 3D tokens
suppressed.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import torch
import tyro
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.utils import logging

from pi0_pair import SIZES, reduced
from spear.cli import run_reporting_errors
from spear.models.decode import decode_greedily
from spear.models.presets import build_vlm_config
from spear.models.vlm import SpearVLMForConditionalGeneration
from timing import Times, race

NUMBERS, TEXT = 24, 16


def pair(name: str, layers: int | None, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """SPEAR-VLM without MoGe and Transformers' PaliGemma with the same random weights."""
    size = dataclasses.replace(reduced(name, layers), vocabulary=SIZES[name].vocabulary)
    torch.manual_seed(0)
    with torch.device(device):
        ours = SpearVLMForConditionalGeneration(build_vlm_config(size)).eval()
    rows = size.vocabulary + size.bins
    config = PaliGemmaConfig(
        vision_config={
            **size.vision,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        text_config={**size.text, "model_type": "gemma", "vocab_size": rows, "pad_token_id": 0},
        projection_dim=size.text["hidden_size"],
        hidden_size=size.text["hidden_size"],
        image_token_index=3,
        vocab_size=rows,
    )
    with torch.device(device):
        theirs = PaliGemmaForConditionalGeneration(config).eval()
    theirs.model.load_state_dict(ours.state_dict())
    theirs.tie_weights()
    return ours.to(dtype), theirs.to(dtype)


def main(
    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small"),
    batches: tuple[int, ...] = (1, 8),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    device: Literal["cpu", "cuda"] = "cpu",
    layers: int | None = None,
    repeats: int = 5,
    threads: int | None = None,
    processor_time: bool = False,
) -> None:
    """Measure, and print a table.

    Args:
        presets: geometries. layers: at most so many per network. batches: questions at once.
        device: where. repeats: of either side. threads: of PyTorch on a CPU.
        processor_time: processor time instead of the clock's, for a busy machine (CPU).
    """
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds per batch\n"
    )
    names = [
        "preset",
        "dtype",
        "batch",
        "ours",
        "generate",
        "answers/s",
        "generate / ours",
        "same tokens",
    ]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for name in presets:
        for kind in dtypes:
            ours, theirs = pair(name, layers, getattr(torch, kind), device)
            config = ours.config
            first, last = config.coordinate_start, config.coordinate_start + config.coordinate_bins
            side, patch = config.vision_config.image_size, config.vision_config.patch_size
            for batch in batches:
                generator = torch.Generator().manual_seed(1)
                image = torch.randint(
                    0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8
                )
                image = image.to(device)
                ids = torch.randint(4, 1000, (batch, TEXT), generator=generator).to(device)
                before = ids.new_full((batch, (side // patch) ** 2), 3)
                whole = torch.cat([before, ids], dim=1)
                asked = {
                    "input_ids": whole,
                    "attention_mask": torch.ones_like(whole),
                    "pixel_values": (image / 127.5 - 1).to(getattr(torch, kind)),
                    "max_new_tokens": NUMBERS,
                    "do_sample": False,
                }
                grammar = [(first, last)] * NUMBERS

                def answer() -> torch.Tensor:
                    return decode_greedily(
                        ours,  # noqa: B023
                        {"external": image},  # noqa: B023
                        ids,  # noqa: B023
                        max_new_tokens=NUMBERS + 1,
                        grammar=grammar,  # noqa: B023
                    )

                # Random weights may end early when free: the same work for both, an answer of full length.
                runs = {
                    "ours": answer,
                    "generate": lambda: theirs.generate(**asked, min_new_tokens=NUMBERS),  # noqa: B023
                }
                others = [*range(first), *range(last, theirs.config.text_config.vocab_size)]
                held = theirs.generate(**asked, suppress_tokens=others)[:, whole.shape[1] :]
                same = (answer()[:, :NUMBERS] == held).float().mean()
                found = race(runs, device, repeats, processor_time, warm_ups=1)
                a, b = found["ours"], found["generate"]
                ratio = (
                    f"{b.median / a.median:.2f}"
                    if isinstance(a, Times) and isinstance(b, Times)
                    else "–"
                )
                rate = f"{1000 * batch / a.median:.1f}" if isinstance(a, Times) else "–"
                label = name + (f" ({layers} layers)" if layers else "")
                print(
                    f"| {label} | {kind} | {batch} | {a} | {b} | {rate} | {ratio} | {same:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
