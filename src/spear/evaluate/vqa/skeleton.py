"""Read the skeleton of a question: its words, with NAME in place of each object.

The skeleton of "Hey, how far's the red cube from the camera?" is "how far is NAME from camera".
words.toml lists the words that questions of the taught types are made of. Any other word is part of
a name, if it stands where a question names an object. Otherwise it is *unexplained*, which suggests
that the question asks for something else.
"""

import difflib
import itertools
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
PHRASES: dict[str, str] = _DATA["phrases"]
"""Phrase → what it is read as."""
SPELLINGS: dict[str, str] = _DATA["spellings"]
"""Word → the word that it is read as."""
VERBS: dict[str, str] = _DATA["verbs"]
"""Verb → the word that it is read as, if no determiner stands before it."""
MODEL_NAMES: dict[str, str] = _DATA["names"]
"""Name of an object → the name by which models know it."""
PATTERNS = [
    (re.compile(pattern), replacement) for pattern, replacement in _DATA["patterns"].items()
]
"""Regular expressions, and what each is read as."""
WORDS = {group: frozenset(words) for group, words in _DATA["words"].items()}
"""Group of words → the words. They do not tell what a question asks."""
CUES = {group: frozenset(words) for group, words in _DATA["cues"].items()}
"""Group of words → the words. They tell what a question asks."""
CUE_WORDS = frozenset().union(*CUES.values())
_GROUPS_OF_NAMES = frozenset(("kinds_of_boxes", "look_alikes", "movers", "no_objects", "surfaces"))
_MAX_OBJECTS = 2  # that a taught question names
VOCABULARY = CUE_WORDS.union(*(WORDS[group] for group in WORDS.keys() - _GROUPS_OF_NAMES))
"""The words of questions, which are no names."""

_WORDS_BESIDE_NAMES = WORDS["untaught"] | CUES["solid"] | CUES["corners"] | CUES["center"]
"""A text that has one of these before its last word is no name: "shadow of the mug"."""

_WORDS_OF_SENTENCES = WORDS["subordinators"] | {
    *("are", "be", "do", "does", "how", "is", "it", "was", "were"),
    *("what", "where", "whether", "which", "who", "why"),
}
"""A text that has one of these before its last word is a part of a sentence, and no name: "whether
the gripper is closed"."""

NAME = "NAME"  # stands for an object in a skeleton
PIXEL = "PIXEL"  # stands for the coordinates of a pixel in a skeleton
ACTION = "act"  # stands for a verb that moves or changes an object: "push", "rotate"
PROPERTY = "untaught"  # stands for a property or a part of an object, which no model is taught
UNEXPLAINED = "?"  # stands for an unexplained word in a skeleton

MIN_TYPO_LETTERS = 4  # a shorter word resembles too many others
TYPO_SIMILARITY = 0.83  # of difflib; "camara" and "camera" have 0.833
_TYPO_TARGETS = sorted(
    word for word in CUE_WORDS | WORDS["often_misspelled"] if len(word) >= MIN_TYPO_LETTERS
)
_MIN_ADVERB_LETTERS = 6  # "nearly", but not "ugly"
_MIN_PARTICIPLE_LETTERS = 7  # "leading", but not "spring"

# The marks in "'mug'", in "the mugs' handles", and the "*" in "*mug*", but not in "2 * 3".
_QUOTATION_MARKS = re.compile(r"(?<!\w)'|'(?!\w)|[\"“”‘_]|\*(?! ?\d)")
# Any key of PHRASES as whole words, the longest that fits.
_PHRASES = re.compile(
    rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(PHRASES, key=len, reverse=True)))})(?!\w)"
)
# "Mug" in "where is the Mug?": a capitalized word although no sentence begins there.
_CAPITALIZED = re.compile(r"(?<=[\w,] )[A-Z][a-z]+")
# A token is 's, a word (perhaps with hyphens), or a single punctuation mark.
_TOKENS = re.compile(r"'s\b|[^\W_]+(?:-[^\W_]+)*|[^\s\w]")
_ENDS_OF_CLAUSES = frozenset(",.;:?!()[]–—-") | WORDS["subordinators"]
_ENDS_OF_SENTENCES = frozenset(".;:?!")
_AFTER_VERBS = WORDS["determiners"] | {"i", "it", "out", "them", "up", "we", "you"}
"""The words before these are no name, but a verb: "pick up", "grasp the mug"."""

