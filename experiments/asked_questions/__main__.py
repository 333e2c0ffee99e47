"""Count how often `spear ask` understands the questions of a list.

python -m experiments.asked_questions               # cross-validates the classifier's questions
python -m experiments.asked_questions LIST.toml --picture sim:7 --misses
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.asked_questions import (
    ListedQuestion,
    find_cross_validated_misses,
    find_misses,
    load_list,
)
from spear.cli import run_reporting_errors
from spear.evaluate.vqa.ask import AskSettings, ask_question, load_or_render_picture
from spear.evaluate.vqa.calibration import Trust
from spear.evaluate.vqa.classifier import EXAMPLES_FILE
from spear.models.weights.folders import BUNDLED_WEIGHTS, read_taught_question_types
from spear.policy import load_vlm

MODEL = "nano-vlm"


@dataclass(frozen=True)
class Options:
    """Count how often `spear ask` understands the questions of a list.

    Args:
        list: the list, a TOML file; without one, the classifier's own questions, cross-validated.
        picture: a picture without the absent objects; the model is asked about them in it.
        misses: print the questions that were not understood, or not refused.
    """

    list: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="LIST")]] = None
    picture: str | None = None
    misses: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = tyro.cli(Options, args=arguments)
    taught_types = read_taught_question_types(BUNDLED_WEIGHTS / MODEL) or set()
    if options.list is None:
        questions = load_list(EXAMPLES_FILE)
        misses = find_cross_validated_misses(questions, taught_types)
    else:
        questions = load_list(options.list)
        misses = find_misses(questions, taught_types)

    for group, verb in [
        ("taught", "understood"),
        ("untaught", "refused"),
        ("absent", "understood, about absent objects"),
    ]:
        total = [listed for listed in questions if listed.group(taught_types) == group]
        wrong = [listed for listed in misses if listed.group(taught_types) == group]
        print(f"{len(total) - len(wrong)} of {len(total)} {verb}")
        if options.misses:
            print("".join(f"    {listed.question}\n" for listed in wrong), end="")
    if options.picture:
        print_absence(questions, options.picture, taught_types)


def print_absence(
    questions: Sequence[ListedQuestion], source: str, taught_types: Collection[str]
) -> None:
    """Print how often the model says that absent objects are not in a picture."""
    model = load_vlm(MODEL)
    picture = load_or_render_picture(source, model.processor.image_sizes["external"]).image
    settings = AskSettings(trust=Trust.load(BUNDLED_WEIGHTS / MODEL), taught_types=taught_types)
    absent = [listed for listed in questions if listed.is_absent]
    num_said = 0
    for listed in absent:
        answer, reply = ask_question(model, picture, listed.question, settings=settings)
        if answer is None and reply.startswith("not in the picture"):
            num_said += 1
        else:
            print(f"    {listed.question}\n      {reply}")
    print(f"{num_said} of {len(absent)} said to be absent from {source}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
