"""The main job: from images to a robot that moves, on one HTML page with every number's n and interval."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from spear.data.readers.formats import episode_counts
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.prepare import prepare
from spear.errors import SpearError
from spear.evaluate import closed_loop, open_loop
from spear.evaluate.agents import NOTHING, Agent, ConstantAgent, ExpertAgent, PolicyAgent
from spear.evaluate.options import QuestionOptions, TabletopOptions
from spear.evaluate.results import Results
from spear.evaluate.stats import Estimate
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.images import held_out_frames
from spear.labels.fit.accuracy import compare
from spear.labels.scenes import label_frames
from spear.policy import Spear1Policy, VlmBundle, load_vlm, locate
from spear.report import page
from spear.report import vqa as vqa_page
from spear.report.draw import draw_label
from spear.report.open_loop import plot
from spear.report.page import Section
from spear.sim.scene import FAMILIES
from spear.train.options import Inputs
from spear.train.recipes import recipe
from spear.train.run import train
from spear.util.files import write_text

SCENES = 40
"""Closed-loop scenes per family: an interval of ± 15 points at most, in a few minutes."""
QUESTION_SCENES = 60
"""Scenes 0, 1, … that SPEAR-VLM is asked about."""
LABEL_SCENES, LABEL_SEED, LABEL_SIZE = 30, 100, (240, 160)
"""How many scenes are labelled, from which seed on, in pictures of which (width, height) in pixels."""
FINE_TUNE_STEPS = 600
SAMPLE = Path("../shared/data/bridge_v2_sample")
"""Where a sample of BridgeData V2 is looked for, from the current folder."""
HELD_OUT = 0.25
"""The part of a real dataset's episodes that the fine-tuning does not see."""
MOST_EPISODES = 400
"""Of a larger dataset, so many episodes are used."""

Part = tuple[Section, tuple[str, str] | None]
"""A part of the page, and the fact it contributes to the cards on top: (big, small)."""


def make(out: Path, data: Path | None = None, log: Console | None = None) -> Path:
    """Write `out`/index.html and return its path.

    data  a folder with real robot episodes (RLDS, LeRobot); without it, the BridgeData sample if it is there.

    Raises SpearError when the package has no trained weights, or for data that cannot be read.
    """
    log = log or Console(stderr=True)
    started = time.perf_counter()
    if data is not None:
        episode_counts(data)
    vlm, policy = load_vlm("nano"), Spear1Policy.load("nano")
    disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    jobs: Sequence[tuple[str, Callable[[], Part]]] = (
        ("a. labelling a scene in 3D", labelled_scenes),
        ("b. asking SPEAR-VLM about held-out scenes", lambda: answers(vlm)),
        ("c. SPEAR-1 acting in held-out scenes", lambda: robot_at_work(policy)),
        ("d. fine-tuning on real robot episodes", lambda: real_episodes(out, data)),
    )
    for title, job in jobs:
        log.print(title)
        begun = time.perf_counter()
        section, fact = job()
        parts.append((Section(section.title, section.body, time.perf_counter() - begun), fact))
    minutes = (time.perf_counter() - started) / 60
    facts = [fact for _, fact in parts if fact is not None]
    html = page.page(
        "SPEAR-1 nano: from images to a robot that moves",
        page.paragraph(
            "A small 3D-aware vision-language model and the robot policy built on it, both trained with this "
            "package and running on this computer. Every scene below is held out: nothing was trained on it."
        ),
        [*facts, (f"{minutes:.1f} min", "to make this page")],
        [section for section, _ in parts],
    )
    path = out / "index.html"
    write_text(path, html)
    return path