_CUES_AFTER_NAMES = CUE_WORDS - CUES["naming"] - CUES["finding"] - {"away"}
"""The words before these may be a name without an article: "mug distance"."""
_AFTER_FIRST_NAMES = frozenset(("", "against", "and", "from", "in", "is", "its", "or", "to"))
_BEFORE_BOXES = frozenset(("after", "enclosing", "that"))
"""After these, besides prepositions, "the box" may be the name of an object."""
_NOUNS_AFTER_NAMES = CUES["distance"] | CUES["position"] | CUES["center"] | CUES["corners"]
"""The words before these are certainly no verbs."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_PIXELS_RIGHT = r"(?:pixels? )?(?:across|(?:to the )?right|from the left)"
_PIXELS_DOWN = r"(?:pixels? )?(?:down|from the top)"
_NTH = rf"(?:{_NUMBER}(?:st|nd|rd|th)?)"
_ROWS_AND_COLUMNS = tuple(
    re.compile(pattern)
    for pattern in (
        # "row 40, column 80"
        rf"row\s+{_NUMBER}\s*,?\s*(?:and\s+)?col(?:umn)?\s+{_NUMBER}",
        # "the 40th row and the 80th column"
        rf"{_NTH} row,? (?:and )?(?:the )?{_NTH} col(?:umn)?",
    )
)
"""Match the coordinates of a pixel, y before x."""
_PIXELS = tuple(
    re.compile(pattern)
    for pattern in (
        # "column 80, row 40"
        rf"col(?:umn)?\s+{_NUMBER}\s*,?\s*(?:and\s+)?row\s+{_NUMBER}",
        # "the 80th column and the 40th row"
        rf"{_NTH} col(?:umn)?,? (?:and )?(?:the )?{_NTH} row",
        rf"horizontal coordinate {_NUMBER},? (?:and )?(?:the )?vertical coordinate {_NUMBER}",
        # "80 pixels to the right and 40 down"
        rf"{_NUMBER} {_PIXELS_RIGHT},? (?:and )?{_NUMBER} {_PIXELS_DOWN}",
        # "the point with coordinates 80 and 40"
        rf"(?<=coordinates ){_NUMBER} (?:and|by) {_NUMBER}",
        # "pixel 80 by 40"
        rf"(?<=pixel ){_NUMBER} (?:and|by) {_NUMBER}",
        # "two integers, 80 and 40"
        rf"(?<=integers, ){_NUMBER} and {_NUMBER}",
        # "x=80 y=40", "(u: 80, v: 40)"
        rf"[(\[]?\b[xu]\s*[=:]?\s*{_NUMBER}\s*[,;]?\s*(?:and\s+)?[yv]\s*[=:]?\s*{_NUMBER}[)\]]?",
        # "(80, 40)", "[80 40]"
        rf"[(\[]\s*{_NUMBER}\s*[,;/ ]\s*{_NUMBER}\s*[)\]]",
        # "80, 40"
        rf"(?<![\w.]){_NUMBER}\s*[,/ ]\s*{_NUMBER}(?!\w)",
    )
)
"""Match the coordinates of a pixel, x before y."""


@dataclass
class Skeleton:
    """The words of a question or of one of its clauses, with NAME in place of each object.

    Attributes:
        words: the words without determiners; `NAME` stands for an object, `PIXEL` for the
            coordinates of a pixel, and `UNEXPLAINED` for an unexplained word.
        names: the names of the objects, in the order of the words `NAME`.
        has_bare_names: whether a name stands without an article.
        definite_names: the names that stand after "the" or "this".
    """

    words: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    has_bare_names: bool = False
    definite_names: set[str] = field(default_factory=set)

    @property
    def num_objects(self) -> int:
        """How many different objects the question names."""
        return len(set(self.names))

    @property
    def has_cues(self) -> bool:
        """Whether a word tells what is asked."""
        return not CUE_WORDS.isdisjoint(self.words)


@dataclass
class QuestionReading:
    """What was read of a question.

    Attributes:
        clauses: the skeletons of the question's clauses.
        sentences: for each sentence, the range of the indices of its clauses in `clauses`.
        pixel: (x, y) of the pixel that the question mentions, px; None if it mentions none.
    """

    clauses: list[Skeleton]
    sentences: list[range]
    pixel: tuple[float, float] | None

    def list_readings(self) -> list[Skeleton]:
        """List the skeletons that the whole question may have, the likeliest first.

        1. The question without the clauses that say nothing about what is asked, such as "I want to
           grasp the mug" in "I want to grasp the mug, how far is it?".
        2. The same with the names in those clauses, if there are any.
        3. The question without the clauses that have no cues, such as "For my thesis". If the other
           clauses name no object, only the clauses before the first cue are left out.
        4. Single sentences of the question, see `_list_readings_by_sentences`.
        5. Each of these readings without what may not be asked about, see
           `_list_readings_without_asides`.
        """
        first_reading: list[Skeleton] = []
        second_reading: list[Skeleton] = []
        for clause in self.clauses:
            if self._is_part_of_what_is_asked(clause):
                first_reading.append(clause)
                second_reading.append(clause)
            else:
                second_reading.append(Skeleton([NAME] * len(clause.names), clause.names))
        readings = [_join_clauses(first_reading)]
        if len(first_reading) < len(self.clauses):
            readings.append(_join_clauses(second_reading))
        third_reading = [clause for clause in self.clauses if clause.has_cues]
        if not any(clause.names for clause in third_reading):  # "which is closer, x or y"
            third_reading = list(
                itertools.dropwhile(lambda clause: not clause.has_cues, self.clauses)
            )
        if any(clause.names for clause in third_reading):
            readings.append(_join_clauses(third_reading))
        readings += self._list_readings_by_sentences()
        for reading in tuple(readings):
            readings += _list_readings_without_asides(reading)
        return readings

    def _list_readings_by_sentences(self) -> list[Skeleton]:
        """List the skeletons of the sentences that may ask the whole question.

        Others tell what the question is about: "My tape measure is too short. How far is the mug?".
        """
        if len(self.sentences) <= 1:
            return []
        # From each later sentence to the end
        readings = [self.clauses[sentence.start :] for sentence in self.sentences[1:]]
        words_of_last_sentence = _join_clauses(readings[-1]).words
        untaught_words = WORDS["untaught"] | WORDS["adjectives"]
        asks_untaught = any(word in untaught_words for word in words_of_last_sentence)
        if not asks_untaught:
            # Each sentence alone, and from the beginning to each sentence
            for sentence in self.sentences:
                readings.append(self.clauses[sentence.start : sentence.stop])
            readings += [self.clauses[: sentence.stop] for sentence in self.sentences[1:]]
        skeletons = [_join_clauses(clauses) for clauses in readings]
        skeletons = [skeleton for skeleton in skeletons if skeleton.has_cues]
        if any(PIXEL in clause.words for clause in self.clauses):
            return [skeleton for skeleton in skeletons if PIXEL in skeleton.words]
        return [skeleton for skeleton in skeletons if skeleton.names]

    def _is_part_of_what_is_asked(self, clause: Skeleton) -> bool:
        """Return whether a clause says what is asked."""
        if clause.has_cues:
            return True
        others_name_object = any(sibling.has_cues and sibling.names for sibling in self.clauses)
        is_aside = clause.has_bare_names and others_name_object  # as in "for grasp planning, …"
        is_in_list = clause.words == [NAME] and clause is not self.clauses[0]
        if is_in_list:  # as in "distance sponge, towel"
            return True
        is_unrelated = UNEXPLAINED in clause.words or ACTION in clause.words
        return not is_unrelated and not is_aside


def read_question(question: str) -> QuestionReading:
    """Read the skeletons of a question's clauses, and the pixel that it mentions."""
    capitalized = frozenset(word.casefold() for word in _CAPITALIZED.findall(question))
    text = question.casefold().replace("’", "'")
    text = _QUOTATION_MARKS.sub(" ", text)
    text = _PHRASES.sub(lambda match: PHRASES[match[0]], text)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    text, pixel = _replace_pixel(text)

    clauses: list[Skeleton] = []
    sentences: list[range] = []  # of each sentence, the indices of its clauses
    tokens: list[str] = []  # of the clause that is being read
    for token in [*_split_words(text), "."]:
        if token not in _ENDS_OF_CLAUSES:
            is_noun = tokens and tokens[-1] in WORDS["determiners"]
            word = token if is_noun else VERBS.get(token, token)
            tokens.append(_correct_spelling(word))
        elif tokens:
            tokens = _replace_possessives_of_people(tokens)
            clauses.append(_Clause(tokens, capitalized).read_skeleton())
            tokens = []
        first_clause_index = sentences[-1].stop if sentences else 0
        has_new_clause = first_clause_index < len(clauses)
        if token in _ENDS_OF_SENTENCES and has_new_clause:
            sentences.append(range(first_clause_index, len(clauses)))
    return QuestionReading(clauses, sentences, pixel)


