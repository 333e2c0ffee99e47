"""Options of the servers. This file imports nothing heavy, so that help texts are shown at once."""

from typing import Annotated, Literal

from tyro.conf import arg

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
    Quantize,
    Range,
    RarelyUsed,
    list_changed_options,
)

EMBODIMENTS = (
    "generic",
    "droid",
    "roboarena",
    "widowx",
    "libero",
    "libero_vla_eval",
    "simpler_widowx",
    "maniskill2_widowx",
)
DEFAULT_EMBODIMENTS = {"openpi": "generic", "vla-eval": "maniskill2_widowx"}
"""Protocol -> the embodiment that is served without --embodiment."""
# The options that have an effect only with the protocol openpi, or only with vla-eval.
OPENPI_OPTIONS = (
    "token",
    "ui",
    "episodes",
    "max_queue_size",
    "max_message_mib",
    "record",
    "max_record_gib",
)
VLA_EVAL_OPTIONS = ("replan_steps",)


class ServeOptions(Options):
    """A policy, the robot or benchmark that it is served to, and where."""

    policy: PolicyName
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    """What connects: openpi-client, for robots; or AllenAI's vla-eval harness, for benchmarks."""
    embodiment: Annotated[str | None, arg(metavar=f"{{{','.join(EMBODIMENTS)}}}|FILE.py")] = None
    """The robot, or a Python file that describes yours (see docs/howto/own-robot.md). Default:
    generic; with --protocol vla-eval: maniskill2_widowx, SIMPLER's robot."""
    control: OptionalName = None
    """How to command the robot, if it has several controls (droid: {joint_velocity, joint_position,
    cartesian_position}). Default: the robot's first one."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on. The default lets only this machine in; 0.0.0.0 lets in every machine,
    such as benchmarks in Docker."""
    token: Annotated[str | None, arg(metavar="TEXT")] = None
    """Require this token from clients (openpi-client: api_key). It is also read from SPEAR_TOKEN,
    where other users of this machine do not see it."""
    ui: bool = False
    """Also serve a web page, on which you watch and steer the policy in the built-in simulator and
    ask SPEAR-VLM about a scene or a photo (see docs/howto/web-page.md)."""
    episodes: OptionalFolder = None
    """With --ui: replay recorded episodes, or those of an evaluation (its --out), on the page."""
    record: OptionalFolder = None
    """Record what robots observe and what they are answered as an episode store in this folder,
    which is private to you (see docs/howto/production.md). The page of --ui is not recorded.
    Default: record nothing."""
    max_record_gib: Annotated[float, Range(0.01)] = 10.0
    """With --record: delete the oldest episodes when the recordings exceed this many GiB."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    quantize: Quantize = None
    flow_steps: Annotated[OptionalInt, Range(1)] = None
    """Number of Euler steps from noise to actions. Default: the model's own number."""
    norm_stats: DatasetName = None
    allow_missing_cameras: bool = False
    """Serve a policy to a robot that lacks a camera on which the policy was trained, such as one at
    the wrist. The actions may be bad."""
    replan_steps: Annotated[int, Range(1)] = 1
    """With --protocol vla-eval: execute this many actions of each chunk before the next
    inference."""
    max_batch_size: Annotated[int, Range(1)] = 16
    """Answer at most this many observations together."""
    batch_timeout_ms: Annotated[float, Range(0, 10_000), RarelyUsed()] = 5.0
    """Let a batch wait for more observations for at most this many milliseconds."""
    max_queue_size: Annotated[int, Range(1), RarelyUsed()] = 64
    """Let at most this many observations wait; the server answers further ones with "busy"."""
    max_message_mib: Annotated[int, Range(1, 256), RarelyUsed()] = 16
    """Accept messages, such as observations with their images, of at most this many MiB. The server
    closes the connection of a client that sends a larger one, with code 1009."""

    def __post_init__(self) -> None:
        """Refuse options without effect, and a token that no client can send in an HTTP header.

        An empty token is refused as well, because it would leave the server open to everybody.
        """
        super().__post_init__()
        self._check_options_suit_protocol()
        if self.episodes and not self.ui:
            raise SpearError(f"--episodes {self.episodes} needs the page. Add --ui.")
        if not self.record and list_changed_options(self, "max_record_gib"):
            raise SpearError(
                "--max-record-gib has no effect without --record. Add --record FOLDER."
            )
        if self.token is not None and not _fits_in_header(self.token):
            raise SpearError(
                "--token (or SPEAR_TOKEN) is empty, or has spaces at its ends or characters beyond "
                "ASCII. Give another one, or leave it out."
            )

    @property
    def embodiment_or_default(self) -> str:
        """The embodiment, or the default of the protocol."""
        return self.embodiment or DEFAULT_EMBODIMENTS[self.protocol]

    def _check_options_suit_protocol(self) -> None:
        """Refuse options without effect with this protocol, and port 0 for the harness."""
        unused = OPENPI_OPTIONS if self.protocol == "vla-eval" else VLA_EVAL_OPTIONS
        for option in list_changed_options(self, *unused):
            raise SpearError(
                f"{option} has no effect with --protocol {self.protocol}. Leave it out."
            )
        if self.protocol == "vla-eval" and self.port == 0:
            raise SpearError(
                "--port 0 does not suit a harness, which needs a port that is known. Give at "
                "least 1."
            )


def _fits_in_header(token: str) -> bool:
    """Return whether a client can send a token unchanged in an HTTP header."""
    has_outer_spaces = token.strip() != token
    return token != "" and not has_outer_spaces and token.isascii() and token.isprintable()
