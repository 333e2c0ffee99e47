"""LIBERO's suites and the protocols by which projects count successes in them."""

from dataclasses import dataclass

from spear.errors import SpearError

NUM_TASKS = 10
NUM_STATES = 50
"""Official states of each task of the four original suites."""

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Controller steps (20 Hz) after which an episode ends (openpi's LIBERO client). A
perturbed suite has the limit of the suite that its name begins with."""
LABELED_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""The suites whose scenes `spear label libero:` shows."""


@dataclass(frozen=True)
class Protocol:
    """How a project evaluates in LIBERO.

    seed       seed of the environment, which draws where cabinet and stove stand.
    max_steps  limits that differ from `MAX_STEPS`.
    """

    seed: int
    max_steps: dict[str, int]


PROTOCOLS = {
    "openpi": Protocol(seed=7, max_steps={}),
    "oft": Protocol(seed=0, max_steps={}),
    "lerobot": Protocol(seed=7, max_steps={"libero_spatial": 280}),
}
"""openpi (its LIBERO client), OpenVLA-OFT (its script run_libero_eval), LeRobot 0.6.1 (its module
envs.libero). LeRobot draws its seed for each run; we take openpi's."""


def resolve_original_suite(suite: str) -> str:
    """Return the original suite that a perturbed one belongs to.

    >>> resolve_original_suite("libero_goal_swap")
    'libero_goal'
    """
    for original in MAX_STEPS:
        if suite == original or suite.startswith(f"{original}_"):
            return original
    raise SpearError(
        f"LIBERO has no suite {suite!r}. Give {', '.join(MAX_STEPS)} or one of its perturbed "
        "suites, for example libero_goal_swap."
    )


def get_max_steps(suite: str, protocol: Protocol) -> int:
    """Return the controller steps after which an episode ends."""
    original = resolve_original_suite(suite)
    return protocol.max_steps.get(original, MAX_STEPS[original])


def format_task_family(suite: str, index: int) -> str:
    """Return the name of a task; films have it in their files' names.

    >>> format_task_family("libero_goal", 3)
    'libero_goal-3'
    """
    return f"{suite}-{index}"


def parse_task(name: str) -> tuple[str, int]:
    """Return the suite and the number of a task.

    >>> parse_task("libero_goal-3")
    ('libero_goal', 3)
    """
    suite, _, number = name.rpartition("-")
    return suite, int(number)
