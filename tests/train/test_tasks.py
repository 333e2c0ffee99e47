"""The training tasks: what each patch shows, what each question is about, how losses add up.

Patch targets are tested on an image of 64 × 64 pixels with 2 × 2 patches of 32 × 32 pixels. Patches
are numbered row by row, from 0 to 3. A patch has 4 × 4 cells of 8 × 8 pixels.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from labels_boxes import HEIGHT_PX, WIDTH_PX, make_labeled_image
from spear.labels.fit.masks import decode_mask, encode_mask
from spear.models.processing import Processor
from spear.policy import locate_checkpoint
from spear.train.options import QuestionMix
from spear.train.recipes import get_recipe
from spear.train.tasks import QuestionSamples, VlaTask, compute_patch_targets
from spear.types import Action, LabeledImage, LabeledObject
from spear.util.images import encode_jpeg
from train_tiny import PolicyTask

SIZE = (64, 64)  # width and height in pixels
PATCH_PX = 32  # side of a patch


def make_label() -> LabeledImage:
    """Label a cup of 20 × 20 pixels in patches 0 and 1, and a spoon of 8 × 4 pixels in patch 3."""
    objects = []
    for name, (x0, y0, x1, y1) in {"cup": (20, 4, 40, 24), "spoon": (50, 50, 58, 54)}.items():
        mask = np.zeros((64, 64), bool)
        mask[y0:y1, x0:x1] = True
        box = np.array([x0, y0, x1, y1], np.float32)
        objects.append(LabeledObject(name, box, encode_mask(mask), None, {}))
    image = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    return LabeledImage(
        image,
        width=64,
        height=64,
        intrinsics=np.eye(3),
        objects=objects,
        unit="metre",
        source="test",
    )


def test_targets_say_which_objects_a_patch_shows() -> None:
    targets = compute_patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH_PX, SIZE)

    np.testing.assert_array_equal(targets.is_shown[:, 0], [True, True, False, False])
    assert not targets.is_shown[:, 1].any()
    np.testing.assert_array_equal(targets.is_shown[:, 2], [False, False, False, True])


def test_targets_say_how_much_of_each_cell_an_object_covers() -> None:
    targets = compute_patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH_PX, SIZE)

    # [patches, rows, columns, names], 255 is all of a cell.
    cells = targets.cell_coverage.reshape(4, 4, 4, 3)
    # Patch 0's cells begin at pixels 0, 8, 16 and 24. The cup covers pixels from column 20 and row
    # 4 on: half of the third column of cells, and half of the first row.
    np.testing.assert_array_equal(cells[0, :2, :, 0], [[0, 0, 64, 128], [0, 0, 128, 255]])
    # In patch 3 the spoon covers 6 × 4 pixels of one cell and 2 × 4 of the next.
    np.testing.assert_array_equal(cells[3, 2:, 2:, 2], [[96, 32], [0, 0]])


def test_targets_of_a_wide_size_are_between_its_bars() -> None:
    """Fitted into 128 × 64 pixels, the square image lies in the middle two columns of patches."""
    targets = compute_patch_targets(make_label(), ["cup"], PATCH_PX, size=(128, 64))

    is_cup_shown = targets.is_shown[:, 0].reshape(2, 4)  # rows and columns of patches
    np.testing.assert_array_equal(is_cup_shown[0], [False, True, True, False])
    assert not is_cup_shown[1].any()


def test_targets_say_where_the_center_of_the_largest_object_is() -> None:
    targets = compute_patch_targets(make_label(), ["cup", "fork", "spoon"], PATCH_PX, SIZE)

    np.testing.assert_array_equal(targets.has_object, [True, True, False, True])
    # The cup's center is pixel (30, 14), and the middles of patches 0 and 1 are (16, 16) and
    # (48, 16). The spoon's center is (54, 52), and the middle of patch 3 is (48, 48).
    offsets_px = np.array([[14, -2], [-18, -2], [6, 4]])
    np.testing.assert_allclose(targets.center[[0, 1, 3]], offsets_px / PATCH_PX)


def test_an_image_of_another_size_is_fitted_with_its_masks() -> None:
    """A larger, wider image has the targets of the image that it becomes when it is fitted.

    The image has the rows 16 … 47 of the labeled one, three times as large: 192 × 96 pixels. Fitted
    to 64 × 64 pixels it has black bars of 16 pixels above and below. So its targets are those of
    the labeled image with masks cut to the rows between the bars.
    """
    label = make_label()
    bar_px = 16
    large_objects = []
    cut_objects = []
    is_between_bars = np.zeros((64, 64), bool)
    is_between_bars[bar_px : 64 - bar_px] = True
    for item in label.objects:
        mask = decode_mask(item.mask_runs, 64, 64)
        shown_mask = mask[bar_px : 64 - bar_px]
        large_mask = np.kron(shown_mask, np.ones((3, 3), bool))  # each pixel 3 × 3 times
        large_box = (np.asarray(item.box2d) - [0, bar_px, 0, bar_px]) * 3
        large_objects.append(
            dataclasses.replace(
                item, mask_runs=encode_mask(large_mask), box2d=large_box.astype(np.float32)
            )
        )
        cut_mask = mask & is_between_bars
        cut_objects.append(dataclasses.replace(item, mask_runs=encode_mask(cut_mask)))
    large_height = 3 * (64 - 2 * bar_px)
    large = dataclasses.replace(label, width=192, height=large_height, objects=large_objects)
    cut = dataclasses.replace(label, objects=cut_objects)

    targets = compute_patch_targets(large, ["cup", "spoon"], PATCH_PX, SIZE)

    expected = compute_patch_targets(cut, ["cup", "spoon"], PATCH_PX, SIZE)
    np.testing.assert_array_equal(targets.is_shown, expected.is_shown)
    # Fitting blurs the edges of masks, so cells differ by up to 40 of 255.
    np.testing.assert_allclose(targets.cell_coverage, expected.cell_coverage.astype(int), atol=40)
    np.testing.assert_allclose(targets.center, expected.center, atol=1e-6)
    np.testing.assert_array_equal(targets.has_object, expected.has_object)


def make_numbered_label(number: int) -> LabeledImage:
    """Label an image from which a test can tell what a question has to be about.

    The red of all pixels is 20 times the image's number, and its one object has a green square in
    the middle of its 2D box. Each image has another scale, so that the distances differ.
    """
    label = make_labeled_image(number, scale=0.3 + 0.06 * number)
    item = label.objects[number % 3]
    pixels = np.full((HEIGHT_PX, WIDTH_PX, 3), (20 * number, 0, 0), np.uint8)
    top_left = item.box2d[:2]
    bottom_right = item.box2d[2:]
    x, y = ((top_left + bottom_right) / 2).astype(int)
    pixels[y - 3 : y + 3, x - 3 : x + 3, 1] = 255
    return dataclasses.replace(label, image=encode_jpeg(pixels), objects=[item])


EXTERNAL_LABELS = [make_numbered_label(number) for number in range(6)]
WRIST_LABELS = [make_numbered_label(number) for number in range(6, 12)]
MIX = QuestionMix(("distance", "centre_2d"), pairs=(2, 2), wrist=0.25)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(locate_checkpoint("nano"))


def check_answer(answer: Any, image: torch.Tensor, item: Any, processor: Processor) -> None:
    """Check that a number is the object's distance, or that a location is on its green square."""
    if isinstance(answer, float):
        distance = float(np.linalg.norm(item.box3d.center))
        assert processor.coordinates.encode(answer) == processor.coordinates.encode(distance)
        return
    height, width = image.shape[1:]
    green = image[1, int(answer.y * height), int(answer.x * width)]
    assert green > 150  # 255, blurred by JPEG and by scaling


