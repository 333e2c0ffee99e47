"""The outcomes of a closed-loop evaluation: a record per episode, summaries per family, and files.

Each outcome is written to disk when its episode ends, so that an interrupted evaluation can resume.
An evaluation may be divided into parts (*shards*), which different processes run. A folder of
results contains one *journal* per shard, for example `episodes-2-of-5.jsonl`, or
`episodes-1-of-1.jsonl` if there is only one part. The first line of a journal says which policy
acted and with which settings. Each further line is the outcome of one episode, or says which scenes
are to be run. A last line that is incomplete does not count.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass
from rich import box
from rich.markup import escape
from rich.table import Table

from spear.errors import SpearError, escape_control_characters, format_count
from spear.evaluate.stats import (
    Estimate,
    compute_num_samples,
    estimate_mean_proportion,
    estimate_proportion,
)
from spear.util.files import convert_write_errors, read_json_as, write_text
from spear.util.json_text import parse_json
from spear.util.run_settings import describe_difference, to_plain_json

TARGET_HALF_WIDTH = 0.05  # a family's success rate should be known to ±5 points
MAX_NO_WRAP_CHARS = 16  # names up to this length keep one line in a terminal of 80 characters
MILESTONES = ("success", "reached", "grasped", "wrong_object_moved")
"""The yes-or-no fields of `Outcome`."""

ScenesByFamily = Mapping[str, Sequence[int]]
"""Family → the seeds of its scenes."""
SceneId = tuple[str, int]
"""Family and seed."""


@dataclass(frozen=True)
class Outcome:
    """The result of one episode.

    In SIMPLER, `spear.evaluate.simpler.tasks.Moment` defines the yes-or-no fields.

    family              the task family.
    seed                the scene's seed.
    instruction         what the policy was asked to do.
    success             whether the object rests, released, on the target.
    reached             whether the gripper was at the right object at some time.
    grasped             whether the right object was lifted at some time.
    wrong_object_moved  whether another object was carried or pushed away.
    unreachable         number of control steps whose target the arm could not reach.
    steps               number of control steps (5 Hz) until success or the end.
    """

    family: str
    seed: NonNegativeInt
    instruction: str
    success: bool
    reached: bool
    grasped: bool
    wrong_object_moved: bool
    unreachable: NonNegativeInt
    steps: NonNegativeInt

    @property
    def scene(self) -> SceneId:
        """The episode's family and seed."""
        return self.family, self.seed

    @property
    def film_name(self) -> str:
        """The name of the file with this episode's film."""
        ending = "success" if self.success else "failure"
        return f"{self.family}-{ending}-{self.seed}.mp4"


