"""Answers with a grammar are, token by token, the likeliest that it allows; their numbers, read off."""

from typing import Any

import numpy as np
import pytest
import torch

from models_tiny import START, TINY, left_padded, pixels, text, vlm
from refusals import refuses
from spear.models import decode
from spear.models.readout import Distribution
from spear.policy import load_vlm
from spear.tokens import CoordinateTokenizer

NUMBER = (START, START + TINY.bins)
END, PAD = 1, 0
COORDINATES = CoordinateTokenizer.fit(np.random.default_rng(0).normal(0.2, 0.5, 20_000), bins=64)


def allowed(grammar: decode.Grammar | None, said: list[int], left: int) -> set[int]:
    """The grammars in words: which ids may follow, `left` tokens before the limit (this one included)."""
    if grammar is None:
        return set(range(NUMBER[1]))
    if not isinstance(grammar, decode.FreeTextGrammar):
        return set(range(*grammar[len(said)])) if len(said) < len(grammar) else {END}
    words = {i for a, b in grammar.words for i in range(a, b)}
    numbers = set(range(*grammar.numbers))
    owed = grammar.count - sum(t in numbers for t in said)
    if owed:
        if said and left <= owed + 2:  # the numbers, a word and the end must still find room
            return numbers
        return words | numbers if said else words
    if not said or said[-1] in numbers:
        return words
    return {END} if left == 1 else words | {END}


def slowly(
    model: Any,
    images: Any,
    ids: torch.Tensor,
    grammar: decode.Grammar | None,
    owner: int,
    most: int,
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


GRAMMARS: dict[str, decode.Grammar | None] = {
    "free": None,
    "numbers": [NUMBER] * 3,
    "numbers and given words": [(7, 8), NUMBER, (9, 10)],
    "nothing to choose": [(7, 8), (9, 10)],
    "nothing": [],
    "words": decode.FreeTextGrammar(2, ((3, 20),), NUMBER),
    "some words": decode.FreeTextGrammar(1, ((3, 9), (12, 20)), NUMBER),
}


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("padded", ["", "right", "left"])
def test_answers_are_the_likeliest_that_the_grammar_allows(kind: str, padded: str) -> None:
    model, grammar, most = vlm(), GRAMMARS[kind], 7
    images = pixels(2, views=("external",))
    ids, mask = text(3, 6)
    owners = torch.tensor([1, 0, 1])
    if not padded:
        mask = torch.ones_like(mask)
    if padded == "left":
        ids, mask = left_padded(ids, mask)
    each = {view: images[view][owners] for view in images}
    found = decode.decode_greedily(model, each, ids, mask if padded else None, most, grammar)
    for row in range(3):
        expected = slowly(
            model, images, ids[row][mask[row].bool()], grammar, int(owners[row]), most
        )
        assert found[row].tolist() == expected + [PAD] * (found.shape[1] - len(expected))
    assert not bool((found == PAD).all(0).any())  # no columns of padding alone
    assert not found.is_inference()


@pytest.mark.parametrize(
    ("grammar", "needs"), [([NUMBER] * 3, 4), (decode.FreeTextGrammar(2, ((3, 20),), NUMBER), 5)]
)
def test_an_answer_that_is_cut_off_is_refused(grammar: decode.Grammar, needs: int) -> None:
    ids, _ = text(1, 6)
    images = pixels(1, views=("external",))
    refuses(f"{needs} tokens", decode.decode_greedily, vlm(), images, ids, None, needs - 1, grammar)


def test_a_certain_answer_reads_the_same_every_way() -> None:
    sure = Distribution(np.eye(64, dtype=np.float32)[[3, 40]], COORDINATES)
    low, high = COORDINATES.bin_edges[[3, 40]], COORDINATES.bin_edges[[4, 41]]
    assert (sure.read("mode") == COORDINATES.bin_centers[[3, 40]]).all()
    assert (sure.read("mean") == sure.read("mode")).all()
    np.testing.assert_allclose(sure.read("median"), (low + high) / 2)
    np.testing.assert_allclose(sure.quantile(0.0), COORDINATES.bin_edges[[0, 0]])
    np.testing.assert_allclose(sure.quantile(1.0), high)
    with pytest.raises(ValueError, match="50"):
        sure.quantile(50)
    assert (sure.probability_below(low - 1e-6) == 0).all() and (
        sure.probability_below(high + 1e-6) == 1
    ).all()
    np.testing.assert_allclose(sure.probability_below((low + high) / 2), 0.5)
    np.testing.assert_allclose(sure.spread(), 0.6826894921370859 / 2 * (high - low))
    assert (sure.probability_below(np.array([-99.0, 99.0])) == [0, 1]).all()


def test_mode_mean_and_median_by_hand() -> None:
    coordinates = CoordinateTokenizer(np.array([0.0, 1, 2, 4]), np.array([0.5, 1.5, 3.0]), "metre")
    d = Distribution(np.array([[0.4, 0.25, 0.35]], np.float32), coordinates)
    assert d.read("mode") == pytest.approx(0.5)
    assert d.read("mean") == pytest.approx(0.4 * 0.5 + 0.25 * 1.5 + 0.35 * 3)
    assert d.read("median") == pytest.approx(1.4) and d.quantile(0.825) == pytest.approx(3.0)
    p = np.random.default_rng(1).gamma(0.3, size=(50, 64)) + 1e-6
    d = Distribution((p / p.sum(1, keepdims=True)).astype(np.float32), COORDINATES)
    for share in (0.02, 0.3, 0.5, 0.975):
        np.testing.assert_allclose(d.probability_below(d.quantile(share)), share, atol=1e-6)
    refuses("did you mean 'median'", d.read, "medain")


def test_a_model_says_what_it_held_possible() -> None:
    bundle = load_vlm("nano")
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    asked = [f"Where is the centre point of the {name} in 3D?" for name in ("mug", "plate")]
    answers = bundle.answer([image] * 2, asked, "keypoint", distributions=True)
    plain = bundle.answer([image] * 2, asked, "keypoint")
    assert [a.segments for a in plain] == [a.segments for a in answers]
    assert all(a.distribution is None for a in plain)
    for a in answers:
        assert a.distribution.probabilities.shape == (3, 1024)
        np.testing.assert_allclose(a.distribution.probabilities.sum(1), 1, rtol=1e-4)
        np.testing.assert_allclose(a.distribution.read("mode"), a.values)
