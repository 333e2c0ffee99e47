"""What the stages learn: what each patch shows, which image each question is about, how losses add up."""

import dataclasses

import numpy as np
import torch

from labels_boxes import labelled
from spear.labels.fit.masks import decode_mask, encode_mask
from spear.models.processing import Processor
from spear.policy import locate
from spear.train.options import QuestionMix
from spear.train.recipes import get_recipe
from spear.train.tasks import QuestionSamples, VlaTask, patch_targets
from spear.types import Action, LabeledImage, LabeledObject
from spear.util.images import encode_jpeg
from train_tiny import Acting


def a_label() -> LabeledImage:
    """64 × 64: a cup of 20 × 20 pixels across two patches of 32, and a small spoon inside the last patch."""
    objects = []
    for name, (x0, y0, x1, y1) in {"cup": (20, 4, 40, 24), "spoon": (50, 50, 58, 54)}.items():
        mask = np.zeros((64, 64), bool)
        mask[y0:y1, x0:x1] = True
        box = np.array([x0, y0, x1, y1], np.float32)
        objects.append(LabeledObject(name, box, encode_mask(mask), None, {}))
    image = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    return LabeledImage(image, 64, 64, np.eye(3), objects, "metre", "test")


def test_targets_say_what_is_where() -> None:
    _, shown, cells, centre, largest = patch_targets(
        a_label(), ["cup", "fork", "spoon"], 32, (64, 64)
    )
    np.testing.assert_array_equal(shown[:, 0], [True, True, False, False])
    assert not shown[:, 1].any()
    np.testing.assert_array_equal(shown[:, 2], [False, False, False, True])
    np.testing.assert_array_equal(largest, [True, True, False, True])
    # cells are 8 pixels wide: of patch 0 (columns 0, 8, 16, 24) the cup covers the third one's right half
    np.testing.assert_array_equal(
        cells[0].reshape(4, 4, 3)[..., 0][:2], [[0, 0, 64, 128], [0, 0, 128, 255]]
    )
    np.testing.assert_array_equal(cells[3].reshape(4, 4, 3)[2:, 2:, 2], [[96, 32], [0, 0]])
    # the cup's centre is pixel (30, 14): seen from the middle of patch 0 (16, 16) and of patch 1 (48, 16)
    np.testing.assert_allclose(centre[[0, 1, 3]], np.array([[14, -2], [-18, -2], [6, 4]]) / 32)


def test_an_image_of_another_size_is_fitted_with_its_masks() -> None:
    """Three times as large, and with what becomes bars above and below cut off: the same targets."""
    small, bar, objects = a_label(), 16, []
    for o in small.objects:
        mask = np.kron(decode_mask(o.mask, 64, 64)[bar : 64 - bar], np.ones((3, 3), bool))
        box = (np.asarray(o.box2d) - [0, bar, 0, bar]) * 3
        objects.append(dataclasses.replace(o, mask=encode_mask(mask), box2d=box.astype(np.float32)))
    large = dataclasses.replace(small, width=192, height=3 * (64 - 2 * bar), objects=objects)
    cut = np.zeros((64, 64), bool)
    cut[bar : 64 - bar] = True
    masks = [encode_mask(decode_mask(o.mask, 64, 64) & cut) for o in small.objects]
    kept = [dataclasses.replace(o, mask=m) for o, m in zip(small.objects, masks, strict=True)]
    expected = patch_targets(
        dataclasses.replace(small, objects=kept), ["cup", "spoon"], 32, (64, 64)
    )
    _, shown, cells, centre, largest = patch_targets(large, ["cup", "spoon"], 32, (64, 64))
    np.testing.assert_array_equal(shown, expected[1])
    np.testing.assert_allclose(cells, expected[2].astype(int), atol=40)  # edges are antialiased
    np.testing.assert_allclose(centre, expected[3], atol=1e-6)
    np.testing.assert_array_equal(largest, expected[4])


def pictured(number: int) -> LabeledImage:
    """A label whose image shows its number as redness and its one object as a green square."""
    label = labelled(number, scale=0.3 + 0.06 * number)
    o = label.objects[number % 3]
    pixels = np.full((105, 140, 3), (20 * number, 0, 0), np.uint8)
    x, y = ((o.box2d[:2] + o.box2d[2:]) / 2).astype(int)
    pixels[y - 3 : y + 3, x - 3 : x + 3, 1] = 255
    return dataclasses.replace(label, image=encode_jpeg(pixels), objects=[o])


def test_a_question_is_about_its_own_image_and_its_places_are_where_the_model_sees_them() -> None:
    labels = {
        "external": [pictured(n) for n in range(6)],
        "wrist": [pictured(n) for n in range(6, 12)],
    }
    processor = Processor.load(locate("nano"))
    mix = QuestionMix(("distance", "centre_2d"), pairs=(2, 2), wrist=0.25)
    samples, views = QuestionSamples(labels, processor, mix, 3, seed=0), []
    for step in range(40):
        batch = samples.batch(step)
        ((view, pixels),) = batch["pixel_values"].items()
        views.append(view)
        for image, said in zip(pixels[batch["image_index"]].int(), batch["labels"], strict=True):
            number = round(float(image[0].max()) / 20)
            (o,) = (label.objects[0] for label in labels[view] if label.source == f"test/{number}")
            (answer,) = processor.decode_answer(said[said >= 0].tolist())
            if isinstance(answer, float):
                true = float(np.linalg.norm(o.box3d.center))
                assert processor.coordinates.encode(answer) == processor.coordinates.encode(true)
            else:
                height, width = image.shape[1:]
                assert image[1, int(answer.y * height), int(answer.x * width)] > 150
    assert 3 <= views.count("wrist") <= 17  # a quarter of 40: 2.5 standard deviations
    fewer = {**labels, "wrist": labels["wrist"][:2]}
    cases = (fewer, None, 0.25), (fewer, 0.0, 0.0), ({"external": fewer["wrist"]}, 0.5, 0.0)
    for given, fraction, drawn in cases:
        mix = dataclasses.replace(mix, wrist=fraction)
        assert QuestionSamples(given, processor, mix, 3, seed=0).wrist == drawn


def test_questions_beside_the_actions_count_by_their_weight() -> None:
    acting, nothing = Acting(), None
    stage = get_recipe("nano-vla").with_changes(question_weight=0.25, flow_samples=2)
    task = VlaTask(acting.model, *[nothing] * 3, stage, object())  # type: ignore[arg-type]
    batch = acting.batch(0)
    batch["action_mask"][1, 1:] = False
    total, parts = task.loss(dict(batch), torch.Generator().manual_seed(1))
    asked = batch.pop("questions")
    batch["actions"] = Action.from_vector(batch["actions"])
    acted = acting.model(**batch, flow_samples=2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(total, acted.loss + 0.25 * acting.model.vlm(**asked).loss)
    assert parts.keys() == {*acted.parts, "question_text", "question_coordinates"}
