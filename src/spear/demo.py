"""The demo: it runs the pipeline from images to a moving robot, and reports it on one HTML page.

Every number on the page comes with its sample count and interval.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from spear.data.readers.formats import count_episodes, get_dataset_name
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.prepare import open_or_prepare_store
from spear.errors import SpearError
from spear.evaluate import closed_loop, film, open_loop
from spear.evaluate.agents import ExpertAgent, IdleAgent, PolicyAgent
from spear.evaluate.options import QuestionOptions, TabletopOptions
from spear.evaluate.results import Results
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.ask import render_held_out_frames
from spear.labels.fit.accuracy import compare_labels
from spear.labels.pipeline import label_with_ground_truth
from spear.policy import Spear1Policy, VlmBundle, load_vlm, locate_checkpoint
from spear.report.comparison import describe_ending, draw_open_loop_actions
from spear.report.draw import draw_label
from spear.report.page import render, replace_underscores
from spear.report.plot import draw_bars, make_rate_bars
from spear.report.vqa import draw_answer_and_truth
from spear.sim.scene import FAMILIES
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.run import train
from spear.types import CONTROL_RATE_HZ
from spear.util.files import write_text
from spear.util.images import to_jpeg_data_uri

NUM_SCENES = 40
"""Closed-loop scenes per task family. A success rate then has an interval of ± 15 points, and the
evaluation takes a few minutes."""
NUM_QUESTION_SCENES = 60  # SPEAR-VLM is asked about the scenes 0, 1, … 59
NUM_LABEL_SCENES = 30  # number of scenes that are labeled
FIRST_LABEL_SCENE = 100  # seed of the first labeled scene
LABEL_SIZE = (240, 160)  # width and height of the labeled images, in pixels
NUM_LABEL_PICTURES = 4  # labeled images on the page
NUM_ANSWER_PICTURES = 6  # images with an answer on the page
FINE_TUNE_STEPS = 600  # training steps of the fine-tuning
HELD_OUT_FRACTION = 0.25  # fraction of a real dataset's episodes that fine-tuning does not see
MAX_EPISODES = 400  # of a larger dataset, only its first episodes are used
ERROR_NAMES = {
    "translation_mm": ("translation of one step, mm", ".2f"),
    "chunk_end_mm": ("where five steps lead, mm", ".2f"),
    "rotation_deg": ("rotation of one step, degrees", ".2f"),
    "gripper_accuracy": ("gripper command right", ".0%"),
}
"""Error of open-loop evaluation -> its name on the page, and its number format."""

Values = dict[str, Any]
"""The values that a section of templates/demo.html.j2 shows, by name.

The value "fact" is a pair for a card at the top of the page: a number, and its meaning.
"""


def write_report(out: Path, data: Path | None = None) -> Path:
    """Run the pipeline on small examples, and write a report.

    Args:
        out: folder of the report and of intermediate results.
        data: folder of real robot episodes (RLDS, LeRobot); without it nothing is fine-tuned.

    Returns:
        The report, `out/index.html`.

    Raises:
        SpearError: the package has no trained weights, or the data cannot be read.
    """
    console = Console(stderr=True)
    start_s = time.perf_counter()

    # Find a missing encoder of films, or mistakes in the data, before minutes of work.
    film.import_pyav()
    if data is not None:
        _prepare_and_split_episodes(data, out)

    vlm = load_vlm("nano-vlm")
    policy = Spear1Policy.load("nano")
    disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    # Name of a section in the template -> its title in the terminal, and what makes its values.
    sections: dict[str, tuple[str, Callable[[], Values]]] = {
        "labels": ("a. labeling a scene in 3D", label_scenes),
        "answers": (
            "b. asking SPEAR-VLM about held-out scenes",
            lambda: ask_and_score_questions(vlm),
        ),
        "acting": ("c. SPEAR-1 acting in held-out scenes", lambda: evaluate_policy(policy)),
        "real": ("d. fine-tuning on real robot episodes", lambda: fine_tune(out, data)),
    }
    values_of_section: dict[str, Values] = {}
    for name, (title, make_values) in sections.items():
        console.print(title)
        section_start_s = time.perf_counter()
        values = make_values()
        values_of_section[name] = {**values, "seconds": time.perf_counter() - section_start_s}

    facts = [values["fact"] for values in values_of_section.values() if "fact" in values]
    total_min = (time.perf_counter() - start_s) / 60
    facts.append((f"{total_min:.1f} min", "to make this page"))
    title = "SPEAR-1 nano: from images to a robot that moves"
    page = out / "index.html"
    write_text(page, render("demo.html", title=title, facts=facts, **values_of_section))
    return page


def label_scenes() -> Values:
    """(a) Label scenes with the pipeline, and compare its boxes with the simulator's true ones."""
    frames = list(render_held_out_frames(NUM_LABEL_SCENES, FIRST_LABEL_SCENE, LABEL_SIZE))
    labels = list(label_with_ground_truth(iter(frames)))

    pictures = []
    for index, label in enumerate(labels[:NUM_LABEL_PICTURES]):
        caption = f"scene {FIRST_LABEL_SCENE + index}, objects: {len(label.objects)}"
        pictures.append((to_jpeg_data_uri(draw_label(label, scale=4)), caption))
    return {
        "pictures": pictures,
        "accuracy": compare_labels(labels, frames),
        "scenes": NUM_LABEL_SCENES,
    }


