"""Observations from outside: what is refused, and what is put right."""

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from data_tiny import edit, make, stored
from refusals import no_warning, refuses
from spear.data.mixture import Mixture, TrainingSamples
from spear.data.normalize import Normalizer
from spear.data.seen import LATER, LOOKED_AT, RobotCheck, Seen
from spear.embodiments import load
from spear.errors import Notice, suppress_notices
from spear.evaluate.agents import load_agent
from spear.policy import Spear1Policy, load_vlm, locate
from spear.serve.service import Service
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
    inputs = nano.inputs([observation()])
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
    learned, acted = encode_robot_batch(nano.processor, nano.normalizer, raw), nano.inputs([seen])
    for name in ("state", "input_ids", "pixel_values"):
        torch.testing.assert_close(acted[name], learned[name])


def test_how_the_instruction_is_typed_changes_nothing(nano: Spear1Policy) -> None:
    typed = nano.infer(observation(prompt="Put the carrot on the plate."))
    np.testing.assert_array_equal(typed["actions"], nano.infer(observation())["actions"])
    with pytest.warns(Notice, match="cut off"):  # as training does
        dataclasses.replace(nano, cut=True).infer(observation(prompt="put " * 200))


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


def test_what_training_never_had_is_noted_once(nano: Spear1Policy, tmp_path: Path) -> None:
    mixture = Mixture([("it", stored([make(i) for i in range(3)], tmp_path), 1.0)])
    made = Seen.of(TrainingSamples(mixture, {"external": (40, 50)}, augment=1.0), 32)
    steps = [make(i).position[:-1] for i in range(3)]
    np.testing.assert_allclose(
        [made.low, made.high], [f(steps, (0, 1)) for f in (np.min, np.max)], atol=1e-6
    )
    turns = Rotation.from_quat(
        np.concatenate([make(i).rotation[:-1] for i in range(3)]), scalar_first=True
    )
    most = (turns.mean().inv() * turns).magnitude().max()  # the mean is of steps as they were drawn
    assert made.turned == pytest.approx(most, abs=0.05)
    assert made.redder["external"][0] == pytest.approx(80 - 90, abs=3)  # red grows from 20 to 140
    assert (
        made.opposite == 1 and made.begins == make(0).gripper[0]
    )  # it is opened and closed in turn
    made.save(tmp_path / "seen.json")
    assert Seen.load(tmp_path / "seen.json") == made and Seen.load(tmp_path / "none.json") is None
    dataclasses.replace(made, facing=made.facing[:3]).save(tmp_path / "seen.json")
    refuses("seen.json.*facing", Seen.load, tmp_path / "seen.json")
    (tmp_path / "seen.json").write_text("{}")
    refuses("seen.json.*low", Seen.load, tmp_path / "seen.json")

    down, across = np.mgrid[:70:210j, :140:280j]
    image = (down[..., None] + across[..., None] + [20, 10, 0]).astype(np.uint8)
    batch = {
        "position": np.array([[0.3, -0.1, 0.1], [0.6, 0.1, 0.3]]),
        "rotation": np.eye(4)[[1, 1]],
    }
    batch |= {
        "gripper": np.ones(2),
        "action": np.ones((2, 5, 8)),
        "views": dict.fromkeys("ew", [True] * 2),
    }
    batch["images"] = {"e": image[None].repeat(2, 0), "w": 255 - image[None].repeat(2, 0)}
    exchanged = Seen.of_batches([batch], 0.9).unlike(
        STATE[None], {"e": 255 - image.transpose(2, 0, 1)[None]}
    )
    assert any("exchanged with camera 'w'" in words for _, words in exchanged)
    batch |= {"images": {"external": batch["images"]["e"]}, "views": {"external": [True] * 2}}
    known = Seen.of_batches([batch], 0.9)
    for changes, said in (
        ({}, ""),
        ({"image": image[..., ::-1]}, "'external': red and blue"),
        ({"image": image[:, ::-1]}, "'external' is as if flipped left to right"),
        ({"image": 0 * image}, "'external' shows nothing"),
        ({"wrist": image[:, :210]}, "with observation/wrist_image"),
        ({"state": STATE + np.eye(8)[1]}, "y is 1.00 m"),
        ({"state": STATE[[0, 1, 2, 4, 3, 5, 6, 7]]}, "turned by 180°"),
        ({"state": STATE * [1, 1, 1, 1, 1, 1, 1, 0]}, "gripper begins at 0.00"),
    ):
        again = dataclasses.replace(nano, known=known)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                again.inputs([observation(**({"image": image, "wrist": None} | changes))])
        found = [m for m in (str(w.message) for w in caught) if "unlike" in m or "wrist" in m]
        assert len(found) == bool(said) and said in "".join(found)