def labelled_scenes() -> Part:
    """(a) Scenes labelled by the pipeline, with the error of its boxes against the simulator's true ones."""
    frames = list(held_out_frames(LABEL_SCENES, LABEL_SEED, LABEL_SIZE))
    labels = list(label_frames(iter(frames)))
    accuracy = compare(labels, frames)
    pictures = [
        page.picture(draw_label(label, scale=4), f"scene {LABEL_SEED + i}: {len(label.objects)} objects")
        for i, label in enumerate(labels[:4])
    ]
    body = page.paragraph(
        "Labelling finds each object, outlines it, lifts its pixels to 3D and fits an oriented box. Here the "
        "simulator's truth stands in for the detector, the segmenter and the depth network; only what the "
        "camera sees is used, so the hidden side of a box is a guess."
    )
    measured = page.paragraph(
        f"Against the true boxes of {accuracy.n} objects in {LABEL_SCENES} scenes: median error "
        f"{1000 * accuracy.center:.1f} mm of the centre, {1000 * accuracy.vertex:.1f} mm of the vertices, "
        f"median 3D overlap (IoU) {accuracy.iou:.2f}."
    )
    return Section("Images labelled in 3D", body + page.grid(pictures, wide=True) + measured), None


def answers(vlm: VlmBundle) -> Part:
    """(b) SPEAR-VLM's answers beside the truth, with errors per kind of question."""
    labels = list(label_frames(held_out_frames(QUESTION_SCENES, 0, vlm.processor.image_sizes["external"])))
    scores = vqa.evaluate(vlm, labels, QuestionOptions())
    boxes = [a for a in scores.asked if a.question.family == "box_vertices" and a.grammatical]
    shown = {a.image: a for a in reversed(boxes)}
    pictures = [page.picture(vqa_page.draw(a), vqa_page.caption(a)) for _, a in sorted(shown.items())[:6]]
    body = (
        page.paragraph(
            "SPEAR-VLM answers in 3D tokens: eight box vertices are 24 of them. Green is the truth, orange "
            "the answer. The first scenes are shown, not the best ones."
        )
        + page.grid(pictures)
        + "<h3>All questions</h3>"
        + page.table(*scores.rows())
        + page.paragraph(
            "Constant guess: the error of the best answer that does not look at the image; depth only: of one that "
            "knows how far away the scene is. Grammar: answers with exactly as many numbers as they need, with "
            "decoding constrained to them and without.",
            soft=True,
        )
    )
    box = scores.families["box_vertices"]
    error, guess = box.measures["error"].value, box.constant["error"]
    fact = (f"{error:.0f} mm", f"median 3D centre error; constant guess {guess:.0f} mm")
    return Section("Questions about 3D, answered", body), fact


def robot_at_work(policy: Spear1Policy) -> Part:
    """(c) Closed loop per task family, between doing nothing and the scripted expert, with films."""
    agents: tuple[Agent, ...] = (
        PolicyAgent(policy, "SPEAR-1 nano", image_sizes=policy.processor.image_sizes),
        ExpertAgent(),
        ConstantAgent("nothing", NOTHING),
    )
    results: list[Results] = []
    films: list[closed_loop.Film] = []
    for index, agent in enumerate(agents):
        result, made = closed_loop.evaluate(agent, TabletopOptions(SCENES, films=0 if index else 1))
        results.append(result)
        films += made
    groups = [(f.replace("_", " "), [(r.policy, r.summary(f).success) for r in results]) for f in FAMILIES]
    rows = []
    for family in FAMILIES:
        s = results[0].summary(family)
        steps = "–" if s.steps is None else f"{s.steps:.0f} ({s.steps / 5:.0f} s)"
        numbers = [f"{e.value:.0%}" for e in (s.reached, s.grasped, s.success, s.wrong_object)]
        rows.append([family.replace("_", " "), *numbers, steps])
    pictures = [
        page.film(
            f.data,
            f.mime,
            f"{f.outcome.family.replace('_', ' ')}, scene {f.outcome.seed}: "
            + (f"success after {f.outcome.steps} steps" if f.outcome.success else "failure"),
        )
        for f in films
    ]
    body = (
        page.paragraph(
            f"{SCENES} held-out scenes per task; the policy moves, turns, opens and closes the gripper five "
            "times a second, from two cameras and an instruction. Bars are success rates, lines their 95 % "
            "intervals. Per task, the first success and the first failure are filmed."
        )
        + page.success_bars(groups)
        + "<h3>SPEAR-1 on the way to success</h3>"
        + page.table(
            ["task", "reached", "grasped", "placed", "moved a wrong object", "steps to success"], rows
        )
        + "<h3>Films (outside camera, wrist camera)</h3>"
        + page.grid(pictures, wide=True)
    )
    every = results[0].summary().success
    fact = (
        f"{results[0].mean_success:.0%}",
        f"mean success [{every.low:.0%}, {every.high:.0%}], n = {every.n}",
    )
    return Section("The robot at work", body), fact


