"""Decoding takes the likeliest token that the grammar allows, and numbers are read off
distributions over the bins of 3D tokens."""

from typing import Any

import numpy as np
import pytest
import torch

from models_tiny import FIRST_COORDINATE_ID, TINY, draw_pixels, draw_text, make_vlm, to_left_padded
from refusals import refuses
from spear.models import decode
from spear.models.readout import ONE_SIGMA_PROBABILITY, Distribution
from spear.policy import load_vlm
from spear.tokens import CoordinateTokenizer

# The range of the ids of the tiny model's 3D tokens, which are the last of its vocabulary.
NUMBER = (FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + TINY.bins)
VOCABULARY_SIZE = NUMBER[1]
END = 1  # the id of the end token
PAD = 0  # the id of the padding token
# 64 bins, fitted to random coordinates of 0.2 ± 0.5 m.
COORDINATES = CoordinateTokenizer.fit(np.random.default_rng(0).normal(0.2, 0.5, 20_000), bins=64)


def list_allowed_tokens(
    grammar: decode.Grammar | None, answer: list[int], num_left: int
) -> set[int]:
    """The ids that the grammar allows as the next token of an answer.

    This is the definition of the grammars, written without tensors.

    Args:
        grammar: The grammar; None allows every id.
        answer: The tokens of the answer so far.
        num_left: The number of tokens that may still be added, including the next one.
    """
    if grammar is None:
        return set(range(VOCABULARY_SIZE))
    if isinstance(grammar, decode.FreeTextGrammar):
        return list_allowed_tokens_of_free_text(grammar, answer, num_left)

    # A grammar that is a sequence has the range of ids for each token, and then the answer ends.
    if len(answer) == len(grammar):
        return {END}
    first, end = grammar[len(answer)]
    return set(range(first, end))


def list_allowed_tokens_of_free_text(
    grammar: decode.FreeTextGrammar, answer: list[int], num_left: int
) -> set[int]:
    """The part of `list_allowed_tokens` for words with numbers between them."""
    words: set[int] = set()
    for first, end in grammar.word_ranges:
        words |= set(range(first, end))
    numbers = set(range(*grammar.number_range))

    # An answer begins and ends with a word.
    if not answer:
        return words
    num_missing_numbers = grammar.num_numbers - sum(token in numbers for token in answer)
    if num_missing_numbers > 0:
        # After the missing numbers there must be room for a word and the end token.
        must_be_number = num_left <= num_missing_numbers + 2
        return numbers if must_be_number else words | numbers
    if answer[-1] in numbers:
        return words
    return {END} if num_left == 1 else words | {END}


def decode_slowly(
    model: Any,
    images: dict[str, torch.Tensor],
    prompt: torch.Tensor,
    grammar: decode.Grammar | None,
    max_new_tokens: int,
) -> list[int]:
    """The answer to one prompt, without a KV cache: the whole sequence runs for every token.

    Args:
        model: A SPEAR-VLM.
        images: View -> [1, 3, h, w].
        prompt: [L] ids, without padding.
        grammar: Restricts the answer; None allows every id.
        max_new_tokens: The largest number of tokens, the end token included.
    """
    answer: list[int] = []
    while len(answer) < max_new_tokens and END not in answer:
        sequence = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])[None]
        token_types = (torch.arange(sequence.shape[1]) >= len(prompt)).long()[None]
        with torch.no_grad():
            output = model(images, sequence, attention_mask=None, token_type_ids=token_types)
        logits = output.logits[0, -1]
        allowed = sorted(list_allowed_tokens(grammar, answer, max_new_tokens - len(answer)))
        answer.append(allowed[int(logits[allowed].argmax())])
    return answer


# The ids from 3 to 19 stand for words. A range of one id, such as (7, 8), is a given word.
GRAMMARS: dict[str, decode.Grammar | None] = {
    "free": None,
    "numbers": [NUMBER] * 3,
    "numbers and given words": [(7, 8), NUMBER, (9, 10)],
    "nothing to choose": [(7, 8), (9, 10)],
    "nothing": [],
    "words": decode.FreeTextGrammar(num_numbers=2, word_ranges=((3, 20),), number_range=NUMBER),
    "some words": decode.FreeTextGrammar(
        num_numbers=1, word_ranges=((3, 9), (12, 20)), number_range=NUMBER
    ),
}