def is_name(text: str, question: str) -> bool:
    """Return whether the text that fills a gap of a template is a name.

    The comments have examples of texts that are no names.
    """
    first_word, *_ = text.casefold().split()
    *other_words, last_word = text.casefold().split()
    if any(word in _WORDS_BESIDE_NAMES for word in other_words):
        return False  # "shadow of the mug"
    if last_word in WORDS["times"]:
        return False  # "next summer"
    if other_words and SPELLINGS.get(last_word, last_word) in CUES["center"]:
        return False  # "mug center"
    if first_word in CUES["motion"]:
        return False  # "reach the mug"
    if any(word in _WORDS_OF_SENTENCES for word in other_words):
        return False  # "whether the gripper is closed"
    has_article = re.search(rf"\b(?:the|an?) {re.escape(text)}", question, re.IGNORECASE)
    if not has_article and re.match("[A-Z][a-z]", text):
        return False  # "Paris"
    # The last check is for "elephant from us" and "mug please".
    words_after_names = WORDS["common"] | WORDS["references"] | CUES["image"] | CUES["in_3d"]
    return not other_words or last_word not in words_after_names


def _join_clauses(clauses: Sequence[Skeleton]) -> Skeleton:
    """Join the skeletons of clauses.

    If "cube" and "red cube" are named, they are the same object. A surface such as "table" only
    says where an object is, if another object is named.
    """
    words = [word for clause in clauses for word in clause.words]
    names = [name for clause in clauses for name in clause.names]
    definite_names = {name for clause in clauses for name in clause.definite_names}
    for index, name in enumerate(names):
        longer_names = [longer_name for longer_name in names if longer_name.endswith(f" {name}")]
        if longer_names:
            names[index] = longer_names[0]

    if not WORDS["surfaces"].issuperset(names):
        words, names = _drop_names(words, names, WORDS["surfaces"])
    if len(set(names)) > _MAX_OBJECTS:
        words, names = _drop_names(words, names, WORDS["movers"])
    return Skeleton(words, names, definite_names=definite_names)