@dataclass(frozen=True)
class Summary:
    """The numbers of one family. Rates have 95 % Wilson intervals.

    success       rate of episodes that succeeded.
    reached       rate of episodes in which the gripper was at the right object.
    grasped       rate of episodes in which the right object was lifted.
    wrong_object  rate of episodes in which another object was moved.
    unreachable   mean number of unreachable steps per episode.
    steps         mean number of steps of the successful episodes; None if there are none.
    """

    success: Estimate
    reached: Estimate
    grasped: Estimate
    wrong_object: Estimate
    unreachable: float
    steps: float | None


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    policy    the name of the policy that acted.
    settings  the settings of the evaluation; see `run_evaluation`.
    outcomes  the outcome of every episode that has ended.
    seconds   wall time.
    wanted    the scenes that are to be run in all; empty if this is not known.
    """

    policy: str
    settings: dict[str, Any]
    outcomes: Sequence[Outcome]
    seconds: float
    wanted: frozenset[SceneId] = frozenset()

    def describe_unfinished(self) -> str:
        """Return a warning if some scenes have not ended yet, and "" if all have."""
        num_missing = len(self.wanted - {outcome.scene for outcome in self.outcomes})
        if not num_missing:
            return ""
        missing = format_count(num_missing, "scenes")
        verb = "is" if num_missing == 1 else "are"
        return f"{missing} {verb} left. Rates may be too high, because successes end first."

    @property
    def families(self) -> list[str]:
        """The families that have outcomes, in the order of their first outcomes."""
        return list(dict.fromkeys(outcome.family for outcome in self.outcomes))

    def mean_success(self) -> Estimate:
        """Estimate the mean of the families' success rates, each with the same weight."""
        counts = []
        for family in self.families:
            successes = [outcome.success for outcome in self.outcomes if outcome.family == family]
            counts.append((sum(successes), len(successes)))
        return estimate_mean_proportion(counts)

    def describe_interval_widths(self) -> str:
        """Say how wide the intervals are, and how many scenes make them ±5 points."""
        rates = [self.summarize(family).success for family in self.families]
        widest = max(rates, key=lambda rate: rate.half_width)
        mean_width = f"±{100 * self.mean_success().half_width:.1f} points for the mean"
        family_width = f"up to ±{100 * widest.half_width:.1f} for a family (n = {widest.n})"
        text = f"intervals: {mean_width}, {family_width}"
        unfinished = self.describe_unfinished()
        if unfinished:
            text = f"UNFINISHED: {unfinished} {text}"
        if widest.half_width <= TARGET_HALF_WIDTH:
            return text

        # The number of scenes depends on the true rate, and a rate of 0.5 needs most scenes. So the
        # rate in the interval that is nearest to 0.5 is assumed.
        num_scenes = []
        for rate in rates:
            most_variable_rate = min(max(0.5, rate.low), rate.high)
            num_scenes.append(compute_num_samples(TARGET_HALF_WIDTH, most_variable_rate))
        target = f"±{100 * TARGET_HALF_WIDTH:.0f} points"
        return f"{text}. {target} need up to {max(num_scenes)} scenes per family"

    def summarize(self, family: str | None = None) -> Summary:
        """Summarize one family, or all episodes together if `family` is None."""
        outcomes = self.outcomes
        if family is not None:
            outcomes = [outcome for outcome in outcomes if outcome.family == family]
        rates = {}
        for milestone in MILESTONES:
            num_true = sum(getattr(outcome, milestone) for outcome in outcomes)
            rates[milestone] = estimate_proportion(num_true, len(outcomes))
        success_steps = [outcome.steps for outcome in outcomes if outcome.success]
        return Summary(
            success=rates["success"],
            reached=rates["reached"],
            grasped=rates["grasped"],
            wrong_object=rates["wrong_object_moved"],
            unreachable=float(np.mean([outcome.unreachable for outcome in outcomes])),
            steps=float(np.mean(success_steps)) if success_steps else None,
        )

    def save(self, path: Path) -> None:
        """Write the results as JSON, summaries before outcomes.

        An interrupted write leaves no incomplete file.
        """
        content = {
            "policy": self.policy,
            "settings": self.settings,
            "seconds": self.seconds,
            "mean_success": self.mean_success().value,
            "summary": {family: asdict(self.summarize(family)) for family in self.families},
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "wanted": sorted(self.wanted),  # all scenes, those without an outcome included
        }
        write_text(path, json.dumps(content, indent=1))

    def to_table(self) -> Table:
        """Format the summaries for a terminal."""
        headers = [
            "family",
            "success [95 %]",
            "reached",
            "grasped",
            "wrong object",
            "steps out of reach",
            "steps to success",
        ]
        rows = []
        for family in self.families:
            summary = self.summarize(family)
            rows.append(
                [
                    family,
                    summary.success.to_text(".0%"),
                    f"{summary.reached.value:.0%}",
                    f"{summary.grasped.value:.0%}",
                    f"{summary.wrong_object.value:.0%}",
                    f"{summary.unreachable:.1f}",
                    "" if summary.steps is None else f"{summary.steps:.0f}",
                ]
            )
        mean = self.mean_success()
        mean_text = f"{mean.value:.1%} [{mean.low:.0%}, {mean.high:.0%}]"
        rows.append(["mean of families", mean_text, "", "", "", "", ""])

        num_episodes = format_count(len(self.outcomes), "episodes")
        title = f"{self.policy}: closed loop, {num_episodes}, {self.seconds:.0f} s"
        return build_terminal_table(
            title, headers, rows, self.describe_interval_widths(), mean_last=True
        )


