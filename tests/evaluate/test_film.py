"""Films: what browsers play, of the right size and length, with the outcome on them."""

from __future__ import annotations

import io

import av
import numpy as np

from spear.evaluate import film as video


def test_a_film_decodes_to_its_frames_and_holds_the_last() -> None:
    shots = [
        video.compose(np.full((210, 280, 3), 12 * i, np.uint8), np.full((9, 9, 3), 200, np.uint8), "go")
        for i in range(8)
    ]
    data, mime = video.encode(shots, rate_hz=5)
    assert mime in ("video/mp4", "video/webm")
    with av.open(io.BytesIO(data)) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(decoded) == 8 + 5
    assert decoded[0].shape == shots[0].shape
    for got, sent in zip(decoded, shots, strict=False):
        assert np.abs(got.astype(int) - sent).mean() < 4


def test_a_frame_keeps_aspect_has_even_sides_and_says_the_outcome_in_green_or_red() -> None:
    odd = video.compose(np.zeros((111, 115, 3), np.uint8), np.zeros((50, 49, 3), np.uint8), "x" * 300)
    assert odd.shape[0] % 2 == odd.shape[1] % 2 == 0
    for outcome, shown in ((True, [video.GREEN]), (False, [video.RED]), (None, [])):
        frame = video.compose(np.zeros((210, 280, 3), np.uint8), None, "put it", outcome)
        assert frame.shape == (video.HEIGHT + video.BAR, 560, 3)
        bar = frame[: video.BAR]
        assert [c for c in (video.GREEN, video.RED) if (bar == np.array(c)).all(-1).any()] == shown
