"""Pictures: depth, masks, boxes and cameras tell one story; rendering contexts leave each other alone."""

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest

from refusals import refuses
from spear.labels.fit.image import unproject
from spear.sim.render import Renderer, clutter_frame, frame_of
from spear.sim.scene import clutter_scene, sample_scene
from spear.sim.world import GRIPPER, World
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
def test_points_of_an_object_lie_in_its_box_and_reach_its_sides(renderer: Renderer, camera: str) -> None:
    checked = 0
    for seed in range(6):
        frame = clutter_frame(seed, camera, SIZE, renderer)
        points = points_of(frame)
        for index, name in frame.names.items():
            inside, lengths = in_box(points[frame.instances == index], frame.boxes[index])
            slack = 0.004 / lengths
            within = ((inside > -slack) & (inside < 1 + slack)).all(axis=1)
            assert within.mean() > 0.97, (seed, name)
            checked += 1
    assert checked > 12


def test_an_object_seen_whole_fills_its_box(renderer: Renderer) -> None:
    spreads = []
    for seed in range(4):
        frame = frame_of(World(sample_scene("put_in_basket", seed)), "external", SIZE, renderer)
        inside, _ = in_box(points_of(frame)[frame.instances == 1], frame.boxes[1])
        spreads.append(np.ptp(inside, axis=0))
    assert np.median(spreads, axis=0).min() > 0.85


def test_the_table_is_flat_at_zero_height(renderer: Renderer) -> None:
    world = World(sample_scene("stack_cube", 5))
    frame = frame_of(world, "external", SIZE, renderer)
    points = points_of(frame).reshape(-1, 3) @ frame.extrinsics[:3, :3].T + frame.extrinsics[:3, 3]
    geoms = renderer.layers(world, "external", SIZE)[2].ravel()
    heights = points[geoms == world.model.geom("table").id, 2]
    assert len(heights) > 5000
    assert np.abs(heights).max() < 2e-3


def test_labels_and_pictures_show_the_same(renderer: Renderer) -> None:
    assert GRIPPER in clutter_frame(2, "wrist", (112, 112), renderer).names.values()
    world = World(sample_scene("put_on", 6))
    for large in (SIZE, (700, 525)):  # the buffer grows
        image, wrist = renderer.images(world, [("external", large), ("wrist", (60, 90))])
        np.testing.assert_array_equal(image, frame_of(world, "external", large, renderer).image)
        assert image[-100:].std() > 3 and wrist.shape == (90, 60, 3) and wrist.std() > 5
    refuses("wrst", frame_of, world, "wrst", SIZE, renderer)


def _shot(renderer: Renderer, world: World) -> np.ndarray:
    return renderer.images(world, [("external", (96, 72))])[0]


def _drop_in_a_thread(renderers: list[Renderer]) -> None:
    def drop() -> None:
        del renderers[-1]
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()


def _close(renderers: list[Renderer]) -> None:
    last = renderers.pop()
    last.close()
    last.close()


@pytest.mark.parametrize(("end", "used_last"), [(_drop_in_a_thread, 0), (_close, 1)])
def test_the_end_of_one_leaves_the_others_as_they_were(
    renderer: Renderer, end: Callable[[list[Renderer]], None], used_last: int
) -> None:
    world = World(clutter_scene(0))
    renderers = [renderer, Renderer()]
    before = [_shot(r, world) for r in renderers]
    assert before[0].std() > 10
    _shot(renderers[used_last], world)
    end(renderers)
    np.testing.assert_array_equal(_shot(renderer, world), before[0])
    np.testing.assert_array_equal(_shot(Renderer(), world), before[1])


def test_one_that_ends_meanwhile(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    world, others, update = World(clutter_scene(0)), [Renderer()], Renderer._update
    before = renderer.layers(world, "external", SIZE)
    monkeypatch.setattr(Renderer, "_update", lambda *given: (update(*given), others.clear()))
    for now, then in zip(renderer.layers(world, "external", SIZE), before, strict=True):
        np.testing.assert_array_equal(now, then)
