"""Images: depth, masks, boxes and cameras agree; rendering contexts do not disturb each other.

The instances of a frame are numbered: objects from 1 on, in the order of the scene, then the
gripper.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from refusals import refuses
from spear.labels.fit.image import unproject
from spear.sim.render import Renderer, get_thread_renderer, render_clutter_frame, render_frame
from spear.sim.scene import sample_scene
from spear.sim.world import GRIPPER_NAME, World
from spear.types import Frame

SIZE = (280, 210)  # (width, height), pixels
BOX_TOLERANCE_M = 0.004  # points may lie outside of a box by this, because depth is rounded


def compute_points(frame: Frame) -> np.ndarray:
    """The point that each pixel of a frame shows, [h, w, 3], camera frame."""
    return unproject(frame.depth, frame.intrinsics)


def measure_box_edges(vertices: np.ndarray) -> np.ndarray:
    """The three edges of a box from its first corner, [3, 3].

    A corner's index has a bit for each axis, so corners 4, 2 and 1 are the first one's neighbors
    along x, y and z.
    """
    return vertices[[4, 2, 1]] - vertices[0]


def to_box_coordinates(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Coordinates [n, 3] of points [n, 3] along a box's edges, from 0 to 1 inside of the box."""
    edges = measure_box_edges(vertices)
    lengths_m = np.linalg.norm(edges, axis=1)
    # A point's coordinate along an edge e is its projection (point · e) / |e|².
    scaled_edges = edges / lengths_m[:, None] ** 2
    return (points - vertices[0]) @ scaled_edges.T


@pytest.mark.usefixtures("renderer")
@pytest.mark.parametrize("camera", ["external", "wrist"])
def test_points_of_an_object_lie_in_its_box(camera: str) -> None:
    num_objects = 0
    for seed in range(6):
        frame = render_clutter_frame(seed, camera, SIZE)
        points = compute_points(frame)
        for index, name in frame.names.items():
            box = frame.boxes[index]
            coordinates = to_box_coordinates(points[frame.instances == index], box)
            # The tolerance in units of the edges, [3].
            slack = BOX_TOLERANCE_M / np.linalg.norm(measure_box_edges(box), axis=1)

            is_inside = (coordinates > -slack) & (coordinates < 1 + slack)

            assert is_inside.all(axis=1).mean() > 0.97, (seed, name)
            num_objects += 1
    assert num_objects > 12  # the six images showed enough objects for the test to mean something


@pytest.mark.usefixtures("renderer")
def test_an_object_seen_whole_fills_its_box() -> None:
    """The visible points of the basket span most of its box along each axis.

    Instance 1 is the first object of the scene, the basket.
    """
    spreads = []
    for seed in range(4):
        frame = render_frame(World(sample_scene("put_in_basket", seed)), "external", SIZE)
        points = compute_points(frame)[frame.instances == 1]
        coordinates = to_box_coordinates(points, frame.boxes[1])
        spreads.append(np.ptp(coordinates, axis=0))

    assert np.median(spreads, axis=0).min() > 0.85


def test_the_table_is_flat_at_zero_height(renderer: Renderer) -> None:
    world = World(sample_scene("stack_cube", 5))
    frame = render_frame(world, "external", SIZE)
    _, _, geom_ids = renderer.render_image_depth_and_geom_ids(world, "external", SIZE)
    is_table = geom_ids.ravel() == world.model.geom("table").id

    # From the camera frame to the base frame.
    camera_points = compute_points(frame).reshape(-1, 3)
    points = camera_points @ frame.extrinsics[:3, :3].T + frame.extrinsics[:3, 3]

    heights_m = points[is_table, 2]
    assert len(heights_m) > 5000
    assert np.abs(heights_m).max() < 2e-3


@pytest.mark.usefixtures("renderer")
def test_the_gripper_is_an_instance() -> None:
    """The wrist camera sees the gripper, in the scene of any seed."""
    frame = render_clutter_frame(2, "wrist", (112, 112))

    assert GRIPPER_NAME in frame.names.values()


@pytest.mark.parametrize("size", [SIZE, (700, 525)], ids=["small", "larger than the buffer"])
def test_images_and_labeled_frames_show_the_same(renderer: Renderer, size: tuple[int, int]) -> None:
    world = World(sample_scene("put_on", 6))

    image, wrist_image = renderer.render_images(world, [("external", size), ("wrist", (60, 90))])

    np.testing.assert_array_equal(image, render_frame(world, "external", size).image)
    # The images are not empty, also not in their last rows.
    assert image[-100:].std() > 3
    assert wrist_image.shape == (90, 60, 3)
    assert wrist_image.std() > 5


@pytest.mark.usefixtures("renderer")
def test_an_unknown_camera_is_refused() -> None:
    world = World(sample_scene("put_on", 6))

    refuses("wrst", render_frame, world, "wrst", SIZE)


def test_threads_have_contexts_of_their_own(renderer: Renderer) -> None:
    """This thread renders, then two new threads one after the other, then this thread again."""

    def render() -> tuple[Renderer, bytes]:
        frame = render_clutter_frame(0, "external", (96, 72))
        return get_thread_renderer(), frame.image.tobytes()

    results = [render()]
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            results.append(thread.submit(render).result())
    results.append(render())

    renderers = [thread_renderer for thread_renderer, _ in results]
    assert len({image for _, image in results}) == 1  # all images are the same
    assert renderers[0] is renderer
    assert renderers[-1] is renderer
    assert len({id(thread_renderer) for thread_renderer in renderers}) == 3
