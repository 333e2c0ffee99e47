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
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on. The default lets only this machine in; 0.0.0.0 lets in every machine,
    such as benchmarks in Docker."""
    embodiment: str = "generic"
    """The robot: {generic, droid, roboarena, widowx, simpler_widowx, maniskill2_widowx}, or a
    Python file that describes yours (see docs/robots.md)."""
    control: OptionalName = None
    """How to command the robot, if it has several controls (droid: {joint_velocity, joint_position,
    cartesian_position}). Default: the robot's first one."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    flow_steps: Annotated[OptionalInt, Range(1)] = None
    """Number of Euler steps from noise to actions. Default: the model's own number."""
    dataset: DatasetName = None
    allow_missing_cameras: bool = False
    """Serve a policy to a robot that lacks a camera on which the policy was trained, such as one at
    the wrist. The actions may be bad."""
    max_batch: Annotated[int, Range(1)] = 16
    """Answer at most this many observations together."""
    wait_ms: Annotated[float, Range(0, 10_000)] = 5.0
    """Let a batch wait for more observations for at most this many milliseconds."""


class ServeOptions(ServiceOptions):
    token: Annotated[str | None, arg(metavar="TEXT")] = None
    """Require this token from clients (openpi-client: api_key). It is also read from SPEAR_TOKEN,
    where other users of this machine do not see it."""
    queue: Annotated[int, Range(1)] = 64
    """Let at most this many observations wait; the server answers further ones with "busy"."""
    ui: bool = False
    """Also serve a web page, on which you watch and steer the policy in the built-in simulator and
    ask SPEAR-VLM about a scene or a photo (see docs/robots.md)."""
    episodes: OptionalFolder = None
    """With --ui: replay recorded episodes, or those of an evaluation (its --out), on the page."""

    def __post_init__(self) -> None:
        """Refuse episodes without a page, and a token that no client can send in an HTTP header.

        An empty token, above all, would leave a server open that was meant to be closed.
        """
        super().__post_init__()
        if self.episodes and not self.ui:
            raise SpearError(f"--episodes {self.episodes} needs the page. Add --ui.")
        if self.token is not None and not _fits_in_header(self.token):
            raise SpearError(
                "--token (or SPEAR_TOKEN) is empty, or has spaces at its ends or characters beyond "
                "ASCII. Give another one, or leave it out."
            )


def _fits_in_header(token: str) -> bool:
    """Return whether a client can send a token in an HTTP header as it is."""
    has_outer_spaces = token.strip() != token
    return token != "" and not has_outer_spaces and token.isascii() and token.isprintable()


class VlaEvalOptions(ServiceOptions):
    port: Annotated[int, Range(1, 65535)] = 8000
    """Port to listen on."""
    embodiment: str = "maniskill2_widowx"
    """The benchmark's robot: maniskill2_widowx, or a Python file that describes another one (see
    docs/robots.md; its observations are those of the benchmark)."""
    replan: Annotated[int, Range(1)] = 1
    """Execute this many actions of each chunk before the next inference."""
