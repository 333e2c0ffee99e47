"""Makes docs/figures/film.gif: nano-vlm finds objects in 3D, then nano acts, in one held-out scene.

python scripts/readme_film.py [SEED]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from spear.labels.fit.box3d import fit_nearest_box
from spear.policy import Spear1Policy, VlmBundle, load_vlm
from spear.report.draw import draw_label
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import compute_intrinsics, get_thread_renderer
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX
from spear.types import Array, LabeledImage, LabeledObject
from spear.util.images import encode_jpeg

FAMILY = "put_in_basket"
DEFAULT_SEED = 12
SHOWN_SIZE_PX = (480, 320)
FRAME_MS = 200  # one control step
BOXES_MS = 1800
END_MS = 1500
NUM_COLORS = 96
FILM = Path(__file__).parents[1] / "docs" / "figures" / "film.gif"


def predict_boxes(env: TabletopEnv, vlm: VlmBundle) -> list[LabeledObject]:
    """The boxes that a SPEAR-VLM sees around the source and the target of the task."""
    image = env.observe()["observation/image"]
    names = [env.world.spec.objects[index].kind for index in (SOURCE_INDEX, TARGET_INDEX)]
    objects = []
    for name in names:
        prompt = f"Provide the 3D bounding box coordinates of the {name}"
        (answer,) = vlm.answer([image], [prompt], "box_vertices")
        vertices = np.array(answer.values).reshape(8, 3)
        objects.append(
            LabeledObject(
                name=name,
                box2d=np.zeros(4),
                mask_runs=(),
                box3d=fit_nearest_box(vertices),
                keypoints={},
            )
        )
    return objects


def show(env: TabletopEnv, objects: list[LabeledObject]) -> Image.Image:
    """The external camera's view, larger than the policy's, with boxes."""
    (pixels,) = get_thread_renderer().render_images(env.world, [("external", SHOWN_SIZE_PX)])
    width, height = SHOWN_SIZE_PX
    label = LabeledImage(
        image=encode_jpeg(pixels),
        width=width,
        height=height,
        intrinsics=compute_intrinsics(env.world, "external", SHOWN_SIZE_PX),
        objects=objects,
        unit="metre",
        source="film",
    )
    return Image.fromarray(draw_label(label, scale=1))


def roll_out(env: TabletopEnv, policy: Spear1Policy) -> list[Image.Image]:
    """One picture per control step until the task is done."""
    frames = [show(env, [])]
    for _ in range(MAX_STEPS):
        action: Array = policy.infer({**env.observe(), "seed": env.steps})["actions"][0]
        info = env.step_without_observing(action)
        frames.append(show(env, []))
        if info["success"]:
            return frames
    raise SystemExit(f"nano does not succeed in this scene: choose another seed than {env.seed}")


def main(seed: int) -> None:
    policy = Spear1Policy.load("nano")
    env = TabletopEnv(FAMILY, policy.image_sizes)
    env.reset(seed=seed)
    with_boxes = show(env, predict_boxes(env, load_vlm("nano-vlm")))
    frames = [with_boxes, *roll_out(env, policy)]
    durations_ms = [BOXES_MS, *[FRAME_MS] * (len(frames) - 2), END_MS]
    palette = [frame.quantize(NUM_COLORS, dither=Image.Dither.NONE) for frame in frames]
    palette[0].save(
        FILM, save_all=True, append_images=palette[1:], duration=durations_ms, loop=0, optimize=True
    )
    print(f"{FILM.name}: {len(frames)} frames, {FILM.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SEED)
