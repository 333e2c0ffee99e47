"""The main job: from images to a robot that moves, on one HTML page with every number's n and interval."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from spear.data.readers.formats import count_episodes, get_dataset_name
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.prepare import open_store
from spear.errors import SpearError
from spear.evaluate import closed_loop, film, open_loop
from spear.evaluate.agents import ExpertAgent, IdleAgent, PolicyAgent
from spear.evaluate.options import QuestionOptions, TabletopOptions
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.ask import render_held_out_frames
from spear.labels.fit.quality import compare_labels
from spear.labels.pipeline import label_with_ground_truth
from spear.policy import Spear1Policy, VlmBundle, load_vlm, locate
from spear.report.comparison import ending, open_loop_charts
from spear.report.draw import draw_label
from spear.report.page import render, spaced
from spear.report.plot import bars, rate_bars
from spear.report.vqa import figure
from spear.sim.scene import FAMILIES
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.run import train
from spear.util.files import write_text
from spear.util.images import to_jpeg_data_uri

SCENES = 40
"""Closed-loop scenes per family: an interval of ± 15 points at most, in a few minutes."""
QUESTION_SCENES = 60
"""Scenes 0, 1, … that SPEAR-VLM is asked about."""
LABEL_SCENES, LABEL_SEED, LABEL_SIZE = 30, 100, (240, 160)
"""How many scenes are labelled, from which seed on, in pictures of which (width, height) in pixels."""
FINE_TUNE_STEPS = 600
HELD_OUT = 0.25
"""The part of a real dataset's episodes that the fine-tuning does not see."""
MOST_EPISODES = 400
"""Of a larger dataset, so many episodes are used."""

Values = dict[str, Any]
"""What a part of templates/demo.html.j2 shows; its "fact" is a card on top: a number, and what it is."""


def make(out: Path, data: Path | None = None) -> Path:
    """Write `out`/index.html and return its path.

    data  a folder with real robot episodes (RLDS, LeRobot); without it there is no fine-tuning.

    Raises SpearError when the package has no trained weights, or for data that cannot be read.
    """
    log, started = Console(stderr=True), time.perf_counter()
    film.import_encoder()  # what is wrong is said before minutes of other work
    if data is not None:
        _split(data, out)
    vlm, policy = load_vlm("nano-vlm"), Spear1Policy.load("nano")
    disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, tuple[str, Callable[[], Values]]] = {
        "labels": ("a. labelling a scene in 3D", labelled_scenes),
        "answers": ("b. asking SPEAR-VLM about held-out scenes", lambda: answers(vlm)),
        "acting": ("c. SPEAR-1 acting in held-out scenes", lambda: robot_at_work(policy)),
        "real": ("d. fine-tuning on real robot episodes", lambda: real_episodes(out, data)),
    }
    parts: dict[str, Values] = {}
    for name, (title, job) in jobs.items():
        log.print(title)
        begun = time.perf_counter()
        parts[name] = {**job(), "seconds": time.perf_counter() - begun}
    facts = [values["fact"] for values in parts.values() if "fact" in values]
    html = render(
        "demo.html",
        title="SPEAR-1 nano: from images to a robot that moves",
        facts=[*facts, (f"{(time.perf_counter() - started) / 60:.1f} min", "to make this page")],
        **parts,
    )
    write_text(out / "index.html", html)
    return out / "index.html"


def labelled_scenes() -> Values:
    """(a) Scenes labelled by the pipeline, with the error of its boxes against the simulator's true ones."""
    frames = list(render_held_out_frames(LABEL_SCENES, LABEL_SEED, LABEL_SIZE))
    labels = list(label_with_ground_truth(iter(frames)))
    pictures = [
        (
            to_jpeg_data_uri(draw_label(label, scale=4)),
            f"scene {LABEL_SEED + i}, objects: {len(label.objects)}",
        )
        for i, label in enumerate(labels[:4])
    ]
    return {
        "pictures": pictures,
        "accuracy": compare_labels(labels, frames),
        "scenes": LABEL_SCENES,
    }


def answers(vlm: VlmBundle) -> Values:
    """(b) SPEAR-VLM's answers beside the truth, with errors per kind of question."""
    labels = list(
        label_with_ground_truth(
            render_held_out_frames(QUESTION_SCENES, 0, vlm.processor.image_sizes["external"])
        )
    )
    scores = vqa.evaluate_vqa(vlm, labels, QuestionOptions())
    boxes = [
        a for a in scores.answers if a.question.family == "box_vertices" and "error" in a.measures
    ]
    first = {a.image: a for a in reversed(boxes)}
    box = scores.families["box_vertices"]
    error, guess = box.measures["error"].value, box.constant["error"]
    return {
        "pictures": [figure(a) for _, a in sorted(first.items())[:6]],
        "table": scores.rows(),
        "fact": (f"{error:.0f} mm", f"median 3D centre error; constant guess {guess:.0f} mm"),
    }


