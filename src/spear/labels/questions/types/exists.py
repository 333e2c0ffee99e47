"""Questions whether the image shows an object. The answer is "yes" or "no"."""

from spear.labels.questions.interface import Draft, QuestionScene, QuestionType, Random, sample_one
from spear.labels.questions.templates import EVERYDAY_NAMES, can_be_called, with_article

PROMPTS = (
    "Is there {x} in the image?",
    "Can you see {x}?",
    "Does the picture show {x}?",
    "Does the image contain {x}?",
    "Do you find {x} here?",
)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask whether there is an object of some name; half of the time there is."""
    visible_names = [o.name for o in scene.label.objects]
    if visible_names and rng.random() < 0.5:
        name = sample_one(visible_names, rng)
        answer = "yes"
    else:
        name = sample_one(EVERYDAY_NAMES, rng)
        answer = "no"
        if any(_may_mean(visible_name, name) for visible_name in visible_names):
            return None
    return Draft({"x": with_article(name, definite=False)}, [answer], (name,))


def _may_mean(visible_name: str, asked_name: str) -> bool:
    """Whether an object's name, or a word of it, may mean what `asked_name` asks for."""
    words = visible_name.replace("_", " ").split()
    return any(can_be_called(candidate, asked_name) for candidate in (visible_name, *words))


QUESTION_TYPE = QuestionType(prompts=PROMPTS, draft=_draft, answer_texts=("yes", "no"))
