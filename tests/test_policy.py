"""Observations from outside: what is refused, and what is put right."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tiny import edit
from refusals import no_warning, refuses
from spear.data.normalize import Normalizer
from spear.errors import Notice, suppress_notices
from spear.evaluate.agents import load_agent
from spear.policy import Spear1Policy, load_vlm, locate
from spear.train.tasks import encode_robot_batch
from spear.types import Action
from spear.util.images import fit_image

STATE = np.array([0.45, 0, 0.2, 0, 1, 0, 0, 1], np.float32)


def observation(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = {
        "image": "observation/image",
        "wrist": "observation/wrist_image",
        "state": "observation/state",
    }
    whole = {
        "observation/image": rng.integers(0, 256, (210, 280, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (112, 112, 3), dtype=np.uint8),
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
        "seed": 1,
    }
    return {**whole, **{names.get(k, k): v for k, v in changes.items()}}


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
        ({"comitted": np.eye(8)[3:4]}, "'comitted'"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "put " * 200}, "prompt"),
        ({"seed": 0.5}, "seed"),
        ({"committed": np.zeros((1, 7))}, "committed"),
        ({"committed": np.full((1, 8), np.nan)}, "committed"),
        ({"committed": np.ones((1, 8))}, "committed"),
        ({"committed": np.eye(8)[3:4] + 20 * np.eye(8)[:1]}, r"committed\[0:3\]"),  # millimetres
        ({"committed": np.eye(8)[3:4] + 50 * np.eye(8)[7:]}, r"committed\[7\]"),  # per cent
        ({"committed": np.eye(8)[3:4]}, "committed"),  # nano has not learned it
    ],
)
def test_bad_observations_are_refused_by_key(
    nano: Spear1Policy, changes: dict[str, Any], key: str
) -> None:
    refuses(key, nano.infer, observation(**changes))


def test_units_of_one_dataset_are_asked_for_by_its_name(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(locate("nano"), tmp_path / "each"))
    whole = Normalizer.load(folder / "normalizer.json")
    twice = dataclasses.replace(whole, translation_scale=(1.0, 1.0, 1.0))
    dataclasses.replace(whole, datasets={"slow": whole, "fast": twice}).save(
        folder / "normalizer.json"
    )
    refuses(r"slow, fast", load_agent, str(folder))
    refuses("fst", load_agent, str(folder), dataset="fst")
    with pytest.warns(Notice, match="normalizer.json: not as saved"):
        slow, fast = (load_agent(str(folder), dataset=name) for name in ("slow", "fast"))
    assert (
        slow.weights != fast.weights
        and Spear1Policy.load(folder, dataset="fast").normalizer == twice
    )
    refuses("--dataset fast", Spear1Policy.load, "nano", dataset="fast")


@pytest.mark.parametrize(
    ("column", "wrong"), [(0, 99.0), (2, np.nan), (5, 3.0), (5, np.nan), (7, np.nan)]
)
def test_no_action_is_nonsense(
    nano: Spear1Policy, column: int, wrong: float, monkeypatch: Any
) -> None:
    chunk = torch.eye(8)[3].index_fill(0, torch.tensor(column), wrong)
    monkeypatch.setattr(nano, "predict", lambda inputs: Action.from_vector(chunk.expand(1, 5, 8)))
    refuses("do not move", nano.infer, observation())


def test_an_answer_begins_with_what_is_decided(
    nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano.model.config, "committed", 2)
    free = nano.infer(observation())["actions"]
    rows = np.array(
        [[0.01, -0.02, 0.03, 1, 0, 0, 0, 0], [0.0, 0.01, 0, 0.8, 0, -0.6, 0, 1]], np.float32
    )
    both = [observation(), observation(committed=rows), observation(committed=rows[:1])]
    none, two, one = (result["actions"] for result in nano.infer_batch(both))
    np.testing.assert_allclose(none, free, atol=1e-5)
    np.testing.assert_allclose(two[:2], rows, atol=1e-6)
    np.testing.assert_allclose(one[:1], rows[:1], atol=1e-6)
    assert np.abs(one[1:] - two[1:]).max() > 1e-4 < np.abs(one[1:] - free[1:]).max()
    refuses("committed", nano.infer, observation(committed=two[:3]))


def test_the_gripper_stays_in_its_range(
    nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bias := nano.model.action_out_proj.bias).data.clone()
    for far, opening in ((9.0, 1), (-9.0, 0)):
        monkeypatch.setattr(bias, "data", before + far * torch.eye(8)[7])
        assert (nano.infer(observation())["actions"][:, 7] == opening).all()


def test_how_many_flow_steps_it_takes_is_the_models_own_unless_told(nano: Spear1Policy) -> None:
    assert nano.steps == nano.model.flow.steps == 5
    inputs = nano.prepare_inputs([observation()])
    own, two = nano.model.sample_actions(**inputs), nano.model.sample_actions(**inputs, steps=2)
    assert torch.equal(own.to_vector(), nano.predict(inputs).to_vector())
    assert torch.equal(
        two.to_vector(), Spear1Policy.load("nano", steps=2).predict(inputs).to_vector()
    )
    assert (
        load_agent("nano", flow_steps=2).weights != load_agent("nano").weights
    )  # results never mix
    assert load_agent("nano", flow_steps=5).weights == load_agent("nano").weights
    refuses("steps: 0", Spear1Policy.load("nano", steps=0).infer, observation())


@pytest.mark.parametrize("name", ["expert", "nothing", "ws://127.0.0.1:9"])
def test_what_a_policy_loaded_here_is_told_is_refused_for_others(name: str) -> None:
    for option, value in {
        "device": "cpu",
        "dtype": "bfloat16",
        "dataset": "fast",
        "flow_steps": 2,
    }.items():
        refuses(f"--{option.replace('_', '-')} {value}", load_agent, name, **{option: value})


def test_of_nothing_there_are_no_actions_and_no_answers(nano: Spear1Policy) -> None:
    answer, picture = load_vlm().answer, [observation()["observation/image"]]
    assert nano.infer_batch([]) == answer([], []) == []
    refuses("1 images, 2 prompts", answer, picture, ["how far?", "where?"])
    refuses("max_new_tokens is 0", answer, picture, ["how far?"], max_new_tokens=0)
    refuses("dtype 'fp16'", load_vlm, dtype="fp16")


def test_acting_reads_an_observation_as_training_reads_a_step(nano: Spear1Policy) -> None:
    state = np.array([0.45, 0.1, 0.2, 0.8, 0.36, -0.48, 0, 0.25], np.float32)
    seen = observation(state=state)
    keys = {"external": "observation/image", "wrist": "observation/wrist_image"}
    images = {v: fit_image(seen[k], *nano.image_sizes[v][::-1])[None] for v, k in keys.items()}
    raw = {"images": images, "views": {}, "action": np.zeros((1, 5, 8), np.float32)}
    raw |= {"position": state[None, :3], "rotation": state[None, 3:7], "gripper": state[7:]}
    raw |= {"action_mask": np.ones((1, 5), bool), "instruction": [seen["prompt"]]}
    learned, acted = (
        encode_robot_batch(nano.processor, nano.normalizer, raw),
        nano.prepare_inputs([seen]),
    )
    for name in ("state", "input_ids", "pixel_values"):
        torch.testing.assert_close(acted[name], learned[name])


def test_how_the_instruction_is_typed_changes_nothing(nano: Spear1Policy) -> None:
    typed = nano.infer(observation(prompt="Put the carrot on the plate."))
    np.testing.assert_array_equal(typed["actions"], nano.infer(observation())["actions"])
    with pytest.warns(Notice, match="cut off"):  # as training does
        dataclasses.replace(nano, truncate_instructions=True).infer(
            observation(prompt="put " * 200)
        )


def test_the_wrist_camera_may_be_missing_which_is_said_and_matters_to_nobody_else() -> None:
    policy = Spear1Policy.load()
    both = [observation(wrist=None), observation(prompt="open the drawer, please", seed=2)]
    with no_warning(), suppress_notices():
        policy.infer(both[0])
    with pytest.warns(Notice, match="observation/wrist_image"):
        alone = [policy.infer(one)["actions"] for one in both]
    with no_warning():  # once
        policy.infer(both[0])
    for one, result in zip(alone, policy.infer_batch(both), strict=True):
        np.testing.assert_allclose(one, result["actions"], atol=1e-5)
    assert not np.allclose(alone[0], policy.infer(observation())["actions"])


def test_another_aspect_is_said_once_and_never_stretched(nano: Spear1Policy) -> None:
    tall = np.zeros((300, 200, 3), np.uint8)
    with no_warning(), suppress_notices():
        nano.infer(observation(image=tall))  # an example of ours, of which users need not hear
    with pytest.warns(Notice, match=r"'external': 200×300 shown in 192×128 .*56%"):
        nano.infer(observation(image=tall))
    with no_warning():
        nano.infer(observation(image=tall))


def changed(
    folder: Path, change: Callable[[dict[str, Any]], Any], file: str = "config.json"
) -> Path:
    """A copy of the nano policy with one of its JSON files changed."""
    edit(Path(shutil.copytree(locate("nano"), folder)) / file, change)
    return folder


def test_unknown_models_and_parts_of_another_network_are_refused(tmp_path: Path) -> None:
    for name in ("nanno", "nowhere/at/all"):
        refuses(name, load_vlm, name)
    image = np.zeros((128, 192, 3), np.uint8)
    refuses(
        "'distence': did you mean 'distance'", load_vlm().answer, [image], ["How far?"], "distence"
    )
    start = changed(tmp_path / "start", lambda c: c["vlm_config"].update(coordinate_start=1000))
    refuses(r"vocabulary mismatch: .* 1000 … 2023 of 2786", Spear1Policy.load, start)
    views = changed(tmp_path / "views", lambda c: c["vlm_config"].update(views=["external"]))
    refuses(r"views do not match: .*wrist", load_vlm, views)
    load_vlm("nano").model.save_pretrained(tmp_path / "vlm")
    refuses("SPEAR-VLM", Spear1Policy.load, tmp_path / "vlm")