def ask_and_score_questions(vlm: VlmBundle) -> Values:
    """(b) Ask SPEAR-VLM questions, and score its answers by the true ones."""
    size = vlm.processor.image_sizes["external"]
    frames = render_held_out_frames(NUM_QUESTION_SCENES, first_seed=0, size=size)
    labels = list(label_with_ground_truth(frames))
    scores = vqa.evaluate_vqa(vlm, labels, QuestionOptions())

    # Show the first answer about a box in each image.
    answer_of_image: dict[int, Any] = {}
    for answer in scores.answers:
        if answer.question.question_type == "box_vertices" and "error" in answer.measures:
            answer_of_image.setdefault(answer.image, answer)
    pictures = [draw_answer_and_truth(answer) for _, answer in sorted(answer_of_image.items())]

    boxes = scores.type_scores["box_vertices"]
    error_mm = boxes.measures["error"].value
    constant_guess_mm = boxes.constant["error"]
    description = f"median 3D center error; constant guess {constant_guess_mm:.0f} mm"
    return {
        "pictures": pictures[:NUM_ANSWER_PICTURES],
        "table": scores.rows(),
        "fact": (f"{error_mm:.0f} mm", description),
    }


def evaluate_policy(policy: Spear1Policy) -> Values:
    """(c) Evaluate the policy in closed loop, compared with the scripted expert and with idleness.

    The scripted expert is an upper bound, and an agent that does nothing a lower one.
    """
    agent = PolicyAgent(policy, "SPEAR-1 nano")
    options = TabletopOptions(num_scenes=NUM_SCENES, videos=1, tasks=FAMILIES)
    result, films = closed_loop.evaluate_tabletop(agent, options)
    results = [result]
    without_films = TabletopOptions(num_scenes=NUM_SCENES, videos=0, tasks=FAMILIES)
    for other_agent in (ExpertAgent(), IdleAgent()):
        other_result, _ = closed_loop.evaluate_tabletop(other_agent, without_films)
        results.append(other_result)

    rates = []
    for family in FAMILIES:
        rate_of_agent = []
        for agent_result in results:
            success_rate = agent_result.summarize(family).success
            rate_of_agent.append((agent_result.policy, success_rate))
        rates.append((replace_underscores(family), make_rate_bars(rate_of_agent)))
    captioned_films = []
    for recorded_film in films:
        outcome = recorded_film.outcome
        family = replace_underscores(outcome.family)
        caption = f"{family}, scene {outcome.seed}: {describe_ending(outcome)}"
        captioned_films.append((recorded_film.data, caption))

    success = result.summarize().success
    description = f"mean success [{success.low:.0%}, {success.high:.0%}], n = {success.n}"
    return {
        "scenes": NUM_SCENES,
        "rates": draw_bars(rates),
        "rows": [_format_family_row(result, family) for family in FAMILIES],
        "films": captioned_films,
        "fact": (f"{result.mean_success().value:.0%}", description),
    }