def _list_readings_without_asides(skeleton: Skeleton) -> list[Skeleton]:
    """List the readings of a skeleton without what may not be asked about.

    These are the names without "the", if there are others, as in "My robot needs a number, how far
    is the mug?"; the names, if a pixel is asked about; and the pixel, if an object is.
    """
    readings: list[Skeleton] = []
    names = set(skeleton.names)
    asides = names - skeleton.definite_names
    if not skeleton.definite_names:
        asides = {name for name in names if name.split()[-1] in WORDS["no_objects"]}
    if asides and asides != names:
        readings.append(Skeleton(*_drop_names(skeleton.words, skeleton.names, asides)))
    is_choice = f"{NAME} or {NAME}" in " ".join(skeleton.words)
    if PIXEL in skeleton.words and skeleton.names and not is_choice:
        readings.append(Skeleton([word for word in skeleton.words if word != NAME]))
    if PIXEL in skeleton.words and skeleton.definite_names:
        words = [word for word in skeleton.words if word != PIXEL]
        readings.append(Skeleton(words, skeleton.names))
    return readings


def _drop_names(
    words: Sequence[str], names: Sequence[str], dropped: Collection[str]
) -> tuple[list[str], list[str]]:
    """Drop some names, and the words `NAME` that stand for them."""
    names_in_order = iter(names)  # the n-th word `NAME` stands for the n-th name
    remaining_words: list[str] = []
    for word in words:
        is_dropped = word == NAME and next(names_in_order) in dropped
        if not is_dropped:
            remaining_words.append(word)
    return remaining_words, [name for name in names if name not in dropped]


