"""Loaded policies and VLMs: what they refuse, what they correct, and what actions depend on.

The tests load nano, the small policy that is shipped with the package. The fixture `nano` is a copy
of it that all tests share.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tiny import edit_json
from refusals import no_warning, refuses
from spear.data.normalize import Normalizer
from spear.errors import Notice, suppress_notices
from spear.evaluate.agents import load_agent
from spear.policy import Spear1Policy, VlmBundle, load_vlm, locate_checkpoint
from spear.train.tasks import encode_robot_batch
from spear.types import Action, Array
from spear.util.images import fit_image

# A plausible state: position (m), quaternion (w, x, y, z), and an open gripper.
STATE = np.array([0.45, 0, 0.2, 0, 1, 0, 0, 1], np.float32)
# A prefix [1, 8] of one action without motion that closes the gripper.
IDENTITY_ACTION = np.array([[0.0, 0, 0, 1, 0, 0, 0, 0]])


def make_observation(**changes: Any) -> dict[str, Any]:
    """A valid observation, with some entries replaced by `changes`.

    In `changes`, "image", "wrist" and "state" are short for the keys "observation/image",
    "observation/wrist_image" and "observation/state".
    """
    rng = np.random.default_rng(0)
    observation = {
        "observation/image": rng.integers(0, 256, (210, 280, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (112, 112, 3), dtype=np.uint8),
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
        "seed": 1,
    }
    full_keys = {
        "image": "observation/image",
        "wrist": "observation/wrist_image",
        "state": "observation/state",
    }
    for key, value in changes.items():
        observation[full_keys.get(key, key)] = value
    return observation


@pytest.fixture(scope="module")
def vlm() -> VlmBundle:
    return load_vlm()


# Observations that are refused


# Each case: the change to the observation, and the pattern of what the error names.
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"state": STATE[:7]}, "observation/state"),
        ({"state": STATE * [1, 1, 1, 1, 1.1, 1, 1, 1]}, r"observation/state\[3:7\]"),
        ({"state": STATE + 100}, r"observation/state\[0:3\]"),
        ({"state": STATE * [1, 1, 1, 1, 1, 1, 1, 100]}, r"observation/state\[7\]"),  # per cent
        ({"image": np.zeros((210, 280, 3))}, "observation/image"),
        ({"image": None}, "observation/image"),
        ({"wrist": np.zeros((3, 112, 112), np.uint8)}, "observation/wrist_image"),
        ({"observation/left_image": np.zeros((99, 99, 3), np.uint8)}, "observation/left_image"),
        ({"observation/wrist": np.zeros((99, 99, 3), np.uint8)}, "'observation/wrist'"),
        ({"observation/image_wrist": np.zeros((99, 99, 3), np.uint8)}, "'observation/image_wrist'"),
        ({"wrist_image": np.zeros((99, 99, 3), np.uint8)}, "'wrist_image'"),
        ({"comitted": IDENTITY_ACTION}, "'comitted'"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "put " * 200}, "prompt"),
        ({"seed": 0.5}, "seed"),
        ({"committed": np.zeros((1, 7))}, "committed"),
        ({"committed": np.full((1, 8), np.nan)}, "committed"),
        ({"committed": np.ones((1, 8))}, "committed"),
        ({"committed": np.array([[20.0, 0, 0, 1, 0, 0, 0, 0]])}, r"committed\[0:3\]"),  # mm
        ({"committed": np.array([[0.0, 0, 0, 1, 0, 0, 0, 50]])}, r"committed\[7\]"),  # per cent
        ({"committed": IDENTITY_ACTION}, "committed"),  # nano was not trained for it
    ],
)
def test_bad_observations_are_refused_by_key(
    nano: Spear1Policy, changes: dict[str, Any], key: str
) -> None:
    refuses(key, nano.infer, make_observation(**changes))


def test_no_observations_have_no_actions(nano: Spear1Policy) -> None:
    assert nano.infer_batch([]) == []


# Actions


# Columns of an action: 0 to 2 translation, 3 to 6 quaternion, 7 gripper opening.
@pytest.mark.parametrize(
    ("column", "value"), [(0, 99.0), (2, np.nan), (5, 3.0), (5, np.nan), (7, np.nan)]
)
def test_implausible_actions_are_refused(
    nano: Spear1Policy, column: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0])  # no motion
    action[column] = value
    chunk = Action.from_vector(action.expand(1, 5, 8))
    monkeypatch.setattr(nano, "predict", lambda inputs: chunk)

    refuses("must not move", nano.infer, make_observation())


@pytest.mark.parametrize(("bias", "opening"), [(9.0, 1), (-9.0, 0)])
def test_the_gripper_stays_in_its_range(
    nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch, bias: float, opening: int
) -> None:
    """A bias of the last layer drives the predicted opening far out of [0, 1]."""
    parameter = nano.model.action_out_proj.bias
    gripper_column = torch.eye(8)[7]
    monkeypatch.setattr(parameter, "data", parameter.data + bias * gripper_column)

    actions = nano.infer(make_observation())["actions"]

    assert (actions[:, 7] == opening).all()


def test_acting_reads_an_observation_as_training_reads_a_step(nano: Spear1Policy) -> None:
    # Position, a unit quaternion with different numbers, and the gripper opening.
    state = np.array([0.45, 0.1, 0.2, 0.8, 0.36, -0.48, 0, 0.25], np.float32)
    observation = make_observation(state=state)
    images = {}
    for view, key in (("external", "observation/image"), ("wrist", "observation/wrist_image")):
        width, height = nano.image_sizes[view]
        images[view] = fit_image(observation[key], height, width)[None]
    training_step = {  # a batch of one step, as the mixture draws it
        "images": images,
        "views": {},  # camera → [1] bool, whether the step has its image; not compared below
        "position": state[None, :3],
        "rotation": state[None, 3:7],
        "gripper": state[7:],
        "instruction": [observation["prompt"]],
        "action": np.zeros((1, 5, 8), np.float32),
        "action_mask": np.ones((1, 5), bool),
    }

    acting_inputs = nano.prepare_inputs([observation])

    training_inputs = encode_robot_batch(nano.processor, nano.normalizer, training_step)
    for name in ("state", "input_ids", "pixel_values"):
        torch.testing.assert_close(acting_inputs[name], training_inputs[name])


# The committed prefix


@pytest.fixture
def committing_nano(nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch) -> Spear1Policy:
    """The shipped policy, as if it were trained with prefixes of up to two actions."""
    monkeypatch.setattr(nano.model.config, "committed", 2)
    return nano


# A prefix of two actions; the second one rotates.
COMMITTED = np.array(
    [[0.01, -0.02, 0.03, 1, 0, 0, 0, 0], [0.0, 0.01, 0, 0.8, 0, -0.6, 0, 1]], np.float32
)


def infer_with_prefixes(policy: Spear1Policy, lengths: list[int]) -> list[Array]:
    """The chunks of one batch of equal observations, with prefixes of different lengths."""
    observations = [
        make_observation(committed=COMMITTED[:length]) if length else make_observation()
        for length in lengths
    ]
    return [result["actions"] for result in policy.infer_batch(observations)]


# The names `none`, `one` and `two` below are the chunks [H, 8] for prefixes of 0, 1 and 2 actions.


def test_a_chunk_begins_with_the_committed_prefix(committing_nano: Spear1Policy) -> None:
    _, two, one = infer_with_prefixes(committing_nano, [0, 2, 1])

    np.testing.assert_allclose(two[:2], COMMITTED, atol=1e-6)
    np.testing.assert_allclose(one[:1], COMMITTED[:1], atol=1e-6)


def test_the_actions_after_the_prefix_depend_on_it(committing_nano: Spear1Policy) -> None:
    none, two, one = infer_with_prefixes(committing_nano, [0, 2, 1])

    assert np.abs(one[1:] - two[1:]).max() > 1e-4
    assert np.abs(one[1:] - none[1:]).max() > 1e-4


def test_prefixes_of_others_in_the_batch_change_nothing(committing_nano: Spear1Policy) -> None:
    none, _, _ = infer_with_prefixes(committing_nano, [0, 2, 1])

    alone = committing_nano.infer(make_observation())["actions"]
    np.testing.assert_allclose(none, alone, atol=1e-5)


def test_a_prefix_longer_than_those_of_training_is_refused(committing_nano: Spear1Policy) -> None:
    three = np.concatenate([COMMITTED, COMMITTED[:1]])

    refuses("committed", committing_nano.infer, make_observation(committed=three))


# Flow steps


def test_the_number_of_flow_steps_is_the_models_own_by_default(nano: Spear1Policy) -> None:
    inputs = nano.prepare_inputs([make_observation()])

    assert nano.steps == nano.model.flow_config.steps == 5
    sampled_actions = nano.model.sample_actions(**inputs)
    assert torch.equal(nano.predict(inputs).to_vector(), sampled_actions.to_vector())


def test_another_number_of_flow_steps_may_be_given(nano: Spear1Policy) -> None:
    inputs = nano.prepare_inputs([make_observation()])

    two_steps = Spear1Policy.load("nano", steps=2).predict(inputs)

    expected = nano.model.sample_actions(**inputs, steps=2)
    assert torch.equal(two_steps.to_vector(), expected.to_vector())


def test_results_of_other_numbers_of_flow_steps_do_not_mix() -> None:
    weights = load_agent("nano").weights

    # `weights` is the identity under which results are stored. 5 is nano's own number of steps.
    assert load_agent("nano", flow_steps=2).weights != weights
    assert load_agent("nano", flow_steps=5).weights == weights


def test_no_flow_steps_are_refused() -> None:
    refuses(
        "0 are no integration steps", Spear1Policy.load("nano", steps=0).infer, make_observation()
    )


@pytest.mark.parametrize("name", ["expert", "nothing", "ws://127.0.0.1:9"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "cpu"),
        ("dtype", "bfloat16"),
        ("quantize", "int8"),
        ("norm_stats", "fast"),
        ("flow_steps", 2),
    ],
)
def test_options_of_loaded_policies_are_refused_for_others(
    name: str, option: str, value: Any
) -> None:
    message = f"--{option.replace('_', '-')} {value}"

    refuses(message, load_agent, name, **{option: value})


# Normalization statistics


@pytest.fixture
def folder_with_two_datasets(tmp_path: Path) -> tuple[Path, Normalizer]:
    """The folder of a policy with statistics per dataset, and the statistics of "fast".

    The training datasets are "slow" and "fast". They differ in the scale of translations.
    """
    folder = Path(shutil.copytree(locate_checkpoint("nano"), tmp_path / "each"))
    slow = Normalizer.load(folder / "normalizer.json")
    fast = dataclasses.replace(slow, translation_scale=(1.0, 1.0, 1.0))
    combined = dataclasses.replace(slow, datasets={"slow": slow, "fast": fast})
    combined.save(folder / "normalizer.json")
    return folder, fast


def test_the_dataset_of_the_statistics_must_be_named(
    folder_with_two_datasets: tuple[Path, Normalizer],
) -> None:
    folder, _ = folder_with_two_datasets

    refuses(r"slow, fast", load_agent, str(folder))
    refuses("fst", load_agent, str(folder), norm_stats="fst")


@pytest.mark.filterwarnings("ignore:.*normalizer.json in .* was not saved")
def test_a_policy_has_the_statistics_of_the_named_dataset(
    folder_with_two_datasets: tuple[Path, Normalizer],
) -> None:
    folder, fast = folder_with_two_datasets

    assert Spear1Policy.load(folder, dataset="fast").normalizer == fast


@pytest.mark.filterwarnings("ignore:.*normalizer.json in .* was not saved")
def test_results_of_other_statistics_do_not_mix(
    folder_with_two_datasets: tuple[Path, Normalizer],
) -> None:
    folder, _ = folder_with_two_datasets

    slow = load_agent(str(folder), norm_stats="slow")
    fast = load_agent(str(folder), norm_stats="fast")

    assert slow.weights != fast.weights


def test_a_policy_with_a_changed_file_is_loaded_with_a_notice(
    folder_with_two_datasets: tuple[Path, Normalizer],
) -> None:
    folder, _ = folder_with_two_datasets

    with pytest.warns(Notice, match=r"normalizer.json in .* was not saved"):
        Spear1Policy.load(folder, dataset="fast")


def test_a_dataset_is_refused_where_all_have_the_same_statistics() -> None:
    refuses("--norm-stats fast", Spear1Policy.load, "nano", dataset="fast")


# What is corrected


def test_case_and_full_stop_of_the_instruction_change_nothing(nano: Spear1Policy) -> None:
    """The instruction differs from the default one only in the capital letter and the full stop."""
    typed = nano.infer(make_observation(prompt="Put the carrot on the plate."))["actions"]

    np.testing.assert_array_equal(typed, nano.infer(make_observation())["actions"])


def test_long_instructions_may_be_truncated_as_in_training(nano: Spear1Policy) -> None:
    policy = dataclasses.replace(nano, truncate_instructions=True)

    with pytest.warns(Notice, match="cut off"):
        policy.infer(make_observation(prompt="put " * 200))


def test_a_missing_wrist_camera_is_reported_once() -> None:
    policy = Spear1Policy.load()
    without_wrist = make_observation(wrist=None)

    # A suppressed notice does not count as reported.
    with no_warning(), suppress_notices():
        policy.infer(without_wrist)
    with pytest.warns(Notice, match="observation/wrist_image"):
        policy.infer(without_wrist)
    with no_warning():
        policy.infer(without_wrist)


@pytest.mark.filterwarnings("ignore:observations without")
def test_a_missing_wrist_camera_matters_to_no_other_observation_of_the_batch(
    nano: Spear1Policy,
) -> None:
    observations = [
        make_observation(wrist=None),
        make_observation(prompt="open the drawer, please", seed=2),
    ]

    together = [result["actions"] for result in nano.infer_batch(observations)]

    separate = [nano.infer(observation)["actions"] for observation in observations]
    np.testing.assert_allclose(together, separate, atol=1e-5)
    with_wrist = nano.infer(make_observation())["actions"]
    assert not np.allclose(together[0], with_wrist)


def test_another_aspect_is_reported_once(nano: Spear1Policy) -> None:
    tall = make_observation(image=np.zeros((300, 200, 3), np.uint8))

    # A suppressed notice does not count as reported. An image of 2:3 covers 4/9 of an input of 3:2,
    # so black bars cover 56%.
    with no_warning(), suppress_notices():
        nano.infer(tall)
    with pytest.warns(Notice, match=r"'external' of 200×300 are fitted into 192×128 .*56%"):
        nano.infer(tall)
    with no_warning():
        nano.infer(tall)


# Answers


def test_no_prompts_have_no_answers(vlm: VlmBundle) -> None:
    assert vlm.answer([], []) == []


def test_prompts_and_images_must_be_equally_many(vlm: VlmBundle) -> None:
    image = make_observation()["observation/image"]

    refuses("1 images, 2 prompts", vlm.answer, [image], ["how far?", "where?"])


def test_an_answer_of_no_tokens_is_refused(vlm: VlmBundle) -> None:
    image = make_observation()["observation/image"]

    refuses("max_new_tokens is 0", vlm.answer, [image], ["how far?"], max_new_tokens=0)


def test_an_unknown_question_type_is_refused(vlm: VlmBundle) -> None:
    image = make_observation()["observation/image"]
    suggestion = "'distence'. Did you mean 'distance'"

    refuses(suggestion, vlm.answer, [image], ["How far is the mug?"], "distence")


# Models that are refused


def copy_nano(
    folder: Path, change: Callable[[dict[str, Any]], Any], file: str = "config.json"
) -> Path:
    """Copy the nano policy to `folder`, and apply `change` to the content of its JSON `file`."""
    edit_json(Path(shutil.copytree(locate_checkpoint("nano"), folder)) / file, change)
    return folder


@pytest.mark.parametrize("name", ["nanno", "nowhere/at/all"])
def test_unknown_models_are_refused(name: str) -> None:
    refuses(name, load_vlm, name)


def test_an_unknown_dtype_is_refused() -> None:
    refuses("dtype 'fp16'", load_vlm, dtype="fp16")


@pytest.mark.filterwarnings("ignore:.*config.json in .* was not saved")
def test_3d_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """The model has 2,786 tokens, and the 1,024 3D tokens should begin at another index."""
    folder = copy_nano(
        tmp_path / "start", lambda config: config["vlm_config"].update(coordinate_start=1000)
    )

    refuses(r"3D tokens of the tokenizer .* 1000 … 2023 of 2786", Spear1Policy.load, folder)


@pytest.mark.filterwarnings("ignore:.*config.json in .* was not saved")
def test_other_views_than_those_of_the_processor_are_refused(tmp_path: Path) -> None:
    folder = copy_nano(
        tmp_path / "views", lambda config: config["vlm_config"].update(views=["external"])
    )

    refuses(r"processor in .* has the view .*wrist", load_vlm, folder)


def test_a_vlm_is_refused_as_a_policy(tmp_path: Path) -> None:
    load_vlm("nano").model.save_pretrained(tmp_path / "vlm")

    refuses("SPEAR-VLM", Spear1Policy.load, tmp_path / "vlm")
