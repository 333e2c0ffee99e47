"""The text that `spear diagnose` prints."""

from spear.diagnose.diagnosis import Diagnosis

MAX_UNKNOWN_REASONS = 6  # different reasons why faults were not examined


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the ranked list of what is wrong, and what could not be examined."""
    lines = [f"verdict: {diagnosis.verdict}"]
    for rank, ranked in enumerate(diagnosis.findings, 1):
        finding = ranked.finding
        lines += [
            "",
            f"{rank}. {ranked.check.fault}: {ranked.check.title} ({finding.confidence:.0%} sure)",
            f"   evidence  {finding.evidence}",
            f"   change    {finding.cure}",
            f"   where     {finding.file}",
        ]
    for ranked, cause in diagnosis.secondary:
        lines += ["", f"explained by {cause}: {ranked.check.fault} ({ranked.finding.evidence})"]
    if diagnosis.suspicions:
        lines += ["", "not decided:"]
        lines += [f"   {fault}: {reason}" for fault, reason in diagnosis.suspicions.items()]
    if diagnosis.unknown:
        lines += ["", "not examined:"]
        lines += _format_unexamined_faults(diagnosis)
    if diagnosis.clean:
        lines += ["", f"examined and not found: {', '.join(diagnosis.clean)}"]
    return "\n".join(lines)


def _format_unexamined_faults(diagnosis: Diagnosis) -> list[str]:
    """Return a line for each reason why faults were not examined, with these faults."""
    faults_by_reason: dict[str, list[str]] = {}
    for fault, reason in diagnosis.unknown.items():
        faults_by_reason.setdefault(reason, []).append(fault)
    reasons = list(faults_by_reason.items())[:MAX_UNKNOWN_REASONS]
    return [f"   {', '.join(faults)}: {reason}" for reason, faults in reasons]