def _replace_pixel(text: str) -> tuple[str, tuple[float, float] | None]:
    """Replace the coordinates of a pixel by `PIXEL`. Return the text and (x, y)."""
    for pattern in _ROWS_AND_COLUMNS:
        match = pattern.search(text)
        if match:
            row, column = match.groups()
            return _replace_match_by_pixel_word(text, match), (float(column), float(row))
    for pattern in _PIXELS:
        match = pattern.search(text)
        if match:
            x, y = match.groups()
            return _replace_match_by_pixel_word(text, match), (float(x), float(y))
    return text, None


def _replace_match_by_pixel_word(text: str, match: re.Match[str]) -> str:
    """Replace what a pattern matches by `PIXEL`."""
    return f"{text[: match.start()]} {PIXEL} {text[match.end() :]}"


def _split_words(text: str) -> list[str]:
    """Split a text in tokens; also at the hyphens of words such as "camera-to-mug"."""
    tokens: list[str] = []
    for token in _TOKENS.findall(text):
        subwords = token.split("-")
        if token in VOCABULARY or VOCABULARY.isdisjoint(subwords):
            tokens.append(token)
        else:
            tokens += [subword for subword in subwords if subword]
    return tokens


def _replace_possessives_of_people(tokens: Sequence[str]) -> list[str]:
    """Write "grandma's mug" as "his mug", for owners that are people or programs."""
    words: list[str] = []
    for token in tokens:
        if token == "'s" and words and words[-1] in WORDS["people_and_programs"]:
            words[-1] = "his"
        else:
            words.append(token)
    return words


def _correct_spelling(token: str) -> str:
    """Return the word of `VOCABULARY` that a token probably means, or the token."""
    token = SPELLINGS.get(token, token)
    is_known = token in VOCABULARY or token in WORDS["look_alikes"]
    if is_known or len(token) < MIN_TYPO_LETTERS:
        return token
    targets = [word for word in _TYPO_TARGETS if word[0] == token[0]]
    for target in targets:
        if _has_swapped_letters(token, target):
            return target
    matches = difflib.get_close_matches(token, targets, n=1, cutoff=TYPO_SIMILARITY)
    return matches[0] if matches else token


def _has_swapped_letters(token: str, word: str) -> bool:
    """Return whether a token is a word with two neighboring letters swapped, as in "camrea"."""
    if len(token) != len(word):
        return False
    wrong = [index for index, letter in enumerate(word) if token[index] != letter]
    if len(wrong) != 2 or wrong[1] != wrong[0] + 1:
        return False
    first, second = wrong
    return token[first] == word[second] and token[second] == word[first]


