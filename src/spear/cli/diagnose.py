"""`spear diagnose`: why a robot fails."""

from pathlib import Path

from spear.errors import (
    SpearError,
    UndecidedError,
    VerdictError,
    escape_control_characters,
    notice,
)
from spear.util.options import (
    DatasetName,
    Device,
    OptionalFile,
    OptionalFolder,
    OptionalName,
    Options,
    PolicyName,
)


class FaultFoundError(VerdictError):
    """A diagnosis has found what is wrong."""

    code = 1


class DiagnoseOptions(Options):
    policy: PolicyName = "nano"
    episodes: OptionalFolder = None
    """Folder of prepared training episodes, with which the rollout is compared."""
    rollout: OptionalFolder = None
    """Folder of a recorded rollout (spear serve --record)."""
    robot: OptionalName = None
    """The embodiment or the robot's file, which the advice then names. Default: the one that the
    rollout was recorded with."""
    norm_stats: DatasetName = None
    device: Device = "auto"
    json: OptionalFile = None
    """Write verdict, findings and what was not examined to this file, as JSON."""
    out: OptionalFile = Path("runs/diagnose.html")
    """Write a page to this file; None writes none."""


def diagnose(options: DiagnoseOptions) -> None:
    """Find out why a robot fails: frames, units, gripper, cameras, times, or the policy itself.

    Training episodes, policy and rollout are looked at together. The list names what is wrong, the
    likeliest first, with the evidence, and what to change in which file. Without a rollout or
    episodes, fewer faults can be named. The exit code is 0 if nothing is found, 1 if something is,
    and 3 if the data do not decide.

    Examples:
        spear diagnose --policy runs/mine --episodes my_episodes --rollout recordings
        spear diagnose --rollout recordings --json diagnosis.json
    """
    from spear.diagnose.diagnosis import diagnose as run_checks
    from spear.diagnose.diagnosis import write_diagnosis_json
    from spear.diagnose.load import load_case
    from spear.diagnose.text import format_diagnosis

    if options.rollout is None and options.episodes is None:
        raise SpearError("nothing to look at. Give --rollout FOLDER, --episodes FOLDER, or both.")
    if options.rollout is None:
        notice("without --rollout, only the policy and its training data are examined.")
    case = load_case(
        options.policy,
        options.episodes,
        options.rollout,
        options.device,
        options.norm_stats,
        options.robot,
    )
    diagnosis = run_checks(case)
    print(escape_control_characters(format_diagnosis(diagnosis), keep_newlines=True))
    if options.json is not None:
        write_diagnosis_json(diagnosis, options.json)
    if options.out is not None:
        from spear.report.diagnosis import write_diagnosis_page

        write_diagnosis_page(case, diagnosis, options.out)
        print(f"open {options.out.resolve()}")
    if diagnosis.verdict == "found":
        first = diagnosis.findings[0]
        raise FaultFoundError(
            f"found: begin with {first.check.fault} ({first.finding.confidence:.0%} sure): "
            f"{first.finding.cure}."
        )
    if diagnosis.verdict == "undecided":
        raise UndecidedError(
            "undecided: the data do not decide what is wrong. Record more episodes with --record, "
            "and give --episodes with the training data."
        )