def test_a_question_is_about_its_own_image_and_its_places_are_where_the_model_sees_them(
    processor: Processor,
) -> None:
    labels = {"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS}
    samples = QuestionSamples(labels, processor, MIX, num_images=3, seed=0)
    items = {}
    for label in EXTERNAL_LABELS + WRIST_LABELS:
        (items[label.source],) = label.objects

    views = []
    for step in range(40):
        batch = samples.batch(step)
        ((view, pixels),) = batch["pixel_values"].items()
        views.append(view)
        images = pixels[batch["image_index"]].int()  # the image of each question
        for image, tokens in zip(images, batch["labels"], strict=True):
            number = round(float(image[0].max()) / 20)
            answer_tokens = tokens[tokens >= 0]  # other tokens have the label -100
            (answer,) = processor.decode_answer(answer_tokens.tolist())
            check_answer(answer, image, items[f"test/{number}"], processor)

    num_wrist = views.count("wrist")
    # A quarter of 40 batches are of the wrist, ± 2.5 standard deviations of √(40 · ¼ · ¾) = 2.7.
    assert 3 <= num_wrist <= 17


# Labels, the recipe's fraction of wrist batches, and the fraction that results.
@pytest.mark.parametrize(
    ("labels", "wrist", "fraction"),
    [
        # 2 of 8 images are of the wrist.
        ({"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS[:2]}, None, 0.25),
        ({"external": EXTERNAL_LABELS, "wrist": WRIST_LABELS[:2]}, 0.0, 0.0),
        # There are no wrist images.
        ({"external": WRIST_LABELS[:2]}, 0.5, 0.0),
    ],
)
def test_the_fraction_of_wrist_batches_is_the_recipes_or_that_of_the_images(
    labels: Any, wrist: float | None, fraction: float, processor: Processor
) -> None:
    mix = dataclasses.replace(MIX, wrist=wrist)

    samples = QuestionSamples(labels, processor, mix, num_images=3, seed=0)

    assert samples.wrist_batch_fraction == fraction


def test_the_loss_of_questions_is_added_with_its_weight() -> None:
    policy_task = PolicyTask()
    model = policy_task.model
    recipe = get_recipe("nano-vla").with_changes(question_weight=0.25, flow_samples=2)
    # The loss reads neither the processor nor the data, and only checks that there are questions.
    unused: Any = None
    has_questions: Any = object()
    task = VlaTask(
        model,
        processor=unused,
        normalizer=unused,
        samples=unused,
        recipe=recipe,
        questions=has_questions,
    )
    batch = policy_task.batch(0)
    batch["action_mask"][1, 1:] = False  # of the second row only the first action counts

    total, loss_parts = task.loss(dict(batch), torch.Generator().manual_seed(1))

    question_loss = model.vlm(**batch.pop("questions")).loss
    batch["actions"] = Action.from_vector(batch["actions"])
    policy = model(**batch, flow_samples=2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(total, policy.loss + 0.25 * question_loss)
    assert loss_parts.keys() == {*policy.parts, "question_text", "question_coordinates"}