@dataclass(frozen=True)
class _Clause:
    """A clause of a question.

    Attributes:
        tokens: Its words and punctuation marks.
        capitalized: The words of the question that are capitalized though no sentence begins with
            them.
    """

    tokens: Sequence[str]
    capitalized: frozenset[str]

    def read_skeleton(self) -> Skeleton:
        """Read the skeleton."""
        skeleton = Skeleton()
        index = 0
        while index < len(self.tokens):
            end = self._find_end_of_name(index)
            if self._token_at(end) in WORDS["people_and_programs"]:
                index = end + 1  # "my boss", "the safety officer"
            elif end == index:
                skeleton.words += self._read_word(self.tokens[index])
                index += 1
            elif self._neighbors_suggest_name(index, end):
                self._add_name(index, end, skeleton)
                index = end
            else:
                is_property = self._token_at(index - 1) == "'s"  # as in "the mug's handle"
                skeleton.words += [PROPERTY if is_property else UNEXPLAINED] * (end - index)
                index = end
        return skeleton

    def _token_at(self, index: int) -> str:
        """Return a token; "" before the first and after the last."""
        return self.tokens[index] if 0 <= index < len(self.tokens) else ""

    def _read_word(self, token: str) -> list[str]:
        """Return what a word that is no name adds to the skeleton."""
        if token in WORDS["determiners"] or token == "'s" or token.isdigit():
            return []
        if token in "=~#+{}|" or token in WORDS["speaking"]:
            return []
        is_known = token in VOCABULARY or token == PIXEL or _is_adverb(token)
        return [token] if is_known else [UNEXPLAINED]

    def _add_name(self, start: int, end: int, skeleton: Skeleton) -> None:
        """Add the name tokens[start:end] to a skeleton."""
        words = list(self.tokens[start:end])
        skeleton.words.append(NAME)
        if self._ends_with_verb(start, end):
            words.pop()
            skeleton.words.append(UNEXPLAINED)
        skeleton.names.append(" ".join(words))
        if self._is_definite(start) and words[-1] not in WORDS["no_objects"]:
            skeleton.definite_names.add(skeleton.names[-1])
        skeleton.has_bare_names |= not self._is_after_determiner(start)

    def _is_after_determiner(self, index: int) -> bool:
        return self._token_at(index - 1) in WORDS["determiners"]

    def _is_definite(self, index: int) -> bool:
        """Return whether "the" or the like stands before a name, as in "the whole bottle"."""
        if self._token_at(index - 1) in WORDS["common"]:
            index -= 1
        return self._token_at(index - 1) in WORDS["definite"]

    def _is_participle_before_preposition(self, index: int) -> bool:
        """Return whether a word is no name but a participle: "vector leading from x to y"."""
        token = self._token_at(index)
        is_before_preposition = self._token_at(index + 1) in WORDS["name_prepositions"]
        has_ending = token.endswith("ing") and len(token) >= _MIN_PARTICIPLE_LETTERS
        return has_ending and is_before_preposition and not self._is_after_determiner(index)

    def _find_end_of_name(self, start: int) -> int:
        """Find the index behind the words from `start` on that may be a name.

        "box" and "can" are words of `VOCABULARY`, but may also be a name or its last word.

        Returns:
            The index; `start` if no name begins at `start`.
        """
        end = start
        while self._is_adjective_of_name(end, start):
            end += 1
        while _may_be_in_name(self._token_at(end)):
            end += 1

        last_word = self._token_at(end)
        if last_word == "can" and self._is_noun_can(start, end):
            return end + 1
        if last_word == "box" and self._is_noun_box(start, end):
            return end + 1
        if end > start and last_word == "of" and _may_be_in_name(self._token_at(end + 1)):
            return end + 2  # "cup of tea"
        return end

    def _is_adjective_of_name(self, index: int, start: int) -> bool:
        """Return whether a word describes a noun after it, as "big" in "the big bowl"."""
        is_adjective = self._token_at(index) in WORDS["adjectives"] | WORDS["untaught"]
        is_before_noun = _may_be_in_name(self._token_at(index + 1))
        return is_adjective and is_before_noun and self._is_after_determiner(start)

    def _is_noun_can(self, start: int, end: int) -> bool:
        """Return whether "can" at `end`, after tokens[start:end], belongs to a name."""
        next_token = self._token_at(end + 1)
        if end > start or self._is_after_determiner(start):
            if self._token_at(start - 2) == "let":
                return True  # "let the can be the origin"
            verbs_follow = WORDS["references"] | WORDS["determiners"] | {"be"}
            return next_token == "that" or next_token not in verbs_follow
        words_before_names = WORDS["name_prepositions"] | CUES["difference"] | {"distance"}
        is_named = self._token_at(start - 1) in words_before_names
        if is_named and next_token in _CUES_AFTER_NAMES:
            return True  # "camera to can distance"
        if start == 0 and next_token in _NOUNS_AFTER_NAMES:
            return True  # "can depth"
        return next_token in ("", "to", "or", "and", "in", "from", "'s")

    def _is_noun_box(self, start: int, end: int) -> bool:
        """Return whether "box" at `end`, after tokens[start:end], belongs to a name.

        "box" is the noun of "the cardboard box" and of "the box", but not of "mug box corners".
        """
        next_token = self._token_at(end + 1)
        is_after_determiner = self._is_after_determiner(start)
        if end > start and self._token_at(end - 1) in WORDS["kinds_of_boxes"]:
            return True  # "cardboard box"
        if end > start and is_after_determiner:  # "the red box", but not "the mug box corners"
            other_cues = CUES["projecting"] | CUES["corners"]
            return next_token not in CUES["corners"] and other_cues.isdisjoint(self.tokens)
        if end > start:  # "red box"
            other_cues = CUES["corners"] | CUES["solid"] | CUES["projecting"]
            return other_cues.isdisjoint(self.tokens)
        is_end = next_token in ("", "and", "or", "from", "is", "over", "than", "to", "'s")
        if not is_after_determiner:  # "hammer to box"
            return start > 1 and self._token_at(start - 1) == "to" and next_token == ""
        if next_token == "or":
            return True  # "the box or the mug"
        # "is the box closer than the mug", but not "which box around the mug is closer"
        bounding_box_words = CUES["corners"] | CUES["bounding"] | CUES["solid"] | {"around"}
        compares = any(token in CUES["comparative"] for token in self.tokens)
        mentions_bounding_box = any(token in bounding_box_words for token in self.tokens)
        if compares and not mentions_bounding_box:
            return True
        has_center_before = any(token in CUES["center"] for token in self.tokens[:start])
        if next_token == "in" and has_center_before:
            return True  # "the 3D center of the box in meters"
        before_names = WORDS["name_prepositions"] | WORDS["speaking"]
        is_after_preposition = self._token_at(start - 2) in before_names | _BEFORE_BOXES
        return is_after_preposition and is_end

    def _neighbors_suggest_name(self, start: int, end: int) -> bool:
        """Return whether tokens[start:end] stand where questions name objects.

        Such a place is after an article, a preposition or a cue ("distance mug"). Another one is
        the beginning of the clause, if a cue or the like follows ("mug distance", "mug or bowl").
        """
        previous_token = self._token_at(start - 1)
        next_token = self._token_at(end)
        if self._is_after_determiner(start) and previous_token != "that":
            return True  # "the [mug]"
        first_word = self.tokens[start]
        is_infinitive = previous_token == "to" and (
            next_token == "to" or first_word.endswith("ing")
        )
        is_in_choice = (
            previous_token == "or" and self._token_at(end + 1) in CUES["comparative"]
        )  # "is mug or bowl the closest"
        is_before_its = previous_token == "" and next_token == "its"  # "mug, its center"
        is_verb = next_token in _AFTER_VERBS and not is_in_choice and not is_before_its
        if is_verb or is_infinitive:
            return False  # "to [crop] a photo", "to [reach] to the mug"
        is_after_adjective = previous_token in WORDS["common"] | CUES["superlative"]
        if previous_token == "that" or (
            is_after_adjective and self._is_after_determiner(start - 1)
        ):
            return True  # "is that [mug]", "the whole [bottle]"
        if first_word in self.capitalized or self._is_participle_before_preposition(start):
            return False  # "the offset [leading] from the mug"
        is_before_cue = next_token in _CUES_AFTER_NAMES or next_token == "'s"
        is_before_cue |= self.tokens[end : end + 2] == ["away", "from"]
        if previous_token == "":
            # "[mug] distance" and "[mug] or bowl", but not "[count] all bowls"
            return is_before_cue or next_token in _AFTER_FIRST_NAMES
        if (
            previous_token in CUE_WORDS - CUES["image"]
            or previous_token in WORDS["name_prepositions"]
        ):
            return True  # "distance [mug]", "from [bowl]"
        if previous_token in WORDS["references"]:
            # "distance camera [mug]", but not "the camera [rolled] forward"
            return is_before_cue or next_token == ""
        # "compute [bottle] position", but not "how many [steps]"
        return is_before_cue and previous_token in WORDS["common"]

    def _ends_with_verb(self, start: int, end: int) -> bool:
        """Return whether the last word of a name is a verb, as in "does the ball roll"."""
        first = start - 1 if self._is_after_determiner(start) else start
        next_token = self._token_at(end)
        is_end = next_token == "" or next_token in WORDS["name_prepositions"] - {"and", "or"}
        is_after_auxiliary = self._token_at(first - 1) in WORDS["auxiliaries"]
        return end - start > 1 and is_after_auxiliary and is_end


def _may_be_in_name(token: str) -> bool:
    """Return whether a token may be part of a name: a word that is not in `VOCABULARY`."""
    is_known = token in VOCABULARY or token == PIXEL or _is_adverb(token)
    return not is_known and token[:1].isalpha()


def _is_adverb(token: str) -> bool:
    """Return whether a word is an adverb such as "roughly"."""
    has_ending = token.endswith("ly") and not token.endswith("fly")  # "butterfly" is a name
    return has_ending and len(token) >= _MIN_ADVERB_LETTERS
