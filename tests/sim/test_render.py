"""Rendering contexts: what becomes of one is nothing to the others."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from spear.sim import Renderer
from spear.sim.scene import clutter_scene
from spear.sim.world import World


def _shot(renderer: Renderer, world: World) -> NDArray[np.uint8]:
    return renderer.images(world, [("external", (96, 72))])[0]


def _drop(renderers: list[Renderer]) -> None:
    del renderers[-1]
    gc.collect()


def _drop_in_a_thread(renderers: list[Renderer]) -> None:
    thread = threading.Thread(target=_drop, args=[renderers])
    thread.start()
    thread.join()


def _close(renderers: list[Renderer]) -> None:
    last = renderers.pop()
    last.close()
    last.close()


@pytest.mark.parametrize("end", [_drop, _drop_in_a_thread, _close])
@pytest.mark.parametrize("used_last", [0, 1])
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
