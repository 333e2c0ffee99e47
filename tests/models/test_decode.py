"""Answers with a grammar are, token by token, the likeliest that it allows; nothing is computed in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models_tiny import START, TINY, pixels, text, vlm
from spear.errors import SpearError
from spear.models import decode

NUMBER = (START, START + TINY.bins)
END, PAD = 1, 0


def allowed(grammar: decode.Grammar | None, said: list[int], left: int) -> set[int]:
    """The grammars in words: which ids may follow, `left` tokens before the limit (this one included)."""
    everything = set(range(NUMBER[1]))
    if grammar is None:
        return everything
    if not isinstance(grammar, decode.Worded):
        return set(range(*grammar[len(said)])) if len(said) < len(grammar) else {END}
    words = {i for a, b in grammar.words for i in range(a, b)}
    numbers = set(range(*grammar.numbers))
    owed = grammar.count - sum(t in numbers for t in said)
    after_word = bool(said) and said[-1] not in numbers
    if owed:
        if said and left <= owed + 2:  # the numbers, a word and the end must still find room
            return numbers
        return words | numbers if said else words
    if not after_word:
        return words
    return {END} if left == 1 else words | {END}


def slowly(
    model: Any, images: Any, ids: torch.Tensor, grammar: decode.Grammar | None, owner: int, most: int
) -> list[int]:
    """The answer to one prompt, with the whole sequence run again for every token."""
    said: list[int] = []
    while len(said) < most and END not in said:
        sequence = torch.cat([ids, torch.tensor(said, dtype=torch.long)])[None]
        kinds = (torch.arange(sequence.shape[1]) >= len(ids)).long()[None]
        with torch.no_grad():
            logits = model(images, sequence, None, kinds, torch.tensor([owner])).logits[0, -1]
        may = sorted(allowed(grammar, said, most - len(said)))
        said.append(may[int(logits[may].argmax())])
    return said


GRAMMARS: dict[str, list[decode.Grammar | None]] = {
    "free": [None] * 3,
    "numbers": [[NUMBER] * 3] * 3,
    "numbers and given words": [[(7, 8), NUMBER, (9, 10)], [NUMBER, NUMBER], [(5, 6)]],
    "nothing to choose": [[(7, 8), (9, 10)], [(5, 6)], []],
    "words": [decode.Worded(2, ((3, 20),), NUMBER)] * 3,
    "all sorts": [None, decode.Worded(1, ((3, 9), (12, 20)), NUMBER), [NUMBER, (9, 10)]],
}


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("padded", [False, True])
def test_answers_are_the_likeliest_that_the_grammar_allows(kind: str, padded: bool) -> None:
    model, grammars, most = vlm(), GRAMMARS[kind], 7
    images = pixels(2, views=("external",))
    ids, mask = text(3, 6)
    owners = torch.tensor([1, 0, 1])
    if not padded:
        mask = torch.ones_like(mask)
    found = decode.greedy(model, images, ids, mask if padded else None, owners, most, grammars)
    for row, grammar in enumerate(grammars):
        expected = slowly(model, images, ids[row][mask[row].bool()], grammar, int(owners[row]), most)
        assert found[row].tolist() == expected + [PAD] * (found.shape[1] - len(expected))
    assert not bool((found == PAD).all(0).any())  # no columns of padding alone
    assert not found.is_inference()


@pytest.mark.parametrize(("grammar", "needs"), [([NUMBER] * 3, 4), (decode.Worded(2, ((3, 20),), NUMBER), 5)])
def test_an_answer_that_is_cut_off_is_refused(grammar: decode.Grammar, needs: int) -> None:
    ids, _ = text(1, 6)
    with pytest.raises(SpearError, match=f"{needs} tokens"):
        decode.greedy(vlm(), pixels(1, views=("external",)), ids, None, None, needs - 1, [grammar])
