import numpy as np

from spear.labels.fit.image import iou2d, suppress, tight_box


def test_iou_of_boxes() -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [4, 4, 8, 8], [1, 1, 1, 1]])
    np.testing.assert_allclose(iou2d(boxes[0], boxes), [1, 1 / 3, 0, 0])
    assert iou2d(boxes[3], boxes[3]) == 0


def test_tight_box_holds_every_pixel() -> None:
    mask = np.zeros((5, 7), bool)
    assert tight_box(mask).tolist() == [0, 0, 0, 0]
    mask[1, 2] = mask[3, 5] = True
    assert tight_box(mask).tolist() == [2, 1, 6, 4]


def test_suppression_keeps_the_best_of_a_heap() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 0, 12, 10], [0, 0, 10, 10]])
    scores = np.array([0.5, 0.9, 0.1, 0.4, 0.5])
    # IoU of neighbours one pixel apart: 9/11; two pixels: 8/12
    assert suppress(boxes, scores, 0.7).tolist() == [1, 2]
    assert suppress(boxes, scores, 0.9).tolist() == [1, 0, 3, 2]
    assert suppress(boxes[:0], scores[:0], 0.5).tolist() == []