def build_terminal_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    mean_last: bool = False,
) -> Table:
    """Build a table for a terminal.

    In a terminal of 80 characters, no word of our tables is folded.

    Args:
        title: Line above the table.
        headers: Header of each column.
        rows: Cells of each row. The first cell is a name, the others are numbers and are
            right-aligned.
        caption: Text below the table.
        mean_last: Whether a rule separates the last row, which is the mean, from the others.
    """
    table = Table(
        title="\n" + _escape_for_terminal(title),
        caption=_escape_for_terminal(caption),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    has_short_names = all(len(row[0]) <= MAX_NO_WRAP_CHARS for row in rows)
    for index, header in enumerate(headers):
        is_name_column = index == 0
        # The success rate is the main result, so it is never folded.
        is_success_column = header.startswith("success [")
        no_wrap = has_short_names if is_name_column else is_success_column
        justify: Any = "left" if is_name_column else "right"
        table.add_column(
            _escape_for_terminal(header), justify=justify, no_wrap=no_wrap, overflow="fold"
        )
    for index, row in enumerate(rows):
        is_last_row = index == len(rows) - 1
        if mean_last and is_last_row:
            table.add_section()
        table.add_row(*[_escape_for_terminal(cell) for cell in row])
    return table


def _escape_for_terminal(text: str) -> str:
    """Escape characters that Rich or a terminal would interpret as a command."""
    return escape(escape_control_characters(text, keep_newlines=True))


def merge_results(shards: Sequence[Results]) -> Results:
    """Merge parts of one evaluation.

    Args:
        shards: The results of at least one part.

    Returns:
        All outcomes, families in the order of their first appearance, and scenes sorted by seed.

    Raises:
        SpearError: Policies or settings differ, or a scene ended differently in two parts.
    """
    first = shards[0]
    outcomes: dict[SceneId, Outcome] = {}
    for shard in shards:
        difference = describe_difference(
            _get_policy_and_settings(first), _get_policy_and_settings(shard)
        )
        if difference:
            raise SpearError(
                f"the results of {shard.policy} are of several evaluations ({difference}). "
                "Merge only parts of the same one."
            )
        for outcome in shard.outcomes:
            known_outcome = outcomes.setdefault(outcome.scene, outcome)
            if known_outcome != outcome:
                raise SpearError(
                    f"scene {outcome.seed} of {outcome.family} ended differently in two parts "
                    f"of the results of {shard.policy}, because of rounding or another policy. "
                    "Remove one journal, or all."
                )

    families = list(dict.fromkeys(family for family, _ in outcomes))
    sorted_outcomes = sorted(
        outcomes.values(), key=lambda outcome: (families.index(outcome.family), outcome.seed)
    )
    wanted: frozenset[SceneId] = frozenset()
    for shard in shards:
        wanted |= shard.wanted
    seconds = sum(shard.seconds for shard in shards)
    return Results(first.policy, first.settings, sorted_outcomes, seconds, wanted)


def _get_policy_and_settings(results: Results) -> dict[str, Any]:
    """Return the policy and the settings, which all parts of one evaluation have in common."""
    return {"policy": results.policy, **results.settings}


class Shard(NamedTuple):
    """A part of an evaluation: every n-th scene (n = num_shards) from the number-th on.

    number      number of the part, from 1 on.
    num_shards  how many parts there are.
    """

    number: int
    num_shards: int


def parse_shard(text: str) -> Shard:
    """Parse a part of an evaluation: "2/5" is the second of five parts.

    Raises:
        SpearError: The text has another form, or not 1 ≤ number ≤ num_shards.
    """
    number_text, _, count_text = text.partition("/")
    if number_text.isdecimal() and count_text.isdecimal():
        shard = Shard(int(number_text), int(count_text))
        if 1 <= shard.number <= shard.num_shards:
            return shard
    raise SpearError(f"--shard {text} is no part. Write 2/5 for the second of five.")


class Journal:
    """The journal of one shard, to which this process appends.

    outcomes  the outcomes in all journals of the folder, by scene.
    """

    def __init__(
        self,
        folder: Path,
        policy: str,
        settings: Mapping[str, Any],
        shard: Shard,
        scenes: ScenesByFamily,
    ) -> None:
        """Open a new journal, or continue an existing one.

        Args:
            folder: The folder of results.
            policy: The name of the policy.
            settings: The settings of the evaluation.
            shard: The part.
            scenes: The scenes of this part.

        Raises:
            SpearError: The folder has results of another policy or of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.outcomes: dict[SceneId, Outcome] = {}
        journals = find_journals(folder)
        if not journals and (folder / "results.json").is_file():
            raise SpearError(
                f"{folder} contains results.json without journals. Give another --out, or move "
                "it away."
            )

        # The scenes that no journal announces yet.
        unannounced: set[SceneId] = set()
        for family, seeds in scenes.items():
            unannounced |= {(family, seed) for seed in seeds}
        for path in journals:
            results = read_journal(path)
            difference = describe_difference(
                _get_policy_and_settings(results), {"policy": policy, **settings}
            )
            if difference:
                raise SpearError(
                    f"{folder} contains other results ({difference}). Give another --out, or "
                    "remove it."
                )
            self.outcomes |= {outcome.scene: outcome for outcome in results.outcomes}
            unannounced -= results.wanted

        number, num_shards = shard
        self._path = folder / f"episodes-{number}-of-{num_shards}.jsonl"
        if self._path.is_file():
            _cut_off_incomplete_line(self._path)

        # These lines are written with the first outcome, so that a folder without any outcome stays
        # as it is.
        self._header_lines: list[Any] = [
            {"policy": policy, "settings": to_plain_json(settings)},
        ]
        if unannounced:
            all_scenes = {family: list(seeds) for family, seeds in scenes.items()}
            self._header_lines.append({"scenes": all_scenes})

    def add(self, outcome: Outcome, episode_s: float, since_last_end_s: float) -> None:
        """Append the outcome of an episode. The outcome is on disk when this method returns.

        Args:
            outcome: The outcome.
            episode_s: How long the episode ran.
            since_last_end_s: Wall time since the end of the previous episode. Several episodes run
                at once, so only these times add up to the time of the evaluation.
        """
        with convert_write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            lines = list(self._header_lines)
            is_continued = file.tell() > 0  # an existing journal has its first line already
            if lines and is_continued:
                del lines[0]
            lines.append({**asdict(outcome), "seconds": episode_s, "wall": since_last_end_s})
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self._header_lines = []
        self.outcomes[outcome.scene] = outcome


def _cut_off_incomplete_line(path: Path) -> None:
    """Remove the last line of a file if it does not end with a newline."""
    complete_lines = path.read_bytes().rpartition(b"\n")[0]  # without the last newline
    num_bytes = len(complete_lines) + 1 if complete_lines else 0
    os.truncate(path, num_bytes)


def find_journals(folder: Path) -> list[Path]:
    """List the journals of a folder that have at least one complete line."""
    paths = folder.glob("episodes-*-of-*.jsonl")
    return sorted(path for path in paths if b"\n" in path.read_bytes())


def read_journal(path: Path) -> Results:
    """Read the results of one journal so far.

    Raises:
        SpearError: The file is not a journal.
    """
    try:
        complete_lines = path.read_text("utf-8").rpartition("\n")[0]
        header, *records = [parse_json(line) for line in complete_lines.split("\n")]
        wanted: set[SceneId] = set()
        episodes = []
        total_seconds = 0.0
        for record in records:
            if "scenes" in record:
                for family, seeds in record["scenes"].items():
                    wanted.update((family, seed) for seed in seeds)
                continue
            seconds = record.pop("seconds")
            # In older journals, "seconds" means what "wall" means now.
            total_seconds += record.pop("wall", seconds)
            episodes.append(record)
        # pydantic makes an `Outcome` of each episode's dict, and raises if a field is wrong.
        return Results(
            header["policy"], header["settings"], episodes, total_seconds, frozenset(wanted)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SpearError(f"{path} is no journal of `spear evaluate`. Remove it.") from None


def load_results(path: Path) -> Results:
    """Load the results of a folder, or of a file `results.json`.

    In a folder, the journals are merged. If it has no journals, its `results.json` is read.

    Raises:
        SpearError: There are no results, or the journals are not parts of one evaluation.
    """
    journals = find_journals(path) if path.is_dir() else []
    if journals:
        results = merge_results([read_journal(journal) for journal in journals])
        if not results.outcomes:
            raise SpearError(f"no episode has ended in {path}. Run `spear evaluate` again.")
        return results
    file = path / "results.json" if path.is_dir() else path
    return read_json_as(
        Results,
        file,
        advice="give what `spear evaluate --out` wrote",
        problem="contains no results",
    )
