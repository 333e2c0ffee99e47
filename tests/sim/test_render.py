"""Pictures: depth, masks, boxes and cameras tell one story; rendering contexts leave each other alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from refusals import refuses
from spear.labels.fit.image import unproject
from spear.sim.render import Renderer, get_thread_renderer, render_clutter_frame, render_frame
from spear.sim.scene import sample_scene
from spear.sim.world import GRIPPER_NAME, World
from spear.types import Frame

SIZE = (280, 210)


def points_of(frame: Frame) -> np.ndarray:
    """[h, w, 3], camera frame."""
    return unproject(frame.depth, frame.intrinsics)


def in_box(points: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box coordinates of points (0 … 1 inside) and the box's side lengths; corners in binary order."""
    edges = vertices[[4, 2, 1]] - vertices[0]
    lengths = np.linalg.norm(edges, axis=1)
    return (points - vertices[0]) @ (edges / lengths[:, None] ** 2).T, lengths


@pytest.mark.parametrize("camera", ["external", "wrist"])
def test_points_of_an_object_lie_in_its_box_and_reach_its_sides(
    renderer: Renderer, camera: str
) -> None:
    checked = 0
    for seed in range(6):
        frame = render_clutter_frame(seed, camera, SIZE)
        points = points_of(frame)
        for index, name in frame.names.items():
            inside, lengths = in_box(points[frame.instances == index], frame.boxes[index])
            slack = 0.004 / lengths
            assert ((inside > -slack) & (inside < 1 + slack)).all(axis=1).mean() > 0.97, (
                seed,
                name,
            )
            checked += 1
    assert checked > 12


def test_an_object_seen_whole_fills_its_box(renderer: Renderer) -> None:
    spreads = []
    for seed in range(4):
        frame = render_frame(World(sample_scene("put_in_basket", seed)), "external", SIZE)
        inside, _ = in_box(points_of(frame)[frame.instances == 1], frame.boxes[1])
        spreads.append(np.ptp(inside, axis=0))
    assert np.median(spreads, axis=0).min() > 0.85


def test_the_table_is_flat_at_zero_height(renderer: Renderer) -> None:
    world = World(sample_scene("stack_cube", 5))
    frame = render_frame(world, "external", SIZE)
    points = points_of(frame).reshape(-1, 3) @ frame.extrinsics[:3, :3].T + frame.extrinsics[:3, 3]
    heights = points[
        renderer.layers(world, "external", SIZE)[2].ravel() == world.model.geom("table").id, 2
    ]
    assert len(heights) > 5000 and np.abs(heights).max() < 2e-3


def test_labels_and_pictures_show_the_same(renderer: Renderer) -> None:
    assert GRIPPER_NAME in render_clutter_frame(2, "wrist", (112, 112)).names.values()
    world = World(sample_scene("put_on", 6))
    for large in (SIZE, (700, 525)):  # the buffer grows
        image, wrist = renderer.images(world, [("external", large), ("wrist", (60, 90))])
        np.testing.assert_array_equal(image, render_frame(world, "external", large).image)
        assert image[-100:].std() > 3 and wrist.shape == (90, 60, 3) and wrist.std() > 5
    refuses("wrst", render_frame, world, "wrst", SIZE)


def test_threads_have_contexts_of_their_own(renderer: Renderer) -> None:
    def shot() -> tuple[Renderer, bytes]:
        return get_thread_renderer(), render_clutter_frame(0, "external", (96, 72)).image.tobytes()

    found = [shot()]
    for _ in range(2):  # one after the other: the first one's context outlives it
        with ThreadPoolExecutor(1) as thread:
            found.append(thread.submit(shot).result())
    found.append(shot())
    assert len({seen for _, seen in found}) == 1
    assert found[0][0] is found[-1][0] is renderer and len({id(own) for own, _ in found}) == 3
