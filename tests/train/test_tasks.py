"""What the stages learn: what each patch shows, what each question is about, how losses add up."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from labels_boxes import make_labeled_image
from spear.labels.fit.masks import decode_mask, encode_mask
from spear.models.processing import Processor
from spear.policy import locate
from spear.train.options import QuestionMix
from spear.train.recipes import get_recipe
from spear.train.tasks import QuestionSamples, VlaTask, patch_targets
from spear.types import Action, LabeledImage, LabeledObject
from spear.util.images import encode_jpeg
from train_tiny import PolicyTask

SIZE = (64, 64)  # width and height in pixels
PATCH = 32  # pixels


def make_label() -> LabeledImage:
    """Label a cup of 20 × 20 pixels across two patches, and a small spoon in the last patch."""
    objects = []
    for name, (x0, y0, x1, y1) in {"cup": (20, 4, 40, 24), "spoon": (50, 50, 58, 54)}.items():
        mask = np.zeros((64, 64), bool)
        mask[y0:y1, x0:x1] = True
        box = np.array([x0, y0, x1, y1], np.float32)
        objects.append(LabeledObject(name, box, encode_mask(mask), None, {}))
    image = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    return LabeledImage(image, 64, 64, np.eye(3), objects, "metre", "test")


def test_targets_say_which_objects_a_patch_shows() -> None:
    targets = patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH, SIZE)

    np.testing.assert_array_equal(targets.is_shown[:, 0], [True, True, False, False])
    assert not targets.is_shown[:, 1].any()
    np.testing.assert_array_equal(targets.is_shown[:, 2], [False, False, False, True])


def test_targets_say_how_much_of_each_cell_an_object_covers() -> None:
    targets = patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH, SIZE)

    cells = targets.cells.reshape(4, 4, 4, 3)
    # Cells are 8 pixels wide. In patch 0 (columns from 0, 8, 16, 24), the cup covers the right half
    # of the third cell.
    np.testing.assert_array_equal(cells[0, :2, :, 0], [[0, 0, 64, 128], [0, 0, 128, 255]])
    np.testing.assert_array_equal(cells[3, 2:, 2:, 2], [[96, 32], [0, 0]])


def test_targets_say_where_the_center_of_the_largest_object_is() -> None:
    targets = patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH, SIZE)

    np.testing.assert_array_equal(targets.largest, [True, True, False, True])
    # The cup's center is pixel (30, 14); the middles of patches 0 and 1 are (16, 16), (48, 16).
    offsets_px = np.array([[14, -2], [-18, -2], [6, 4]])
    np.testing.assert_allclose(targets.center[[0, 1, 3]], offsets_px / PATCH)


def test_an_image_of_another_size_is_fitted_with_its_masks() -> None:
    """Three times as large, without what becomes bars above and below, it has the same targets."""
    label = make_label()
    bar = 16  # pixels
    large_objects = []
    cut_objects = []
    inside = np.zeros((64, 64), bool)
    inside[bar : 64 - bar] = True
    for item in label.objects:
        mask = decode_mask(item.mask_runs, 64, 64)
        large_mask = np.kron(mask[bar : 64 - bar], np.ones((3, 3), bool))
        large_box = (np.asarray(item.box2d) - [0, bar, 0, bar]) * 3
        large_objects.append(
            dataclasses.replace(
                item, mask_runs=encode_mask(large_mask), box2d=large_box.astype(np.float32)
            )
        )
        cut_objects.append(dataclasses.replace(item, mask_runs=encode_mask(mask & inside)))
    large = dataclasses.replace(label, width=192, height=3 * (64 - 2 * bar), objects=large_objects)
    cut = dataclasses.replace(label, objects=cut_objects)

    targets = patch_targets(large, ["cup", "spoon"], PATCH, SIZE)

    expected = patch_targets(cut, ["cup", "spoon"], PATCH, SIZE)
    np.testing.assert_array_equal(targets.is_shown, expected.is_shown)
    # Edges are antialiased.
    np.testing.assert_allclose(targets.cells, expected.cells.astype(int), atol=40)
    np.testing.assert_allclose(targets.center, expected.center, atol=1e-6)
    np.testing.assert_array_equal(targets.largest, expected.largest)


def make_numbered_label(number: int) -> LabeledImage:
    """Label an image that shows its number as redness, and its one object as a green square."""
    label = make_labeled_image(number, scale=0.3 + 0.06 * number)
    item = label.objects[number % 3]
    pixels = np.full((105, 140, 3), (20 * number, 0, 0), np.uint8)
    x, y = ((item.box2d[:2] + item.box2d[2:]) / 2).astype(int)
    pixels[y - 3 : y + 3, x - 3 : x + 3, 1] = 255
    return dataclasses.replace(label, image=encode_jpeg(pixels), objects=[item])


EXTERNAL_LABELS = [make_numbered_label(number) for number in range(6)]
WRIST_LABELS = [make_numbered_label(number) for number in range(6, 12)]
MIX = QuestionMix(("distance", "centre_2d"), pairs=(2, 2), wrist=0.25)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(locate("nano"))


def check_answer(answer: Any, image: torch.Tensor, item: Any, processor: Processor) -> None:
    """A distance must be the object's, and a place must be on its green square."""
    if isinstance(answer, float):
        distance = float(np.linalg.norm(item.box3d.center))
        assert processor.coordinates.encode(answer) == processor.coordinates.encode(distance)
        return
    height, width = image.shape[1:]
    green = image[1, int(answer.y * height), int(answer.x * width)]
    assert green > 150


