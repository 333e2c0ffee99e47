"""Draws the diagrams of the documentation in one style: docs/figures/{model,pipeline,frames}.svg.

    python scripts/draw_diagrams.py

The colors follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
STYLE = """
  text { font: 14px Helvetica, Arial, sans-serif; fill: #1b2733; text-anchor: middle }
  .small { font-size: 12px; fill: #55677a }
  .title { font-weight: bold; text-anchor: start }
  .left { text-anchor: start }
  .box { stroke: #33475b; stroke-width: 1.4; fill: #ffffff }
  .group { stroke: #c3ced9; stroke-width: 1.2; fill: #f7f9fb }
  .vision { fill: #e3eefb } .language { fill: #fdeacf } .action { fill: #e2f3e2 }
  .arrow { stroke: #33475b; stroke-width: 1.6; fill: none; marker-end: url(#head) }
  .head { fill: #33475b }
  .x { stroke: #d62728 } .y { stroke: #2ca02c } .z { stroke: #1f6fd6 }
  .axis { stroke-width: 3; fill: none }
  .shape { fill: #dde5ed; stroke: #33475b; stroke-width: 1.2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #a9b7c6 }
    .box { stroke: #a9b7c6; fill: #1d2733 } .group { stroke: #44566a; fill: #151d26 }
    .vision { fill: #20344d } .language { fill: #4a3a1d } .action { fill: #1f3d24 }
    .arrow { stroke: #a9b7c6 } .head { fill: #a9b7c6 }
    .shape { fill: #2b3947; stroke: #a9b7c6 }
  }
"""
LINE_HEIGHT = 17


class Diagram:
    """An SVG that is put together from boxes, arrows and words. Units are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width = width
        self.height = height
        self.title = title
        self.elements: list[str] = []

    def group(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """A frame around boxes that belong together."""
        self._rectangle("group", x, y, width, height, 10)
        self.elements.append(
            f'<text class="title" x="{x + 14}" y="{y + 21}">{escape(title)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: list[str],
        kind: str = "",
    ) -> None:
        """A box with a name in its first line and details below."""
        self._rectangle(f"box {kind}".strip(), x, y, width, height, 6)
        top = y + height / 2 - LINE_HEIGHT * (len(lines) - 1) / 2 + 5
        for index, line in enumerate(lines):
            style = ' class="small"' if index else ""
            position = f'x="{x + width / 2}" y="{top + LINE_HEIGHT * index:.0f}"'
            self.elements.append(f"<text{style} {position}>{escape(line)}</text>")

    def arrow(self, *points: tuple[float, float]) -> None:
        """An arrow along points, with its head at the last one."""
        path = "M" + " L".join(f"{x:.0f} {y:.0f}" for x, y in points)
        self.elements.append(f'<path class="arrow" d="{path}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "small") -> None:
        self.elements.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def axis(self, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """One axis of a coordinate frame, named at its end."""
        x, y = end
        length = math.hypot(x - start[0], y - start[1])
        label_x = x + 12 * (x - start[0]) / length
        label_y = y + 12 * (y - start[1]) / length + 5
        path = f"M{start[0]:.0f} {start[1]:.0f} L{x:.0f} {y:.0f}"
        self.elements.append(f'<path class="axis {kind}" d="{path}"/>')
        self.elements.append(f'<text x="{label_x:.0f}" y="{label_y:.0f}">{kind}</text>')

    def shape(self, points: list[tuple[float, float]]) -> None:
        """A filled polygon."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.elements.append(f'<polygon class="shape" points="{path}"/>')

    def circle(self, x: float, y: float, radius: float) -> None:
        self.elements.append(f'<circle class="shape" cx="{x}" cy="{y}" r="{radius}"/>')

    def write(self, name: str) -> None:
        head = (
            '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path class="head" d="M0 0L10 5L0 10z"/></marker>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{head}</defs>",
            *self.elements,
            "</svg>",
        ]
        (FIGURES / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _rectangle(
        self, kind: str, x: float, y: float, width: float, height: float, radius: int
    ) -> None:
        size = f'width="{width}" height="{height}" rx="{radius}"'
        self.elements.append(f'<rect class="{kind}" x="{x}" y="{y}" {size}/>')


def draw_model() -> None:
    """The two halves of SPEAR-1, from the inputs below to the outputs above."""
    diagram = Diagram(980, 500, "SPEAR-VLM on the left, the action expert on the right")
    diagram.group(10, 10, 610, 480, "SPEAR-VLM")
    diagram.group(640, 10, 330, 480, "Action expert")

    # Images through two encoders.
    diagram.box(30, 420, 260, 50, ["images", "280 × 210 external, 112 × 112 wrist"])
    diagram.box(30, 330, 122, 52, ["SigLIP", "300 × 1152"], "vision")
    diagram.box(168, 330, 122, 52, ["MoGe encoder", "300 × (4 · 1024)"], "vision")
    diagram.box(30, 268, 122, 32, ["projection"], "vision")
    diagram.box(168, 268, 122, 32, ["projection"], "vision")
    diagram.box(60, 200, 200, 40, ["average, token by token", "300 × 2048"])
    for center in (91, 229):
        diagram.arrow((center, 420), (center, 384))
        diagram.arrow((center, 330), (center, 302))
    diagram.arrow((91, 268), (130, 242))
    diagram.arrow((229, 268), (190, 242))

    # The language model and its answers.
    diagram.box(340, 420, 260, 50, ["question or instruction", "tokens, and 1,024 3D tokens"])
    diagram.box(
        30,
        110,
        570,
        58,
        ["Gemma, 2 B, 18 layers", "image and text tokens attend to each other"],
        "language",
    )
    diagram.arrow((160, 200), (160, 170))
    diagram.arrow((470, 420), (470, 170))
    diagram.box(170, 48, 290, 36, ["answer: words and 3D tokens"])
    diagram.arrow((315, 110), (315, 86))

    # The action expert.
    diagram.box(660, 420, 110, 50, ["state", "pose, gripper"])
    diagram.box(790, 420, 160, 50, ["noise, τ = 0", "R³ × S³ × gripper"])
    diagram.box(660, 110, 290, 58, ["Gemma, 300 M, 18 layers", "state → 5 actions"], "action")
    diagram.box(790, 250, 160, 52, ["actions at time τ", "5 × 8"])
    diagram.arrow((715, 420), (715, 170))
    diagram.arrow((870, 420), (870, 304))
    diagram.arrow((870, 250), (870, 170))
    diagram.arrow((920, 168), (962, 200), (962, 276), (952, 276))
    diagram.text(920, 326, "velocity,")
    diagram.text(920, 342, "10 Euler steps")
    diagram.arrow((600, 128), (658, 128))
    diagram.arrow((600, 150), (658, 150))
    diagram.text(629, 122, "keys")
    diagram.text(629, 165, "values")
    diagram.box(670, 48, 270, 36, ["5 actions at 5 Hz, τ = 1"])
    diagram.arrow((805, 110), (805, 86))
    diagram.write("model.svg")


def draw_pipeline() -> None:
    """From data to a robot: what each stage takes and gives."""
    diagram = Diagram(980, 420, "From images and demonstrations to a policy on a robot")
    rows = (60, 270)
    diagram.group(10, 10, 640, 180, "3D from ordinary images")
    diagram.box(30, rows[0], 130, 100, ["images", "photos, videos,", "no robot needed"])
    diagram.box(200, rows[0], 130, 100, ["3D labels", "masks, boxes,", "keypoints"], "vision")
    diagram.box(370, rows[0], 110, 100, ["questions", "and answers"], "vision")
    diagram.box(520, rows[0], 112, 100, ["SPEAR-VLM"], "language")
    diagram.group(10, 220, 640, 180, "Actions from demonstrations")
    diagram.box(30, rows[1], 130, 100, ["demonstrations", "RLDS, LeRobot,", "simulator"])
    diagram.box(200, rows[1], 130, 100, ["audit, prepare", "one convention,", "5 Hz"], "action")
    diagram.box(370, rows[1], 110, 100, ["batches", "of action", "chunks"], "action")
    diagram.box(520, rows[1], 112, 100, ["SPEAR-1", "the policy"], "language")
    diagram.group(680, 10, 290, 390, "Use")
    diagram.box(710, rows[0], 230, 100, ["ask", "3D questions about images"])
    diagram.box(710, 190, 230, 80, ["evaluate", "simulator, SIMPLER, recordings"])
    diagram.box(710, 300, 230, 80, ["serve", "to a robot, over a websocket"])
    for y in rows:
        for start, end in ((160, 198), (330, 368), (480, 518)):
            diagram.arrow((start, y + 50), (end, y + 50))
    diagram.arrow((576, 160), (576, 268))
    diagram.text(590, 216, "weights", "small left")
    diagram.arrow((632, 110), (708, 110))
    diagram.arrow((632, 305), (665, 305), (665, 230), (708, 230))
    diagram.arrow((632, 335), (708, 335))
    diagram.write("pipeline.svg")


def draw_frames() -> None:
    """The base frame, the end-effector frame (the gripper points down), and the camera frame."""
    diagram = Diagram(980, 340, "The three coordinate frames")
    diagram.group(10, 10, 310, 320, "Base frame")
    diagram.shape([(110, 250), (190, 250), (175, 200), (125, 200)])
    diagram.text(150, 275, "robot base")
    origin = (150, 200)
    diagram.axis("x", origin, (265, 200))
    diagram.axis("y", origin, (215, 140))
    diagram.axis("z", origin, (150, 80))
    diagram.text(165, 306, "x forward, y to the left, z up; meters")

    diagram.group(335, 10, 310, 320, "End-effector frame")
    diagram.shape([(440, 70), (540, 70), (540, 105), (440, 105)])
    diagram.shape([(440, 105), (455, 105), (455, 190), (440, 190)])
    diagram.shape([(525, 105), (540, 105), (540, 190), (525, 190)])
    tip = (490, 185)
    diagram.axis("y", tip, (415, 185))
    diagram.axis("z", tip, (490, 95))
    diagram.axis("x", tip, (550, 135))
    diagram.text(490, 266, "the gripper points down")
    diagram.text(490, 290, "origin between the finger tips, parallel to the")
    diagram.text(490, 308, "base frame; the fingers close along y")

    diagram.group(660, 10, 310, 320, "Camera frame")
    diagram.shape([(740, 110), (800, 110), (800, 170), (740, 170)])
    diagram.shape([(800, 125), (830, 110), (830, 170), (800, 155)])
    lens = (830, 140)
    diagram.axis("z", lens, (935, 140))
    diagram.axis("x", lens, (880, 195))
    diagram.axis("y", lens, (830, 245))
    diagram.text(815, 290, "z forward (into the scene),")
    diagram.text(815, 308, "x right, y down; OpenCV's convention")
    diagram.write("frames.svg")


def main() -> None:
    draw_model()
    draw_pipeline()
    draw_frames()


if __name__ == "__main__":
    main()
