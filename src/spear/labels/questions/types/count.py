"""Questions for the number of objects with a name. The answer is the number as a word ("2")."""

from spear.labels.questions.interface import Draft, QuestionScene, QuestionType, Random, sample_one
from spear.labels.questions.templates import EVERYDAY_NAMES, can_be_called

PROMPTS = (
    "How many objects called {x} are there?",
    "Count the objects named {x}",
    "What is the number of objects called {x}?",
    "How often does the image show an object called {x}?",
    "How many times do you see: {x}?",
)

VISIBLE_FRACTION = 0.8  # of the questions ask about an object that the image shows (our choice)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask how many objects of some name there are; sometimes there are none."""
    visible_names = [o.name for o in scene.label.objects]
    is_visible = bool(visible_names) and rng.random() < VISIBLE_FRACTION
    name = sample_one(visible_names if is_visible else EVERYDAY_NAMES, rng)
    num_exact = sum(
        can_be_called(visible_name, name, exact_noun=True) for visible_name in visible_names
    )
    num_meant = sum(can_be_called(visible_name, name) for visible_name in visible_names)
    # If there are objects with a synonym of the name, it is open whether they count.
    if num_exact != num_meant:
        return None
    return Draft({"x": name}, [str(num_exact)], (name,))


QUESTION_TYPE = QuestionType(prompts=PROMPTS, draft=_draft, answer_texts=tuple("0123456789"))
