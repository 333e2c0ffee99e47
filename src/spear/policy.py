"""Checkpoints that answer and act: `load_vlm(...)` and `Spear1Policy.load(...)`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear import flow
from spear.chunks import validate_chunk
from spear.data.normalize import Normalizer
from spear.embodiments.observations import (
    CheckedObservation,
    camera_key,
    is_camera_key,
    validate_observation,
)
from spear.errors import SpearError, check_known, notice, unknown_name_error
from spear.models.decode import LogitRecorder, decode_greedily
from spear.models.devices import (
    choose_device,
    ignore_default_device,
    is_bfloat16_fast,
    keep_freed_memory,
    limit_threads,
)
from spear.models.processing import Processor, map_pixel
from spear.models.readout import Distribution
from spear.models.spear1 import Spear1ForActionPrediction, load_inner_vlm
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.folders import locate
from spear.models.weights.load import ModelT
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import DriftMonitor
from spear.question_types import ANSWER_FORMS
from spear.types import ACTION_DIM, Action, Array, Pixel, Segments, Unit
from spear.util.fingerprints import fingerprint_checkpoint


@dataclass(frozen=True)
class Answer:
    """An answer of SPEAR-VLM.

    Attributes:
        segments: words, numbers (in `unit`, camera frame) and image locations, in order.
        unit: of the numbers.
        distribution: the probabilities of each number's 3D tokens, if they were asked for.
        question_type: the type whose form the answer has; None for a free answer.
    """

    segments: Segments
    unit: Unit
    distribution: Distribution | None = field(default=None, compare=False, repr=False)
    question_type: str | None = field(default=None, compare=False)

    @property
    def values(self) -> list[float]:
        """The numbers alone."""
        return [segment for segment in self.segments if isinstance(segment, float)]


@dataclass(frozen=True)
class VlmBundle:
    """SPEAR-VLM with its processor; `load_vlm` loads one.

    Example:
        >>> import numpy as np
        >>> vlm = load_vlm("nano-vlm")
        >>> image = np.zeros((128, 192, 3), np.uint8)
        >>> [answer] = vlm.answer([image], ["How far is the mug?"], "distance")
        >>> len(answer.values), answer.unit
        (1, 'metre')
    """

    model: SpearVLMForConditionalGeneration
    processor: Processor

    @ignore_default_device
    def answer(
        self,
        images: Sequence[Array],
        prompts: Sequence[str],
        question_type: str | None = None,
        view: str = "external",
        max_new_tokens: int = 64,
        distributions: bool = False,
    ) -> list[Answer]:
        """Answer one prompt about each image, by greedy decoding.

        Args:
            images: [h, w, 3] uint8 each.
            prompts: as many as images.
            question_type: the type of the prompts, one of `spear.question_types`. An answer then
                has the form of that type, with exactly as many numbers or image locations. None:
                the model answers freely.
            view: the camera of the images.
            max_new_tokens: the most tokens of a free answer.
            distributions: whether to add the probabilities of the 3D tokens to the answers.

        Raises:
            SpearError: for an unknown type or view, an empty or too long prompt, and numbers of
                images and prompts that differ.
        """
        if len(prompts) != len(images):
            raise SpearError(
                f"{len(images)} images, {len(prompts)} prompts. Give a prompt for each image."
            )
        if not prompts:
            return []

        # Inputs. Locations in a prompt are of its image, those that the model sees of the fitted
        # image.
        device = self.model.device
        pixels = torch.stack([self.processor.prepare_image(image, view) for image in images])
        image_sizes = [image.shape[1::-1] for image in images]
        fitted_prompts = [
            self.processor.map_text_pixels(prompt, size, view)
            for prompt, size in zip(prompts, image_sizes, strict=True)
        ]
        text = self.processor.encode_prompts(fitted_prompts)

        # Decoding
        token_ids = self.processor.coordinate_ids
        recorder = LogitRecorder((token_ids.start, token_ids.stop)) if distributions else None
        with limit_threads(self.model, len(prompts)):
            ids = decode_greedily(
                self.model,
                {view: pixels.to(device)},
                text["input_ids"].to(device),
                text["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                grammar=self._get_grammar(question_type),
                recorder=recorder,
            )

        # Answers
        probabilities = None
        if recorder is not None and recorder.logits:
            probabilities = torch.stack(recorder.logits, dim=1).softmax(-1).cpu().numpy()
        answers = []
        for index, (answer_ids, image_size) in enumerate(
            zip(ids.tolist(), image_sizes, strict=True)
        ):
            distribution = None
            if probabilities is not None:
                steps = [step for step, token in enumerate(answer_ids) if token in token_ids]
                distribution = Distribution(probabilities[index, steps], self.processor.coordinates)
            answer = Answer(
                segments=self._read_segments(answer_ids, image_size, view),
                unit=self.processor.coordinates.unit,
                distribution=distribution,
                question_type=question_type,
            )
            answers.append(answer)
        return answers

    def _read_segments(
        self, answer_ids: list[int], image_size: tuple[int, int], view: str
    ) -> Segments:
        """The segments of an answer's token ids, with locations in the image as it was given."""
        fitted_size = self.processor.image_sizes[view]
        segments: list[str | float | Pixel] = []
        for segment in self.processor.decode_answer(answer_ids):
            if isinstance(segment, Pixel):
                segment = map_pixel(segment, image_size, fitted_size, inverse=True)
            segments.append(segment)
        return segments

    def _get_grammar(self, question_type: str | None) -> Any:
        """The answer grammar of a question type; None where answers are free."""
        if question_type is None:
            return None
        check_known("question type", ANSWER_FORMS, question_type)
        form = ANSWER_FORMS[question_type]
        if not form.is_restricted:
            return None
        if form.has_words:
            return self.processor.free_text_grammar(form.num_numbers)
        return self.processor.coordinate_grammar(form.num_numbers, form.num_pixels)