@pytest.mark.parametrize("grammar_name", GRAMMARS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_answers_are_the_likeliest_that_the_grammar_allows(grammar_name: str, padding: str) -> None:
    """Three answers of one batch are compared with answers that are decoded one by one."""
    model = make_vlm()
    grammar = GRAMMARS[grammar_name]
    two_images = draw_pixels(2, views=("external",))["external"]
    images = {"external": two_images[[1, 0, 1]]}  # three images, of which two are equal
    ids, mask = draw_text(rows=3, length=6)
    if padding == "none":
        mask = torch.ones_like(mask)
    if padding == "left":
        ids, mask = to_left_padded(ids, mask)

    given_mask = None if padding == "none" else mask  # without padding no mask is needed

    answers = decode.decode_greedily(
        model, images, ids, given_mask, max_new_tokens=7, grammar=grammar
    )

    assert not answers.is_inference()  # a tensor of inference mode could not be changed by callers
    for row in range(3):
        image = {"external": images["external"][[row]]}
        prompt = ids[row][mask[row].bool()]
        expected = decode_slowly(model, image, prompt, grammar, max_new_tokens=7)
        num_padding = answers.shape[1] - len(expected)
        assert answers[row].tolist() == expected + [PAD] * num_padding
    has_column_of_padding = bool((answers == PAD).all(0).any())
    assert not has_column_of_padding


@pytest.mark.parametrize(
    ("grammar", "min_tokens"),
    [([NUMBER] * 3, 4), (GRAMMARS["words"], 5)],
)
def test_an_answer_that_would_be_cut_off_is_refused(
    grammar: decode.Grammar, min_tokens: int
) -> None:
    """The shortest answers are 3 numbers and the end token, or a word, 2 numbers, a word and the
    end token."""
    ids, _ = draw_text(rows=1, length=6)
    images = draw_pixels(1, views=("external",))

    refuses(
        f"{min_tokens} tokens",
        decode.decode_greedily,
        make_vlm(),
        images,
        ids,
        max_new_tokens=min_tokens - 1,
        grammar=grammar,
    )


class TestCertainDistribution:
    """A distribution of two numbers: the first is surely in bin 3, the second surely in bin 40.

    A row of the unit matrix has the probability 1 in one bin. `low` and `high` are the lower and
    upper edges of the two bins.
    """

    distribution = Distribution(np.eye(64, dtype=np.float32)[[3, 40]], COORDINATES)
    low = COORDINATES.bin_edges[[3, 40]]
    high = COORDINATES.bin_edges[[4, 41]]

    def test_mode_and_mean_are_the_bin_centers(self) -> None:
        centers = COORDINATES.bin_centers[[3, 40]]
        assert (self.distribution.read_numbers("mode") == centers).all()
        assert (self.distribution.read_numbers("mean") == centers).all()

    def test_the_median_is_the_middle_of_the_bin(self) -> None:
        middle = (self.low + self.high) / 2
        np.testing.assert_allclose(self.distribution.read_numbers("median"), middle)

    def test_quantiles_span_from_the_first_edge_to_the_end_of_the_bin(self) -> None:
        first_edges = COORDINATES.bin_edges[[0, 0]]
        np.testing.assert_allclose(self.distribution.quantile(0.0), first_edges)
        np.testing.assert_allclose(self.distribution.quantile(1.0), self.high)

    def test_a_quantile_above_1_is_an_error(self) -> None:
        """Such as 50, which a user may write for the median."""
        with pytest.raises(ValueError, match="50"):
            self.distribution.quantile(50)

    def test_the_probability_below_rises_within_the_bin(self) -> None:
        probability_below = self.distribution.probability_below
        middle = (self.low + self.high) / 2

        assert (probability_below(self.low - 1e-6) == 0).all()
        np.testing.assert_allclose(probability_below(middle), 0.5)
        assert (probability_below(self.high + 1e-6) == 1).all()

    def test_the_probability_below_a_value_outside_the_bins_is_0_or_1(self) -> None:
        probabilities = self.distribution.probability_below(np.array([-99.0, 99.0]))
        assert probabilities.tolist() == [0, 1]

    def test_the_spread_is_half_the_width_of_the_central_68_percent(self) -> None:
        expected = ONE_SIGMA_PROBABILITY / 2 * (self.high - self.low)
        np.testing.assert_allclose(self.distribution.spread(), expected)


def test_mode_mean_median_and_quantile_by_hand() -> None:
    bin_edges = np.array([0.0, 1, 2, 4])
    bin_centers = np.array([0.5, 1.5, 3.0])
    coordinates = CoordinateTokenizer(bin_edges, bin_centers, "metre")

    distribution = Distribution(np.array([[0.4, 0.25, 0.35]], np.float32), coordinates)

    assert distribution.read_numbers("mode") == pytest.approx(0.5)
    assert distribution.read_numbers("mean") == pytest.approx(0.4 * 0.5 + 0.25 * 1.5 + 0.35 * 3)
    # Below bin 1 there is 0.4. The missing 0.1 of 0.5 is 0.4 of this bin's 0.25.
    assert distribution.read_numbers("median") == pytest.approx(1.4)
    # Below bin 2 there is 0.65. The missing 0.175 is half of this bin, which is 2 wide.
    assert distribution.quantile(0.825) == pytest.approx(3.0)


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.5, 0.975])
def test_the_probability_below_a_quantile_is_its_own(probability: float) -> None:
    weights = np.random.default_rng(1).gamma(0.3, size=(50, 64)) + 1e-6  # 50 numbers, 64 bins
    probabilities = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    distribution = Distribution(probabilities, COORDINATES)

    below = distribution.probability_below(distribution.quantile(probability))

    np.testing.assert_allclose(below, probability, atol=1e-6)


def test_an_unknown_way_to_read_is_refused() -> None:
    distribution = Distribution(np.eye(64, dtype=np.float32)[[3]], COORDINATES)
    refuses("Did you mean 'median'", distribution.read_numbers, "medain")


def test_a_model_returns_the_distributions_behind_its_answers() -> None:
    bundle = load_vlm("nano")
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    prompts = [f"Where is the centre point of the {name} in 3D?" for name in ("mug", "plate")]

    answers = bundle.answer([image] * 2, prompts, "keypoint", distributions=True)
    plain_answers = bundle.answer([image] * 2, prompts, "keypoint")

    for answer, plain in zip(answers, plain_answers, strict=True):
        assert plain.segments == answer.segments
        assert plain.distribution is None
        assert answer.distribution.probabilities.shape == (3, 1024)  # x, y and z; 3D tokens
        np.testing.assert_allclose(answer.distribution.probabilities.sum(1), 1, rtol=1e-4)
        np.testing.assert_allclose(answer.distribution.read_numbers("mode"), answer.values)
