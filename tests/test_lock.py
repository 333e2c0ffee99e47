"""The lock file of the tests' environment has a hash for each version, and no address."""

import re
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
LOCKED_LINE = re.compile(r"(\S+==\S+) --hash=sha256:[0-9a-f]{64}")


def read_lines(name: str) -> list[str]:
    """The lines of a file of the scripts that are no comments."""
    lines = (SCRIPTS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normalize(requirement: str) -> str:
    """A requirement in the form in which names of packages are compared."""
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def test_every_locked_file_has_a_hash_and_no_address() -> None:
    lines = read_lines("lock.txt")

    assert lines
    assert all(LOCKED_LINE.fullmatch(line) for line in lines)


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    locked = {}
    for line in read_lines("lock.txt"):
        requirement = line.split()[0]
        version = requirement.partition("==")[2]
        locked[normalize(requirement)] = version.removesuffix("+cpu")  # PyTorch's build

    constraints = {}
    for line in read_lines("constraints.txt"):
        constraints[normalize(line)] = line.partition("==")[2]
    assert locked == constraints