def load_vlm(
    name: str | Path = "nano-vlm",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> VlmBundle:
    """Load SPEAR-VLM.

    Args:
        name: a folder, or the name of a shipped model. Of a policy it is the SPEAR-VLM inside it.
        device: "cpu", "cuda" and so on, see `choose_device`.
        dtype: of the weights. "bfloat16" takes half the memory of "float32".

    Raises:
        SpearError: the model is missing or broken.
    """
    folder, model = _load_model(load_inner_vlm, name, device, dtype)
    return VlmBundle(model, Processor.load(folder, model.config))


@ignore_default_device
def _load_model(
    read_model: Callable[[Path, torch.dtype], ModelT],
    name: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> tuple[Path, ModelT]:
    """Find a model's folder and load the model to its device."""
    folder = locate(name)
    if isinstance(device, str):
        device = choose_device(device)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype):
        raise unknown_name_error("dtype", str(dtype), ["float32", "bfloat16", "float16"])

    model = read_model(folder, torch_dtype)
    if model.dtype == torch.bfloat16 and not is_bfloat16_fast(device):
        notice("bfloat16 takes longer than float32 on this CPU: it only saves memory")
    torch.nn.Module.to(model, device)
    if device.type == "cpu":
        keep_freed_memory()  # otherwise temporaries take a tenth of the time of a batch of eight
    return folder, model


@dataclass
class Spear1Policy:
    """SPEAR-1 as a `Policy`: observations in, action chunks in meters out.

    Attributes:
        model: the network.
        processor: prepares images and instructions.
        normalizer: converts between the model's units and meters.
        steps: number of Euler steps of the flow; `load` takes the model's own by default.
        seed: of the noise. The noise of an observation depends on this seed and the observation's
            key "seed"; without that key, on how many observations came before. It never depends on
            the rest of a batch.
        folder: where the policy was loaded from.
        dataset: the training dataset whose normalization statistics are used, if each had its own.
        training_distribution: what the drift monitor compares observations with.
        truncate_instructions: whether too long instructions are truncated, as in training, instead
            of refused.

    Example:
        >>> from spear.embodiments import load
        >>> policy = Spear1Policy.load("nano")
        >>> policy.infer(load("generic").example())["actions"].shape
        (5, 8)
    """

    model: Spear1ForActionPrediction
    processor: Processor
    normalizer: Normalizer
    steps: int = 10
    seed: int = 0
    folder: Path | None = None
    dataset: str | None = None
    training_distribution: TrainingDistribution | None = None
    truncate_instructions: bool = False
    _num_observations: int = field(default=0, init=False, repr=False)
    _monitor: DriftMonitor = field(default_factory=DriftMonitor, init=False, repr=False)

    @staticmethod
    @ignore_default_device
    def load(
        name: str | Path = "nano",
        device: str | torch.device = "cpu",
        steps: int | None = None,
        seed: int = 0,
        dataset: str | None = None,
        dtype: str | torch.dtype = "float32",
    ) -> "Spear1Policy":
        """Load a policy.

        Args:
            name: a folder, or the name of a shipped policy.
            device: "cpu", "cuda" and so on, see `choose_device`.
            steps: number of Euler steps of the flow; None is the model's own.
            seed: of the noise.
            dataset: the training dataset whose normalization statistics to use. Give it if, and
                only if, each dataset of the training mixture had its own.
            dtype: of the weights. "bfloat16" takes half the memory of "float32".

        Raises:
            SpearError: the policy is missing or broken, or `dataset` is given without need.
        """
        read_model = functools.partial(weights.load, Spear1ForActionPrediction)
        folder, model = _load_model(read_model, name, device, dtype)
        normalizer = Normalizer.load(folder / "normalizer.json")
        if dataset is not None and not normalizer.datasets:
            raise SpearError(
                f"{folder}: has the same units for all datasets. Leave out --norm-stats {dataset}."
            )
        return Spear1Policy(
            model=model,
            processor=Processor.load(folder, model.config.vlm_config),
            normalizer=normalizer.for_dataset(dataset),
            steps=model.flow_config.steps if steps is None else steps,
            seed=seed,
            folder=folder,
            dataset=dataset,
            training_distribution=TrainingDistribution.load(folder / "seen.json"),
        )

    @property
    def identity(self) -> str | None:
        """What determines the actions: weights, precision, dataset and number of flow steps.

        Results of policies with different identities are never mixed. It is None for a policy that
        was not loaded from a folder.
        """
        if self._fingerprint is None:
            return None
        words = [self._fingerprint]
        if self.model.dtype != torch.float32:
            words.append(str(self.model.dtype))
        if self.dataset is not None:
            words.append(self.dataset)
        if self.steps != self.model.flow_config.steps:
            words.append(f"steps {self.steps}")
        return " ".join(words)

    @functools.cached_property
    def _fingerprint(self) -> str | None:
        return None if self.folder is None else fingerprint_checkpoint(self.folder)

    @property
    def committed(self) -> int:
        """The longest committed prefix that the policy was trained with; 0 means none."""
        return int(self.model.config.committed)

    @property
    def image_sizes(self) -> Mapping[str, tuple[int, int]]:
        """The cameras of the policy: view → (width, height) in pixels."""
        return self.processor.image_sizes

    def reset(self) -> None:
        """Restart the sequence of noise and the drift monitor, so that a run can be repeated."""
        self._num_observations = 0
        self._monitor.reset()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Compute an action chunk for an observation.

        Args:
            observation: its keys are those of `spear.types.Policy`.

        Returns:
            {"actions": [H, 8] float32}, in the layout of `spear.types.Action`, meters.

        Raises:
            SpearError: for a bad image, state or instruction, and for a chunk that no robot should
                execute.
        """
        return self.infer_batch([observation])[0]

    @ignore_default_device
    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Compute an action chunk for each of several observations in one pass, as `infer` does."""
        if not observations:
            return []
        with limit_threads(self.model, len(observations)):
            normalized_actions = self.predict(self.prepare_inputs(observations))
            actions = self.normalizer.unnormalize_action(normalized_actions)
        vectors = actions.to_vector()
        vectors[..., 7].clamp_(0, 1)
        chunks = vectors.cpu().numpy().astype(np.float32)
        results = [{"actions": validate_chunk(chunk)} for chunk in chunks]
        self._monitor.record_commands(observations, chunks)
        return results

    @ignore_default_device
    def predict(self, inputs: Mapping[str, Any]) -> Action:
        """Run the network alone: from `prepare_inputs` to normalized actions [B, H, ·]."""
        return self.model.sample_actions(**inputs, steps=self.steps)

    @ignore_default_device
    def prepare_inputs(self, observations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Convert observations to the network's arguments.

        Observations that are not `CheckedObservation`s are checked first. The drift monitor sees
        all of them.
        """
        checked = [_check_once(observation) for observation in observations]
        states = torch.from_numpy(np.stack([o["observation/state"] for o in checked]))
        pixels, is_present = self._prepare_images(checked)
        self._monitor.check_batch(
            self.training_distribution, checked, states.numpy(), pixels, is_present
        )
        text = self.processor.encode_instructions(
            [o["prompt"] for o in checked], self.truncate_instructions
        )
        attention_mask = text["attention_mask"]
        noise = torch.cat([self._draw_noise(o) for o in checked])
        committed = self._prepare_committed([o.get("committed", ()) for o in checked])

        device = self.model.device
        view_masks = {
            view: torch.tensor(is_present[view], device=device)
            for view in pixels
            if not all(is_present[view])
        }
        state = self.normalizer.state_vector(states[:, :3], states[:, 3:7], states[:, 7:8])
        # Without padding the network is faster if there is no mask that it has to read.
        is_padded = not bool(attention_mask.all())
        return {
            "pixel_values": {view: images.to(device) for view, images in pixels.items()},
            "view_mask": view_masks,
            "input_ids": text["input_ids"].to(device),
            "attention_mask": attention_mask.to(device) if is_padded else None,
            "state": state.to(device),
            "noise": Action.from_vector(noise).to(device),
            "committed": committed,
        }

    def _prepare_images(
        self, observations: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
        """Fit the images of all cameras to the network.

        Returns:
            View → images [B, 3, h, w] uint8, black where an observation has none. Views that no
            observation has are left out, because they would take time. View → [B], whether each
            observation has that image.
        """
        view_of_key = {camera_key(view): view for view in self.image_sizes}
        for observation in observations:
            for key in observation:
                if is_camera_key(key) and key not in view_of_key:
                    raise SpearError(
                        f"{key}: not a camera of the model (it has {', '.join(view_of_key)}). "
                        "Leave it out."
                    )

        pixels: dict[str, Tensor] = {}
        is_present: dict[str, list[bool]] = {}
        for key, view in view_of_key.items():
            images = [observation.get(key) for observation in observations]
            is_present[view] = [image is not None for image in images]
            self._report_camera_differences(key, view, is_present[view])
            if any(is_present[view]):
                pixels[view] = torch.stack([self._prepare_image(image, view) for image in images])
        return pixels, is_present

    def _prepare_image(self, image: Array | None, view: str) -> Tensor:
        """An image fitted to the network, [3, h, w] uint8; a black one for None."""
        if image is not None:
            return self.processor.prepare_image(image, view)
        width, height = self.image_sizes[view]
        return torch.zeros(3, height, width, dtype=torch.uint8)

    def _report_camera_differences(self, key: str, view: str, is_present: Sequence[bool]) -> None:
        """Print a notice if observations have another set of cameras than training had."""
        distribution = self.training_distribution
        is_trained_view = distribution is None or view in distribution.red_minus_blue
        untrained = "the policy was trained without that camera"
        if is_trained_view and not all(is_present):
            self._monitor.report(key, f"observations without {key}: send it, unless {untrained}")
        elif not is_trained_view and any(is_present):
            self._monitor.report(key, f"observations with {key}: {untrained}: leave it out")

    def _prepare_committed(self, prefixes: Sequence[Array]) -> flow.CommittedPrefix | None:
        """The committed prefixes [d, 8] of observations, normalized; None where there are none."""
        num_committed = [len(prefix) for prefix in prefixes]
        if max(num_committed) == 0:
            return None
        if max(num_committed) > self.committed:
            raise SpearError(
                f"committed: {max(num_committed)} of them: the policy has learned to take "
                f"{self.committed}"
            )
        horizon = self.model.config.horizon
        limits = torch.tensor(num_committed, device="cpu")[:, None]
        is_committed = torch.arange(horizon, device="cpu") < limits
        vectors = torch.zeros(len(prefixes), horizon, ACTION_DIM, dtype=torch.float32, device="cpu")
        vectors[is_committed] = torch.cat(
            [torch.as_tensor(prefix, device="cpu") for prefix in prefixes if len(prefix)]
        )
        actions = self.normalizer.normalize_action(Action.from_vector(vectors))
        device = self.model.device
        return flow.CommittedPrefix(actions.to(device), is_committed.to(device))

    def _draw_noise(self, observation: Mapping[str, Any]) -> Tensor:
        """The noise [1, H, 8] from which an observation's actions flow."""
        observation_seed = int(observation.get("seed", self._num_observations))
        self._num_observations += 1
        seed = (self.seed * 1_000_003 + observation_seed) % 2**63
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.model.config.horizon)
        return flow.sample_noise(shape, self.model.flow_config, generator).to_vector()


def _check_once(observation: Mapping[str, Any]) -> CheckedObservation:
    """An observation after checking it, unless it is checked already."""
    if isinstance(observation, CheckedObservation):
        return observation
    return validate_observation(
        {key: value for key, value in observation.items() if value is not None}
    )
