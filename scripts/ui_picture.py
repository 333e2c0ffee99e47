"""Makes docs/ui.png: the page of `spear serve --policy nano --ui` after a few steps, in Chromium.

PYTHONPATH=tests/support python scripts/ui_picture.py [OUT]
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from browser import Tab, run_chromium
from serve_here import run_server
from spear.policy import Spear1Policy
from spear.ui.page import Page

READY = "typeof view === 'object' && view.images && picture.complete && !waiting && !view.running"
WIDTH = 1260
SEED = 9  # a scene whose boxes nano-vlm finds to within some millimeters
STEP = 1
QUESTION = "How far away is the blue cube?"
PICTURE = Path(__file__).parents[1] / "docs" / "ui.png"


def main(out: Path = PICTURE) -> None:
    """Writes the picture to `out`."""
    policy = Spear1Policy.load("nano")
    with (
        tempfile.TemporaryDirectory() as profile,
        run_chromium(Path(profile)) as browser,
        run_server(policy, page=Page(policy, "nano", None, 2**20)) as server,
    ):
        tab = Tab(browser)
        tab.open(f"http://127.0.0.1:{server.port}/", WIDTH, 1200)
        tab.wait(READY)
        tab.run(f"document.querySelector('#seed').value = {SEED}")
        tab.click("#reset")
        tab.wait(f"{READY} && !memory.over()")
        tab.click("#run")
        tab.wait("memory.over()")
        tab.wait(READY)
        tab.run(f"seek({STEP})")
        tab.click("#objects button.all")
        tab.wait(f"view.boxes.length && view.boxes[0].step === {STEP}")
        tab.type("#question", QUESTION)
        tab.enter()
        tab.wait(f"view.answer && {READY}")
        tab.click("#truth")
        tab.run(
            "scrollTo(0, 0),"
            " new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        tall = tab.run("document.querySelector('main').getBoundingClientRect().height")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": tall, "scale": 1}
        shot = tab.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4).save(out, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
