"""Answers of 24 3D tokens (a box) per second: ours against Transformers' `generate` on the same
random weights.

    python benchmarks/models/vlm_decode.py --presets nano small
    python benchmarks/models/vlm_decode.py --device cuda --presets spear1 --dtypes bfloat16

PaliGemma on both sides, MoGe off, the preset's whole vocabulary, one square image and a prompt of
16 tokens, images included. Ours holds the answer to its form, so every token is one of the 1,024 3D
tokens; `generate` makes the same number of tokens, greedily and freely, with its cache. Processor
time or the clock's, runs in turn, medians (least–most). The answers must agree: `generate` is
called once with all but the 3D tokens suppressed.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration
from transformers.utils import logging

from pi0_pair import SIZES, count_image_tokens, make_paligemma_config, reduce_preset
from spear.cli import run_reporting_errors
from spear.models.decode import decode_greedily
from spear.models.presets import Preset, build_vlm_config
from spear.models.vlm import SpearVLMForConditionalGeneration
from timing import Times, format_header, format_ratio, format_row, race

NUM_ANSWER_TOKENS = 24
NUM_PROMPT_TOKENS = 16
IMAGE_TOKEN = 3
COLUMNS = [
    "preset",
    "dtype",
    "batch",
    "ours",
    "generate",
    "answers/s",
    "generate / ours",
    "same tokens",
]


@dataclass(frozen=True)
class Options:
    """Measure, and print a table."""

    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small")
    """Geometries."""
    batches: tuple[int, ...] = (1, 8)
    """Questions at once."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    layers: int | None = None
    """At most so many per network."""
    repeats: int = 5
    """Runs of either side."""
    threads: int | None = None
    """Threads of PyTorch on a CPU."""
    processor_time: bool = False
    """Measure processor time instead of the clock's, for a busy machine (CPU)."""


@dataclass(frozen=True)
class Pair:
    """SPEAR-VLM without MoGe and Transformers' PaliGemma with the same random weights."""

    size: Preset
    our_model: Any
    their_model: Any


def make_pair(name: str, max_layers: int | None, dtype: torch.dtype, device: str) -> Pair:
    size = dataclasses.replace(
        reduce_preset(name, max_layers), vocabulary_size=SIZES[name].vocabulary_size
    )
    torch.manual_seed(0)
    with torch.device(device):
        our_model = SpearVLMForConditionalGeneration(build_vlm_config(size)).eval()
    num_rows = size.vocabulary_size + size.bins
    config = make_paligemma_config(size, num_rows, IMAGE_TOKEN, vocab_size=num_rows)
    with torch.device(device):
        their_model = PaliGemmaForConditionalGeneration(config).eval()
    their_model.model.load_state_dict(our_model.state_dict())
    their_model.tie_weights()
    return Pair(size, our_model.to(dtype), their_model.to(dtype))


class Questions:
    """The same random questions for both sides of a pair."""

    def __init__(self, pair: Pair, batch: int, device: str, dtype: torch.dtype) -> None:
        self.pair = pair
        generator = torch.Generator().manual_seed(1)
        side_px = pair.size.vision["image_size"]
        image = torch.randint(
            0, 256, (batch, 3, side_px, side_px), generator=generator, dtype=torch.uint8
        )
        self.image = image.to(device)
        ids = torch.randint(4, 1000, (batch, NUM_PROMPT_TOKENS), generator=generator)
        self.ids = ids.to(device)
        image_ids = self.ids.new_full((batch, count_image_tokens(pair.size)), IMAGE_TOKEN)
        self.whole_ids = torch.cat([image_ids, self.ids], dim=1)
        self.generate_inputs = {
            "input_ids": self.whole_ids,
            "attention_mask": torch.ones_like(self.whole_ids),
            "pixel_values": (self.image / 127.5 - 1).to(dtype),
            "max_new_tokens": NUM_ANSWER_TOKENS,
            "do_sample": False,
        }
        config = pair.our_model.config
        self.first_3d_token = config.coordinate_start
        self.end_3d_tokens = config.coordinate_start + config.coordinate_bins

    def answer(self) -> Tensor:
        """Our answers."""
        token_range = (self.first_3d_token, self.end_3d_tokens)
        return decode_greedily(
            self.pair.our_model,
            {"external": self.image},
            self.ids,
            max_new_tokens=NUM_ANSWER_TOKENS + 1,
            grammar=[token_range] * NUM_ANSWER_TOKENS,
        )

    def generate(self) -> Tensor:
        """Free answers of `generate`.

        Random weights may end an answer early: full length makes the work the same for both sides.
        """
        return self.pair.their_model.generate(
            **self.generate_inputs, min_new_tokens=NUM_ANSWER_TOKENS
        )

    def measure_agreement(self) -> float:
        """Return the share of our tokens that `generate` gives when restricted to 3D tokens."""
        num_tokens = self.pair.their_model.config.text_config.vocab_size
        other_tokens = [*range(self.first_3d_token), *range(self.end_3d_tokens, num_tokens)]
        restricted = self.pair.their_model.generate(
            **self.generate_inputs, suppress_tokens=other_tokens
        )
        expected = restricted[:, self.whole_ids.shape[1] :]
        is_same = self.answer()[:, :NUM_ANSWER_TOKENS] == expected
        return float(is_same.float().mean())


def print_rows(options: Options, name: str, dtype_name: str) -> None:
    """Print the rows of a preset in one precision."""
    dtype = getattr(torch, dtype_name)
    pair = make_pair(name, options.layers, dtype, options.device)
    label = f"{name} ({options.layers} layers)" if options.layers else name
    for batch in options.batches:
        questions = Questions(pair, batch, options.device, dtype)
        agreement = questions.measure_agreement()
        times = race(
            {"ours": questions.answer, "generate": questions.generate},
            options.device,
            options.repeats,
            options.processor_time,
            num_warm_ups=1,
        )
        our_times = times["ours"]
        answers_per_s = "–"
        if isinstance(our_times, Times):
            answers_per_s = f"{1000 * batch / our_times.median_ms:.1f}"
        cells = [
            label,
            dtype_name,
            str(batch),
            str(our_times),
            str(times["generate"]),
            answers_per_s,
            format_ratio(times["generate"], our_times),
            f"{agreement:.0%}",
        ]
        print(format_row(cells), flush=True)


def main(options: Options) -> None:
    logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__};"
        " milliseconds per batch\n"
    )
    print(format_header(COLUMNS))
    for name in options.presets:
        for dtype_name in options.dtypes:
            print_rows(options, name, dtype_name)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
