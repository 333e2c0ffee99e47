"""The nano presets' own tokenizer: byte-level BPE with PaliGemma's special and location tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LOCATIONS = 1024
LOCATION_FORMAT = "<loc{:04d}>"
"""PaliGemma's 2D location tokens: 1,024 steps over the image's height or width; a point is y, then x."""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens for small models, which any text goes through and back.

    Ids: `<pad>` 0, `<eos>` 1, `<bos>` 2 (as Gemma's), bytes and merges learned from `texts`, and last the
    location tokens, which are part of the count. The same texts give the same tokenizer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - LOCATIONS,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([LOCATION_FORMAT.format(i) for i in range(LOCATIONS)])
    return tokenizer