def test_a_gripper_that_does_the_opposite_is_told_from_a_slow_one() -> None:
    told = np.repeat([1.0, 0.0] * 5, 13)  # open for 2.6 s, closed for 2.6 s
    slow = np.convolve(np.concatenate([np.ones(7), told]), np.ones(8) / 8, "valid")  # within 1.6 s
    other, half = 1 - slow, 0.5 + 0 * slow
    ways = (slow, 0, 0, 0), (other, 0, 0, 1), (half, 0, 0, 0), (other, 2, 0, 0), (other, 0, 0.3, 0)
    for reads, last, apart, inverted in ways:  # the last: two arms, 0.3 m apart, in turn
        check, found, rows = RobotCheck(), 0, np.zeros((5, 8), np.float32)
        for step, (opening, command) in enumerate(zip(reads, told, strict=True)):
            found += len([*check.otherwise(np.array([step % 2 * apart, *np.zeros(6), opening]))])
            rows[:, 7], rows[5 - last :, 7] = (
                command,
                1 - command,
            )  # which of them is executed is unknown
            check.told(rows)
            rows[:, 7] = 1 - rows[:, 7]  # as a program for the other convention does in place
        assert found == inverted


@pytest.mark.parametrize("robots", [["a", "b"], []])
def test_robots_that_are_answered_together_are_checked_one_by_one(
    nano: Spear1Policy, robots: Sequence[str], monkeypatch: Any, recwarn: pytest.WarningsRecorder
) -> None:
    open_one = Action.from_vector(torch.eye(8)[[3, 7]].sum(0).expand(2, 5, 8))
    policy = dataclasses.replace(nano)
    monkeypatch.setattr(policy, "predict", lambda inputs: open_one)
    service, plain = (
        Service(policy, load("generic")),
        {k: v for k, v in observation().items() if k != "seed"},
    )
    both = [plain, {**plain, "observation/state": STATE * [1, 1, 1, 1, 1, 1, 1, 0]}]
    service.answer([plain, plain])  # nobody's, as a server warms up
    for _ in range(LOOKED_AT + 1):
        service.answer(both, robots)
    said = [words for w in recwarn if "gripper" in (words := str(w.message))]
    assert ["begins" in words for words in said] == [True, False][: len(robots)]
    assert all(words.startswith("robot 2: ") for words in said)  # else it may be the first's again


def test_a_robot_that_comes_when_others_have_long_acted_is_looked_at_as_they_were(
    nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, still = dataclasses.replace(nano), Action.from_vector(torch.eye(8)[3].expand(2, 5, 8))
    monkeypatch.setattr(policy, "predict", lambda inputs: still)
    service, plain = Service(policy, load("generic")), load("generic").example()
    far = {**plain, "observation/state": plain["observation/state"] + np.eye(8)[1] - np.eye(8)[7]}
    for robot, sent in [("first", plain)] * (LOOKED_AT // 4 + 1) + [
        ("second", far),
        ("third", far),
    ]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                service.answer([plain, sent], ["first", robot])
        said = " ".join(str(w.message) for w in caught)
        assert [said.count(words) for words in ("gripper begins", "y is 1.00 m")] == [
            robot != "first"
        ] * 2


@pytest.mark.parametrize("fails", ["frozen", "shows nothing", ""])
def test_a_camera_that_fails_later_is_noted(
    nano: Spear1Policy,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    policy, still = dataclasses.replace(nano), Action.from_vector(torch.eye(8)[3].expand(1, 5, 8))
    monkeypatch.setattr(policy, "predict", lambda inputs: still)
    sent = {**load("generic").example(), "seed": 0}
    for step in range(LOOKED_AT + LATER + 1):
        sent["observation/state"][0] += 0.002 * (fails == "frozen")
        sent["observation/image"] = sent["observation/image"] * (
            fails != "shows nothing" or step < LOOKED_AT
        )
        policy.infer(sent)
    found = [words for w in recwarn if "camera 'external'" in (words := str(w.message))]
    assert len(found) == bool(fails) and fails in "".join(found)


def test_a_state_that_no_longer_comes_is_noted() -> None:
    check, found = RobotCheck(), list[str]()
    for step in range(9):
        found += [key for key, _ in check.otherwise(STATE + 1e-6 * min(step, 3))]
        check.told(np.full((5, 8), 0.02))
    assert found == ["state"]


def test_an_arm_that_goes_along_other_axes_is_noted() -> None:
    rng, state = np.random.default_rng(0), STATE.copy()
    for goes, axes, signs in (
        ("", [0, 1, 2], [1, 1, 1]),
        ("-x -y z", [0, 1, 2], [-1, -1, 1]),
        ("y -z x", [2, 0, 1], [1, -1, 1]),
    ):
        check, found, chunk = RobotCheck(), [], np.ones((5, 8))
        for step in range(80):
            found += check.otherwise(state)
            chunk[:, :3] = rng.normal(0, 0.02, 3) + rng.normal(0, 0.004, (5, 3))
            check.told(chunk)
            state[:3] += (chunk[: 1 + step % 3, :3].sum(0) * signs)[axes] + rng.normal(0, 0.004, 3)
        assert [f"along {goes}:" in words for _, words in found] == [True] * bool(goes)
