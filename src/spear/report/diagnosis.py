"""The page of a diagnosis: what is wrong, and what happened in the rollout, in time order."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spear.checks.rollout.case import Figure
from spear.checks.rollout.episode import RecordedEpisode, ServedTimes
from spear.checks.rollout.motion import RolloutMotion
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.departures import Departures, measure_departures
from spear.diagnose.diagnosis import Diagnosis
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.registry import FAULTS, make_all_checks
from spear.errors import SpearError, suppress_notices
from spear.evaluate.film import compose_frame, encode_film
from spear.evaluate.open_loop import measure_constant_mean_action_errors, measure_policy_errors
from spear.report.page import Fact, render
from spear.report.plot import Axis, Bar, Line, draw_bars, draw_chart
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.files import write_text
from spear.util.images import decode_image, to_jpeg_data_uri

MAX_FILM_STEPS = 75  # 15 s at 5 Hz
MAX_STILLS = 4  # steps of the rollout that are shown beside training pictures
MAX_CHART_STEPS = 150  # steps or moves in a chart, the first ones
NUM_OPEN_LOOP_EPISODES = 3  # training episodes on which the policy's errors are measured
STILL_HEIGHT_PX = 144
MM_PER_M = 1000
MS_PER_S = 1000
ERROR_NAMES = {
    "translation_mm": "translation, mm",
    "rotation_deg": "rotation, degrees",
    "chunk_end_mm": "end of the chunk, mm",
    "gripper_accuracy": "gripper commands that agree",
}


def write_diagnosis_page(case: PolicyCase, diagnosis: Diagnosis, out: Path) -> None:
    """Write the page of a diagnosis as one HTML file.

    Raises:
        SpearError: the file cannot be written.
    """
    departures = None
    if case.rollout and case.demonstrations:
        departures = measure_departures(
            case.rollout, case.demonstrations, case.training_instructions
        )
    named_faults = {check.fault for check in make_all_checks()}
    page = render(
        "diagnosis.html",
        title="Why does the robot fail?",
        facts=_list_facts(case, diagnosis),
        diagnosis=diagnosis,
        findings=[(entry, _draw_figure(entry.finding.figure)) for entry in diagnosis.findings],
        film=_make_film(case.rollout_store),
        stills=_make_stills(case),
        departures=None if departures is None else _list_departures(departures, case.rollout),
        distance_charts=[] if departures is None else _draw_distances(departures),
        motion_charts=_draw_rollout_charts(case),
        open_loop=_measure_and_tabulate_open_loop_errors(case),
        unnamed=[fault for fault in FAULTS if fault not in named_faults],
    )
    write_text(out, page)


def _list_facts(case: PolicyCase, diagnosis: Diagnosis) -> list[Fact]:
    """List the large numbers at the top of the page."""
    facts = [(str(len(diagnosis.findings)), "findings")]
    if case.rollout:
        num_steps = sum(map(len, case.rollout))
        facts.append((str(len(case.rollout)), f"episodes of the rollout, {num_steps:,} steps"))
    if case.training is not None:
        facts.append((f"{len(case.training):,}", "training episodes"))
    return facts


def _draw_figure(figure: Figure | None) -> str:
    """Draw the evidence of a finding."""
    if figure is None:
        return ""
    if figure.pictures:
        pictures = [
            (_to_enlarged_data_uri(picture), caption) for caption, picture in figure.pictures
        ]
        return render("pictures.html", title=figure.title, pictures=pictures)
    if figure.bars:
        longest = max(abs(value) for _, value, _ in figure.bars)
        bars = [Bar(name, value, text) for name, value, text in figure.bars]
        return draw_bars([(figure.title, bars)], ends=(0.0, longest or 1.0))
    lines = [Line(curve.name, curve.x, curve.y) for curve in figure.curves]
    return draw_chart(lines, Axis(figure.x_title), title=figure.title, size=(720, 220))


def _to_enlarged_data_uri(picture: Array) -> str:
    """Return a small picture as a data URI, enlarged to `STILL_HEIGHT_PX`."""
    factor = max(1, STILL_HEIGHT_PX // picture.shape[0])
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return to_jpeg_data_uri(np.ascontiguousarray(enlarged, np.uint8))


def _make_film(store: EpisodeStore | None) -> bytes | None:
    """Make a film of the first episodes; None without pictures or without an encoder."""
    if store is None:
        return None
    frames = list(itertools.islice(_compose_frames(store), MAX_FILM_STEPS))
    same_size = [frame for frame in frames if frame.shape == frames[0].shape]
    try:
        return encode_film(same_size, CONTROL_RATE_HZ) if same_size else None
    except SpearError:  # the encoder is not installed
        return None


def _compose_frames(store: EpisodeStore) -> Iterator[Array]:
    """Yield a film frame of each step that has a picture, episode after episode.

    Without a picture of the external camera, that of the wrist camera takes its place.
    """
    for index in range(len(store)):
        episode = store.without_images(index)
        for step in range(len(episode)):
            encoded_wrist = store.image(index, step, "wrist")
            encoded_main = store.image(index, step, "external") or encoded_wrist
            if not encoded_main:
                continue
            main_view = decode_image(encoded_main, episode.source)
            wrist_view = decode_image(encoded_wrist, episode.source) if encoded_wrist else None
            yield compose_frame(main_view, wrist_view, episode.instruction)


class _Still(NamedTuple):
    """A picture as a data URI, and its caption."""

    data_uri: str
    caption: str


def _make_stills(case: PolicyCase) -> list[_Still]:
    """Return pictures of the rollout, each before the training picture of the nearest position.

    Every picture has its caption.
    """
    stills: list[_Still] = []
    if not case.rollout or not case.demonstrations:
        return stills
    episode = case.rollout[-1]
    steps = np.linspace(0, len(episode) - 1, MAX_STILLS).round().astype(int)
    for camera in case.rollout_cameras:
        if camera not in episode.pictures:
            continue
        for step in steps.tolist():
            stills.append(
                _Still(_to_enlarged_data_uri(episode.pictures[camera].small[step]), f"step {step}")
            )
            nearest = _find_nearest_picture(case.demonstrations, camera, episode.position[step])
            if nearest is not None:
                stills.append(_Still(_to_enlarged_data_uri(nearest), "training"))
    return stills


def _find_nearest_picture(
    demonstrations: Sequence[RecordedEpisode], camera: str, position: Array
) -> Array | None:
    """Return the picture of the training state whose position is nearest; None without one."""
    nearest = None
    nearest_m = np.inf
    for episode in demonstrations:
        if camera not in episode.pictures:
            continue
        distances_m = np.linalg.norm(episode.position - position, axis=1)
        step = int(distances_m.argmin())
        if distances_m[step] < nearest_m:
            nearest_m = distances_m[step]
            nearest = episode.pictures[camera].small[step]
    return nearest


class _Row(NamedTuple):
    """A row of the table of departures."""

    seconds: str
    episode: str
    quantity: str
    amount: str


def _list_departures(departures: Departures, rollout: Sequence[RecordedEpisode]) -> list[_Row]:
    """List where the rollout left the training distribution, in time order."""
    rows = []
    for departure in departures.first:
        rate_hz = rollout[departure.episode].rate_hz
        rows.append(
            _Row(
                f"{departure.step / rate_hz:.1f}",
                str(departure.episode + 1),
                departure.quantity,
                departure.amount,
            )
        )
    return rows


def _draw_distances(departures: Departures) -> list[str]:
    """Draw the distance from training over time, one chart per quantity."""
    charts = []
    for quantity, values in departures.distances.items():
        first_values = values[:MAX_CHART_STEPS]
        steps = np.arange(len(first_values))
        limit = np.full(len(first_values), departures.limits[quantity])
        lines = [
            Line(quantity, steps, first_values),
            Line("largest of training", steps, limit, dashed=True),
        ]
        charts.append(draw_chart(lines, Axis("step"), title=quantity))
    return charts


def _draw_rollout_charts(case: PolicyCase) -> list[str]:
    """Draw commanded and achieved motion, the gripper, and the times."""
    if not case.rollout:
        return []
    charts = [*_draw_commanded_and_achieved_moves(case.motion), _draw_gripper(case.rollout)]
    served = [episode.served for episode in case.rollout if episode.served is not None]
    if served:
        charts += _draw_answer_and_move_times(case.motion, served)
    return charts


def _draw_commanded_and_achieved_moves(motion: RolloutMotion) -> list[str]:
    """Draw commanded and achieved displacements over the moves, one chart per axis.

    A *move* is what the arm did between two observations.
    """
    num_shown = min(len(motion.achieved), MAX_CHART_STEPS)
    moves = np.arange(num_shown)
    charts = []
    for index, axis in enumerate("xyz"):
        lines = [
            Line("commanded", moves, MM_PER_M * motion.commanded_displacement[:num_shown, index]),
            Line("achieved", moves, MM_PER_M * motion.achieved[:num_shown, index]),
        ]
        charts.append(draw_chart(lines, Axis("move"), title=f"motion along {axis}, mm"))
    return charts


def _draw_gripper(rollout: Sequence[RecordedEpisode]) -> str:
    """Draw commanded and measured gripper openings over the steps of the rollout."""
    openings = np.concatenate([episode.opening for episode in rollout])[:MAX_CHART_STEPS]
    commands = np.concatenate([episode.action[:, 7] for episode in rollout])
    steps = np.arange(len(openings))
    lines = [Line("commanded", steps, commands[: len(openings)]), Line("measured", steps, openings)]
    return draw_chart(lines, Axis("step"), title="gripper, 1 is open")


def _draw_answer_and_move_times(motion: RolloutMotion, served: Sequence[ServedTimes]) -> list[str]:
    """Draw how long each answer took, and how long each move took.

    Args:
        motion: the moves of the rollout.
        served: the times of each episode that a server recorded.
    """
    delays_ms = MS_PER_S * np.concatenate([times.answer_s - times.arrival_s for times in served])
    delays_ms = delays_ms[:MAX_CHART_STEPS]
    answers = [Line("answer", np.arange(len(delays_ms)), delays_ms)]
    seconds = motion.seconds[:MAX_CHART_STEPS]
    moves = [Line("from answer to next observation", np.arange(len(seconds)), seconds)]
    return [
        draw_chart(answers, Axis("step"), title="time to the answer, ms"),
        draw_chart(moves, Axis("move"), title="time per move, s"),
    ]


def _measure_and_tabulate_open_loop_errors(case: PolicyCase) -> list[tuple[str, str, str]]:
    """Measure open-loop errors of each part of the actions, on some training episodes.

    Returns:
        Rows of the name of the error, and its value for the policy and for the mean action, as
        texts. Without a policy or training episodes there are none.
    """
    if case.policy is None or case.training is None:
        return []
    count = min(len(case.training), NUM_OPEN_LOOP_EPISODES)
    spread = np.linspace(0, len(case.training) - 1, count).round().astype(int)
    sample = case.training.subset(np.unique(spread).tolist())
    try:
        with suppress_notices():
            policy_errors = measure_policy_errors(
                "policy", case.policy, sample
            ).estimate_mean_errors()
            horizon = int(case.policy.model.config.horizon)
            baseline_errors = measure_constant_mean_action_errors(
                case.training, sample, horizon
            ).estimate_mean_errors()
    except SpearError:  # no episode is as long as a chunk
        return []
    rows = []
    for key, name in ERROR_NAMES.items():
        style = ".0%" if key == "gripper_accuracy" else ".1f"
        policy_text = format(policy_errors[key].value, style)
        rows.append((name, policy_text, format(baseline_errors[key].value, style)))
    return rows