def real_episodes(out: Path, data: Path | None) -> Part:
    """(d) Fine-tune the shipped weights on real episodes; errors on others against the mean and the last
    action."""
    title = "Real robot episodes"
    if data is None and not SAMPLE.is_dir():
        body = page.paragraph(
            "No real data was given. Download any Open X-Embodiment dataset in RLDS form, for example "
            "BridgeData V2 from rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/, and run this "
            "again with make demo DATA=path/to/bridge_dataset/1.0.0."
        )
        return Section(title, body), None
    source = data or SAMPLE
    learned, held_out = _split(source, out)
    weights = (locate("nano") / "model.safetensors").read_bytes()
    key = hashlib.sha256(str(learned.path.resolve()).encode() + weights).hexdigest()[:8]
    run = out / f"fine-tuned-{key}"
    inputs = Inputs(episodes=[(source.name, learned, 1.0)], init=locate("nano"))
    tuned = train(recipe("nano-post").changed(steps=FINE_TUNE_STEPS), run, inputs)
    scores = [
        open_loop.score("fine-tuned", Spear1Policy.load(str(tuned)), held_out),
        open_loop.score_mean_action(learned, held_out),
        open_loop.score_last_action(held_out),
        open_loop.score("before fine-tuning", Spear1Policy.load("nano"), held_out),
    ]
    names = {
        "translation_mm": "translation of one step, mm",
        "chunk_end_mm": "where five steps lead, mm",
        "rotation_deg": "rotation of one step, degrees",
        "gripper_accuracy": "gripper command right",
    }
    summaries = [s.summary() for s in scores]
    rows = [[words, *(_interval(s[name], name) for s in summaries)] for name, words in names.items()]
    ours, mean = summaries[0]["translation_mm"], summaries[1]["translation_mm"]
    body = (
        page.paragraph(
            f"{len(learned)} episodes of {source.name} for learning, {len(held_out)} others to test on: "
            f"{FINE_TUNE_STEPS} steps of the post-training recipe, starting from the weights that come with "
            "this package. The errors say how far each predicted action is from what the demonstrator did; "
            "the references look at no image: the one action that is best on average, and the last action again."
        )
        + page.table(["mean error [95 %]", *(s.name for s in scores)], rows)
        + "<h3>Predictions on held-out episodes</h3>"
        + page.picture(plot(scores[0], scores[1]), "the first action of each predicted chunk")
    )
    fact = (
        f"{ours.value:.1f} mm",
        f"error per step on real held-out episodes; mean action {mean.value:.1f} mm",
    )
    return Section(title, body), fact


def _split(source: Path, out: Path) -> tuple[EpisodeStore, EpisodeStore]:
    """The first episodes of a dataset for learning and the last of those for testing, prepared once."""
    name, total = next(iter(episode_counts(source).items()))
    count = min(MOST_EPISODES, total)
    cut = count - max(1, round(HELD_OUT * count))
    if cut < 1:
        raise SpearError(f"too few episodes: {source}: its split {name!r} has {count}: give at least 2")
    stores = []
    for part, split in (("learn", f"{name}[:{cut}]"), ("test", f"{name}[{cut}:{count}]")):
        key = hashlib.sha256(f"{source.resolve()} {split}".encode()).hexdigest()[:8]
        target = out / f"episodes-{part}-{key}"
        if not target.is_dir():
            prepare(source, target, split)
        stores.append(EpisodeStore(target))
    return stores[0], stores[1]


def _interval(e: Estimate, name: str) -> str:
    digits = ".0%" if name == "gripper_accuracy" else ".2f"
    return f"{e.value:{digits}} [{e.low:{digits}}, {e.high:{digits}}]"
