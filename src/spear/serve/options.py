"""Options of the servers: light, so that the command line knows them without what a server needs to
run.
"""

from typing import Annotated

from tyro.conf import Positional, arg

from spear.errors import SpearError
from spear.util.options import (
    DatasetName,
    Device,
    Dtype,
    OptionalFolder,
    OptionalInt,
    OptionalName,
    Options,
    PolicyName,
    Range,
)


class ServiceOptions(Options):
    """A policy, the robot that it is served to, and where."""

    policy: Positional[Annotated[PolicyName, arg(metavar="POLICY")]]
    port: Annotated[int, Range(0, 65535)] = 8000
    """Where to listen; 0 takes a free port."""
    host: str = "127.0.0.1"
    """Address to listen on. The default lets only this machine in; 0.0.0.0 lets in every machine,
    such as benchmarks in Docker."""
    embodiment: str = "generic"
    """The robot: generic, droid, roboarena, widowx, simpler_widowx, maniskill2_widowx, or a Python
    file that describes yours (see docs/robots.md)."""
    control: OptionalName = None
    """How the robot is commanded, where it has several ways (droid: joint_velocity, joint_position,
    cartesian_position). Default: the robot's usual one."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    flow_steps: Annotated[OptionalInt, Range(1)] = None
    """Euler steps from noise to actions. Default: the model's own number."""
    dataset: DatasetName = None
    max_batch: Annotated[int, Range(1)] = 16
    """At most so many observations are answered together."""
    wait_ms: Annotated[float, Range(0, 10_000)] = 5.0
    """For so long, at most, a batch waits for more observations."""


class ServeOptions(ServiceOptions):
    token: Annotated[str | None, arg(metavar="TEXT")] = None
    """What clients must send (openpi-client: api_key). Also read from SPEAR_TOKEN, where other
    users of this machine do not see it."""
    queue: Annotated[int, Range(1)] = 64
    """So many observations may wait; further ones are told that the server is busy."""
    ui: bool = False
    """Also serve a page for people, at the address that is printed: watch and steer the policy in
    the built-in simulator, ask SPEAR-VLM about a scene or a photo (see docs/robots.md)."""
    episodes: OptionalFolder = None
    """With --ui: recorded episodes, or the results of an evaluation (its --out), to replay on the
    page.
    """

    def __post_init__(self) -> None:
        """Refuses episodes without a page, and a token that no client could send in an HTTP header,
        above all an empty one: it would leave a server open that was meant to be closed."""
        super().__post_init__()
        if self.episodes and not self.ui:
            raise SpearError(f"--episodes {self.episodes}: is for the page: add --ui")
        token = self.token
        plain = token is None or (
            token.strip() == token != "" and token.isascii() and token.isprintable()
        )
        if not plain:
            wrong = "empty, or with spaces at its ends or characters beyond ASCII"
            raise SpearError(
                f"--token (or SPEAR_TOKEN): {wrong}: give another one, or leave it out"
            )


class VlaEvalOptions(ServiceOptions):
    port: Annotated[int, Range(1, 65535)] = 8000
    """Where to listen."""
    embodiment: str = "maniskill2_widowx"
    """The benchmark's robot: maniskill2_widowx, or a Python file that describes another one (see
    docs/robots.md; its observations are those of the benchmark)."""
    replan: Annotated[int, Range(1)] = 1
    """Of each predicted chunk, so many actions are executed before the next look."""