def test_a_question_is_about_its_own_image_and_its_places_are_where_the_model_sees_them(
    processor: Processor,
) -> None:
    labels = {"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS}
    samples = QuestionSamples(labels, processor, MIX, 3, seed=0)
    items = {}
    for label in EXTERNAL_LABELS + WRIST_LABELS:
        (items[label.source],) = label.objects

    views = []
    for step in range(40):
        batch = samples.batch(step)
        ((view, pixels),) = batch["pixel_values"].items()
        views.append(view)
        images = pixels[batch["image_index"]].int()
        for image, tokens in zip(images, batch["labels"], strict=True):
            number = round(float(image[0].max()) / 20)
            (answer,) = processor.decode_answer(tokens[tokens >= 0].tolist())
            check_answer(answer, image, items[f"test/{number}"], processor)

    num_wrist = views.count("wrist")
    assert 3 <= num_wrist <= 17  # a quarter of 40, ± 2.5 standard deviations


@pytest.mark.parametrize(
    ("labels", "wrist", "fraction"),
    [
        ({"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS[:2]}, None, 0.25),
        ({"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS[:2]}, 0.0, 0.0),
        ({"external": WRIST_LABELS[:2]}, 0.5, 0.0),
    ],
)
def test_the_fraction_of_wrist_batches_is_the_recipes_or_that_of_the_images(
    labels: Any, wrist: float | None, fraction: float, processor: Processor
) -> None:
    mix = dataclasses.replace(MIX, wrist=wrist)

    assert QuestionSamples(labels, processor, mix, 3, seed=0).wrist_fraction == fraction


def test_the_loss_of_questions_is_added_with_its_weight() -> None:
    policy_task = PolicyTask()
    model = policy_task.model
    recipe = get_recipe("nano-vla").with_changes(question_weight=0.25, flow_samples=2)
    unused: Any = None
    task = VlaTask(model, unused, unused, unused, recipe, questions=object())  # type: ignore[arg-type]
    batch = policy_task.batch(0)
    batch["action_mask"][1, 1:] = False

    total, loss_parts = task.loss(dict(batch), torch.Generator().manual_seed(1))

    question_loss = model.vlm(**batch.pop("questions")).loss
    batch["actions"] = Action.from_vector(batch["actions"])
    policy = model(**batch, flow_samples=2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(total, policy.loss + 0.25 * question_loss)
    assert loss_parts.keys() == {*policy.parts, "question_text", "question_coordinates"}