def _format_family_row(result: Results, family: str) -> list[str]:
    """Return a table row: how often each part of a task succeeded, and the steps of a success."""
    summary = result.summarize(family)
    rates = (summary.reached, summary.grasped, summary.success, summary.wrong_object)
    steps = "–"
    if summary.steps is not None:
        steps = f"{summary.steps:.0f} ({summary.steps / CONTROL_RATE_HZ:.0f} s)"
    return [replace_underscores(family), *(f"{rate.value:.0%}" for rate in rates), steps]


def fine_tune(out: Path, data: Path | None) -> Values:
    """(d) Fine-tune the shipped policy on real episodes, and measure its errors on held-out ones.

    Args:
        out: the demo's folder, in which the episodes are prepared and the weights are written.
        data: folder of real robot episodes; without it the section says that none were given.
    """
    if data is None:
        return {"source": None}
    training, held_out = _prepare_and_split_episodes(data, out)
    dataset = WeightedStore(data.name, training, weight=1.0)
    inputs = TrainingInputs(episodes=[dataset], init=locate_checkpoint("nano"))
    recipe = get_recipe("nano-post").with_changes(steps=FINE_TUNE_STEPS)
    final = train(recipe, _get_fine_tuning_folder(out, training), inputs)

    fine_tuned_policy = Spear1Policy.load(str(final))
    fine_tuned_errors = open_loop.measure_policy_errors("fine-tuned", fine_tuned_policy, held_out)
    mean_action_errors = open_loop.measure_constant_mean_action_errors(training, held_out)
    last_action_errors = open_loop.measure_repeated_action_errors(held_out)
    original_policy = Spear1Policy.load("nano")
    original_errors = open_loop.measure_policy_errors(
        "before fine-tuning", original_policy, held_out
    )
    scores = [fine_tuned_errors, mean_action_errors, last_action_errors, original_errors]
    summaries = [score.estimate_mean_errors() for score in scores]
    rows = []
    for name, (description, number_format) in ERROR_NAMES.items():
        cells = [summary[name].to_text(number_format) for summary in summaries]
        rows.append([description, *cells])

    fine_tuned_summary, mean_action_summary, *_ = summaries
    error_mm = fine_tuned_summary["translation_mm"].value
    mean_action_mm = mean_action_summary["translation_mm"].value
    description = f"error per step on real held-out episodes; mean action {mean_action_mm:.1f} mm"
    return {
        "source": get_dataset_name(data),
        "learned": len(training),
        "held_out": len(held_out),
        "steps": FINE_TUNE_STEPS,
        "headers": ["mean error [95 %]", *(score.name for score in scores)],
        "rows": rows,
        "charts": draw_open_loop_actions(fine_tuned_errors, mean_action_errors),
        "fact": (f"{error_mm:.1f} mm", description),
    }


def _get_fine_tuning_folder(out: Path, training: EpisodeStore) -> Path:
    """Return the folder for fine-tuning the shipped weights on these episodes.

    The folder's name has a hash of both, so that other weights or episodes get another folder.
    """
    weights = (locate_checkpoint("nano") / "model.safetensors").read_bytes()
    store_path = str(training.path.resolve()).encode()
    key = hashlib.sha256(store_path + weights).hexdigest()[:8]
    return out / f"fine-tuned-{key}"


def _prepare_and_split_episodes(source: Path, out: Path) -> tuple[EpisodeStore, EpisodeStore]:
    """Prepare a dataset's episodes in the folder `out`, unless an earlier call has done so.

    Returns:
        The first episodes, for training, and the last ones, which are held out.
    """
    split, num_in_split = next(iter(count_episodes(source).items()))  # the first split
    num_used = min(MAX_EPISODES, num_in_split)
    num_held_out = max(1, round(HELD_OUT_FRACTION * num_used))
    num_training = num_used - num_held_out
    if num_training < 1:
        raise SpearError(
            f"the split {split!r} of {source} has too few episodes ({num_used}). Give at least 2."
        )
    training = open_or_prepare_store(source, out, f"{split}[:{num_training}]").store
    held_out = open_or_prepare_store(source, out, f"{split}[{num_training}:{num_used}]").store
    return training.drop_failed_episodes(), held_out.drop_failed_episodes()