def robot_at_work(policy: Spear1Policy) -> Values:
    """(c) Closed loop per task family, between doing nothing and the scripted expert, with films."""
    ours = PolicyAgent(policy, "SPEAR-1 nano")
    result, films = closed_loop.evaluate_tabletop(
        ours, TabletopOptions(SCENES, films=1, families=FAMILIES)
    )
    unseen = TabletopOptions(SCENES, films=0, families=FAMILIES)
    results = [
        result,
        *(
            closed_loop.evaluate_tabletop(agent, unseen)[0]
            for agent in (ExpertAgent(), IdleAgent())
        ),
    ]
    rows = []
    for family in FAMILIES:
        s = result.summarize(family)
        steps = "–" if s.steps is None else f"{s.steps:.0f} ({s.steps / 5:.0f} s)"
        numbers = [f"{e.value:.0%}" for e in (s.reached, s.grasped, s.success, s.wrong_object)]
        rows.append([spaced(family), *numbers, steps])
    every = result.summarize().success
    rates = [
        (spaced(f), rate_bars([(r.policy, r.summarize(f).success) for r in results]))
        for f in FAMILIES
    ]
    captions = [
        f"{spaced(o.family)}, scene {o.seed}: {ending(o)}" for o in (one.outcome for one in films)
    ]
    shown = [(one.data, caption) for one, caption in zip(films, captions, strict=True)]
    fact = (
        f"{result.mean_success().value:.0%}",
        f"mean success [{every.low:.0%}, {every.high:.0%}], n = {every.n}",
    )
    return {"scenes": SCENES, "rates": bars(rates), "rows": rows, "films": shown, "fact": fact}


def real_episodes(out: Path, data: Path | None) -> Values:
    """(d) Fine-tune the shipped weights on real episodes; errors on others, beside mean and last action."""
    if data is None:
        return {"source": None}
    learned, held_out = _split(data, out)
    weights = (locate("nano") / "model.safetensors").read_bytes()
    key = hashlib.sha256(str(learned.path.resolve()).encode() + weights).hexdigest()[:8]
    run = out / f"fine-tuned-{key}"
    inputs = TrainingInputs(episodes=[(data.name, learned, 1.0)], init=locate("nano"))
    tuned = train(get_recipe("nano-post").with_changes(steps=FINE_TUNE_STEPS), run, inputs)
    scores = [
        open_loop.score_policy("fine-tuned", Spear1Policy.load(str(tuned)), held_out),
        open_loop.score_mean_action(learned, held_out),
        open_loop.score_last_action(held_out),
        open_loop.score_policy("before fine-tuning", Spear1Policy.load("nano"), held_out),
    ]
    names = {
        "translation_mm": ("translation of one step, mm", ".2f"),
        "chunk_end_mm": ("where five steps lead, mm", ".2f"),
        "rotation_deg": ("rotation of one step, degrees", ".2f"),
        "gripper_accuracy": ("gripper command right", ".0%"),
    }
    summaries = [s.summarize() for s in scores]
    ours, mean = (s["translation_mm"].value for s in summaries[:2])
    return {
        "source": get_dataset_name(data),
        "learned": len(learned),
        "held_out": len(held_out),
        "steps": FINE_TUNE_STEPS,
        "headers": ["mean error [95 %]", *(s.name for s in scores)],
        "rows": [
            [words, *(s[name].to_text(f) for s in summaries)] for name, (words, f) in names.items()
        ],
        "charts": open_loop_charts(scores[0], scores[1]),
        "fact": (
            f"{ours:.1f} mm",
            f"error per step on real held-out episodes; mean action {mean:.1f} mm",
        ),
    }


def _split(source: Path, out: Path) -> tuple[EpisodeStore, EpisodeStore]:
    """The first episodes of a dataset for learning and the last of those for testing, prepared once."""
    name, total = next(iter(count_episodes(source).items()))
    count = min(MOST_EPISODES, total)
    cut = count - max(1, round(HELD_OUT * count))
    if cut < 1:
        raise SpearError(
            f"too few episodes: {source}: its split {name!r} has {count}: give at least 2"
        )
    splits = f"{name}[:{cut}]", f"{name}[{cut}:{count}]"
    learned, held_out = (
        open_store(source, out, split)[0].select_demonstrations() for split in splits
    )
    return learned, held_out
