"""Loaded checkpoints: `load_vlm(...)` answers questions, `Spear1Policy.load(...)` acts.

The model sees images that were fitted to its input size (`spear.models.processing.Processor`). A
location in a prompt or an answer is therefore mapped between the user's image and the fitted one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear import flow
from spear.data.frames import FrameVersions, fill_in_frame_versions_if_simulator_only
from spear.data.normalize import Normalizer
from spear.embodiments.actions import validate_chunk
from spear.embodiments.observations import (
    CheckedObservation,
    get_camera_key,
    is_camera_key,
    validate_observation,
)
from spear.errors import SpearError, check_known, make_unknown_name_error, notice
from spear.models.decode import LogitRecorder, decode_greedily
from spear.models.devices import (
    is_bfloat16_fast,
    keep_freed_memory,
    limit_threads,
    make_tensors_on_cpu,
    prepare_device,
)
from spear.models.processing import Processor, map_pixel
from spear.models.quantize import Quantization, check_quantization, quantize_model
from spear.models.readout import Distribution
from spear.models.spear1 import Spear1ForActionPrediction, load_inner_vlm
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.folders import is_simulator_only, locate_checkpoint
from spear.models.weights.load import ModelT
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import DriftMonitor
from spear.question_types import ANSWER_FORMS
from spear.types import ACTION_DIM, Action, Array, Pixel, Segments, Unit, WidthAndHeight
from spear.util.fingerprints import fingerprint_checkpoint

# The noise of an observation is seeded with (policy seed) · SEED_STRIDE + (observation seed). So
# policies with different seeds draw the same noise only for observation seeds a million apart.
SEED_STRIDE = 1_000_003
SEED_LIMIT = 2**63  # PyTorch's seeds are smaller


@dataclass(frozen=True)
class Answer:
    """An answer of SPEAR-VLM.

    Attributes:
        segments: words, numbers (in `unit`, camera frame) and image locations, in order.
        unit: the unit of the numbers in `segments`.
        distribution: for each number, the probabilities of all 3D tokens; None unless the caller
            asked for them.
        question_type: the question type that determined the answer's form; None for a free answer.

    Example:
        >>> answer = Answer([0.82], unit="metre", question_type="distance")
        >>> answer.values, answer.unit
        ([0.82], 'metre')
    """

    segments: Segments
    unit: Unit
    distribution: Distribution | None = field(default=None, compare=False, repr=False)
    question_type: str | None = field(default=None, compare=False)

    @property
    def values(self) -> list[float]:
        """The numbers of the answer, in order, without words and locations."""
        return [segment for segment in self.segments if isinstance(segment, float)]


@dataclass(frozen=True)
class VlmBundle:
    """SPEAR-VLM with its processor; `load_vlm` returns one.

    Attributes:
        model: the network.
        processor: prepares images and prompts, and reads answers.

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

    @make_tensors_on_cpu
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
            images: RGB images, each [h, w, 3] uint8.
            prompts: one question for each image.
            question_type: the type of all prompts, one of `spear.question_types`. Decoding then
                allows only answers of that type's form, for example exactly one number for a
                distance. With None the model answers freely.
            view: the camera that took the images, "external" or "wrist".
            max_new_tokens: the largest number of tokens of a free answer.
            distributions: whether to add the probabilities of the 3D tokens to the answers.

        Returns:
            One answer for each image, in order.

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

        # Fit the images and the locations in the prompts to the model.
        device = self.model.device
        image_sizes = [image.shape[1::-1] for image in images]  # (width, height) of each image
        pixels = torch.stack([self.processor.prepare_image(image, view) for image in images])
        text = self._encode_prompts(prompts, image_sizes, view)

        # Decode. The recorder keeps the logits of the 3D tokens at every decoded position.
        token_ids = self.processor.coordinate_ids  # range of the 3D tokens' ids
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

        # Convert the token ids to answers.
        probabilities = None  # or [num_answers, num_positions, num_3d_tokens]
        if recorder is not None and recorder.logits:
            probabilities = torch.stack(recorder.logits, dim=1).softmax(-1).cpu().numpy()
        answers = []
        for index, answer_ids in enumerate(ids.tolist()):
            distribution = None
            if probabilities is not None:
                distribution = self._select_probabilities_of_numbers(
                    answer_ids, probabilities[index]
                )
            answer = Answer(
                segments=self._decode_to_segments(answer_ids, image_sizes[index], view),
                unit=self.processor.coordinates.unit,
                distribution=distribution,
                question_type=question_type,
            )
            answers.append(answer)
        return answers

    def _encode_prompts(
        self, prompts: Sequence[str], image_sizes: Sequence[WidthAndHeight], view: str
    ) -> Mapping[str, Tensor]:
        """Convert prompts to "input_ids" and "attention_mask".

        Locations in a prompt refer to the user's image, but the model sees the fitted image.
        Therefore the locations are mapped to the fitted image first.
        """
        fitted_prompts = [
            self.processor.map_text_pixels(prompt, size, view)
            for prompt, size in zip(prompts, image_sizes, strict=True)
        ]
        return self.processor.encode_prompts(fitted_prompts)

    def _select_probabilities_of_numbers(
        self, answer_ids: list[int], probabilities: Array
    ) -> Distribution:
        """Select the probabilities of an answer's numbers.

        A number's probabilities are those of the position at which its token was decoded.

        Args:
            answer_ids: the answer's token ids.
            probabilities: [num_positions, num_3d_tokens] at every decoded position of the answer.
        """
        token_ids = self.processor.coordinate_ids
        number_positions = [
            position for position, token in enumerate(answer_ids) if token in token_ids
        ]
        return Distribution(probabilities[number_positions], self.processor.coordinates)

    def _decode_to_segments(
        self, answer_ids: list[int], image_size: WidthAndHeight, view: str
    ) -> Segments:
        """Decode an answer's token ids to segments, with locations mapped to the user's image."""
        fitted_size = self.processor.image_sizes[view]
        segments: list[str | float | Pixel] = []
        for segment in self.processor.decode_answer(answer_ids):
            if isinstance(segment, Pixel):
                segment = map_pixel(segment, image_size, fitted_size, inverse=True)
            segments.append(segment)
        return segments

    def _get_grammar(self, question_type: str | None) -> Any:
        """The answer grammar of a question type; None if decoding is not restricted.

        The grammar fixes how many numbers and pixels the answer has. For an answer with words, it
        leaves the words around the numbers free.
        """
        if question_type is None:
            return None
        check_known("question type", ANSWER_FORMS, question_type)
        answer_form = ANSWER_FORMS[question_type]
        if not answer_form.is_restricted:
            return None
        if answer_form.has_words:
            return self.processor.make_free_text_grammar(answer_form.num_numbers)
        return self.processor.make_coordinate_grammar(
            answer_form.num_numbers, answer_form.num_pixels
        )


def load_vlm(
    name: str | Path = "nano-vlm",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> VlmBundle:
    """Load SPEAR-VLM.

    Args:
        name: a folder, or the name of a shipped model. If it holds a policy, the SPEAR-VLM inside
            the policy is loaded.
        device: "cpu", "cuda" and so on, see `prepare_device`.
        dtype: data type of the weights. "bfloat16" takes half the memory of "float32".

    Returns:
        The model, with the method `answer`.

    Raises:
        SpearError: the model is missing or broken.

    Example:
        >>> vlm = load_vlm("nano-vlm")
        >>> sorted(vlm.processor.image_sizes.items())  # width and height in pixels
        [('external', (192, 128)), ('wrist', (96, 96))]
    """
    folder, model = _load_model(load_inner_vlm, name, device, dtype)
    return VlmBundle(model, Processor.load(folder, model.config))


@make_tensors_on_cpu
def _load_model(
    read_model: Callable[[Path, torch.dtype], ModelT],
    name: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantize: Quantization | None = None,
) -> tuple[Path, ModelT]:
    """Find the folder of the model `name`, load the model by `read_model`, move it to `device`.

    With `quantize` its weights are quantized on the way there.

    Returns:
        The folder and the model.
    """
    folder = locate_checkpoint(name)
    if isinstance(device, str):
        device = prepare_device(device)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype):
        raise make_unknown_name_error("dtype", str(dtype), ["float32", "bfloat16", "float16"])

    check_quantization(quantize, device)
    model = read_model(folder, torch_dtype)
    if quantize is not None:
        quantize_model(model, quantize)
    if model.dtype == torch.bfloat16 and not is_bfloat16_fast(device):
        notice("bfloat16 takes longer than float32 on this CPU. It only saves memory.")
    torch.nn.Module.to(model, device)  # mypy cannot check the decorated `to` of Transformers
    if device.type == "cpu":
        # Otherwise allocating temporary tensors takes a tenth of the time of a batch of eight.
        keep_freed_memory()
    return folder, model


@dataclass
class Spear1Policy:
    """SPEAR-1 as a `Policy`: observations in, action chunks in meters out.

    Attributes:
        model: the network.
        processor: prepares images and instructions.
        normalizer: converts between the model's units and meters.
        steps: number of Euler steps of the flow; `load` takes the model's own by default.
        seed: seed of the noise. The noise of an observation depends on this seed and on the
            observation's key "seed", or, without that key, on the number of earlier observations.
            The noise never depends on the other observations of a batch.
        folder: where the policy was loaded from; None if it was not loaded.
        dataset: the training dataset whose normalization statistics are used; None if all datasets
            share one set of statistics.
        training_distribution: what the drift monitor compares observations with.
        frames: name of a dataset or robot → the version of its base and end-effector frames
            (`spear.data.frames`) in which the policy acts. None if the policy was made before
            versions were recorded.
        truncate_instructions: whether the policy truncates instructions that are too long, as
            training does. Otherwise it refuses them.
        quantize: how the weights are quantized; None if they are not.

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
    frames: FrameVersions | None = None
    truncate_instructions: bool = False
    quantize: Quantization | None = None
    _num_observations: int = field(default=0, init=False, repr=False)
    _monitor: DriftMonitor = field(default_factory=DriftMonitor, init=False, repr=False)

    @staticmethod
    @make_tensors_on_cpu
    def load(
        name: str | Path = "nano",
        device: str | torch.device = "cpu",
        steps: int | None = None,
        seed: int = 0,
        dataset: str | None = None,
        dtype: str | torch.dtype = "float32",
        quantize: Quantization | None = None,
    ) -> "Spear1Policy":
        """Load a policy.

        Args:
            name: a folder, or the name of a shipped policy.
            device: "cpu", "cuda" and so on, see `prepare_device`.
            steps: number of Euler steps of the flow; None is the model's own.
            seed: seed of the noise.
            dataset: the training dataset whose normalization statistics to use. Give a dataset if,
                and only if, each dataset of the training mixture had its own statistics.
            dtype: data type of the weights. "bfloat16" takes half the memory of "float32".
            quantize: keep the weights of linear layers in 8 or 4 bits ("int8", "int8-dynamic",
                "int4"; see `spear.models.quantize`). Everything else keeps `dtype`.

        Returns:
            The policy.

        Raises:
            SpearError: the policy is missing or broken, or `dataset` is given without need.
        """
        read_model = functools.partial(weights.load, Spear1ForActionPrediction)
        folder, model = _load_model(read_model, name, device, dtype, quantize)
        normalizer = Normalizer.load(folder / "normalizer.json")
        if normalizer.action_reference != model.config.action_reference:
            raise SpearError(
                f"{folder}: config.json says that actions are measured from the "
                f"{model.config.action_reference} pose, normalizer.json from the "
                f"{normalizer.action_reference} one. Take both files from the same training."
            )
        if dataset is not None and not normalizer.datasets:
            raise SpearError(
                f"{folder} has the same normalization statistics for all datasets. Leave out "
                f"--norm-stats {dataset}."
            )
        return Spear1Policy(
            model=model,
            processor=Processor.load(folder, model.config.vlm_config),
            normalizer=normalizer.resolve_for_dataset(dataset),
            steps=model.flow_config.steps if steps is None else steps,
            seed=seed,
            folder=folder,
            dataset=dataset,
            training_distribution=TrainingDistribution.load(folder / "seen.json"),
            frames=fill_in_frame_versions_if_simulator_only(
                normalizer.frames, is_simulator_only(folder)
            ),
            quantize=quantize,
        )

    @property
    def identity(self) -> str | None:
        """A text that names what determines the actions: weights, precision, dataset, flow steps.

        Evaluations never mix results of policies with different identities. The identity is None
        for a policy that was not loaded from a folder.
        """
        if self._fingerprint is None:
            return None
        words = [self._fingerprint]
        if self.model.dtype != torch.float32:
            words.append(str(self.model.dtype))
        if self.quantize is not None:
            words.append(self.quantize)
        if self.dataset is not None:
            words.append(self.dataset)
        if self.steps != self.model.flow_config.steps:
            words.append(f"steps {self.steps}")
        return " ".join(words)

    @functools.cached_property
    def _fingerprint(self) -> str | None:
        """A hash of the policy's checkpoint; None if the policy was not loaded from a folder."""
        return None if self.folder is None else fingerprint_checkpoint(self.folder)

    @property
    def committed(self) -> int:
        """The longest committed prefix that the policy was trained with; 0 means none."""
        return int(self.model.config.committed)

    @property
    def image_sizes(self) -> Mapping[str, WidthAndHeight]:
        """The cameras of the policy: view → (width, height) in pixels."""
        return self.processor.image_sizes

    def reset(self) -> None:
        """Restart the sequence of noise and the drift monitor, so that a run can be repeated."""
        self._num_observations = 0
        self._monitor.begin_run()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Compute an action chunk for an observation.

        Args:
            observation: a dict with the keys that `spear.types.Policy` describes.

        Returns:
            {"actions": [H, 8] float32}, in the layout of `spear.types.Action`, meters.

        Raises:
            SpearError: for an invalid image, state or instruction, and for a predicted chunk that
                would move the robot implausibly far or fast.
        """
        return self.infer_batch([observation])[0]

    @make_tensors_on_cpu
    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Compute an action chunk for each of several observations in one pass, as `infer` does.

        Args:
            observations: observations with the keys of `spear.types.Policy`.

        Returns:
            What `infer` returns for each observation, in order.
        """
        if not observations:
            return []
        with limit_threads(self.model, len(observations)):
            normalized_actions = self.predict(self.prepare_inputs(observations))
            actions = self.normalizer.unnormalize_action(normalized_actions)
        vectors = actions.to_vector()  # [B, H, 8]
        vectors[..., 7].clamp_(0, 1)  # gripper opening
        chunks = vectors.cpu().numpy().astype(np.float32)
        results = [{"actions": validate_chunk(chunk)} for chunk in chunks]
        self._monitor.record_commands(observations, chunks)
        return results

    @make_tensors_on_cpu
    def predict(self, inputs: Mapping[str, Any]) -> Action:
        """Run the network alone.

        Args:
            inputs: what `prepare_inputs` returned for B observations.

        Returns:
            Chunks of H actions for the B observations, in normalized units.
        """
        return self.model.sample_actions(**inputs, steps=self.steps)

    @make_tensors_on_cpu
    def prepare_inputs(self, observations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Convert observations to the network's arguments.

        An observation that is not yet a `CheckedObservation` is checked first. The drift monitor
        compares every observation with the training distribution. The noise is drawn here, so that
        observations without a seed count for the noise of later ones (`seed`).

        Args:
            observations: observations with the keys of `spear.types.Policy`.

        Returns:
            Name → tensor, the arguments of the network's sampling.
        """
        checked = [_validate_unless_checked(observation) for observation in observations]
        states = torch.from_numpy(
            np.stack([observation["observation/state"] for observation in checked])
        )
        pixels, is_present = self._prepare_images(checked)
        self._monitor.report_findings_in_batch(
            self.training_distribution, checked, states.numpy(), pixels, is_present
        )
        prompts = [observation["prompt"] for observation in checked]
        text = self.processor.encode_instructions(prompts, self.truncate_instructions)
        attention_mask = text["attention_mask"]
        noise = torch.cat([self._sample_noise(observation) for observation in checked])
        prefixes = [observation.get("committed", ()) for observation in checked]
        committed = self._prepare_committed(prefixes)

        device = self.model.device
        # Only a view that some observations lack needs a mask.
        view_masks = {
            view: torch.tensor(is_present[view], device=device)
            for view in pixels
            if not all(is_present[view])
        }
        state = self.normalizer.encode_state(states[:, :3], states[:, 3:7], states[:, 7:8])
        # If no prompt is padded, the network gets no attention mask: it is faster without one.
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
            pixels: view → images [B, 3, h, w] uint8. The image is black if an observation has no
                image of that view. Views without any image are omitted, because encoding them
                would take time.
            is_present: view → B truth values, whether each observation has an image of that view.
        """
        view_of_key = {get_camera_key(view): view for view in self.image_sizes}
        for observation in observations:
            for key in observation:
                if is_camera_key(key) and key not in view_of_key:
                    raise SpearError(
                        f"{key} is no camera of the model, which has {', '.join(view_of_key)}. "
                        "Leave it out."
                    )

        pixels: dict[str, Tensor] = {}
        is_present: dict[str, list[bool]] = {}
        for key, view in view_of_key.items():
            images = [observation.get(key) for observation in observations]
            is_present[view] = [image is not None for image in images]
            self._notice_camera_unlike_training(key, view, is_present[view])
            if any(is_present[view]):
                pixels[view] = torch.stack([self._prepare_image(image, view) for image in images])
        return pixels, is_present

    def _prepare_image(self, image: Array | None, view: str) -> Tensor:
        """Fit an image to the network, [3, h, w] uint8. For None the result is a black image."""
        if image is not None:
            return self.processor.prepare_image(image, view)
        width, height = self.image_sizes[view]
        return torch.zeros(3, height, width, dtype=torch.uint8)

    def _notice_camera_unlike_training(
        self, camera_key: str, view: str, is_present: Sequence[bool]
    ) -> None:
        """Print a notice if a camera differs from training: missing now, or unknown then.

        Args:
            camera_key: the camera's key in observations, which the notice names.
            view: the camera's name in training data.
            is_present: whether each observation has an image of the camera.
        """
        distribution = self.training_distribution
        # `red_minus_blue` has an entry for each camera of the training data.
        is_trained_view = distribution is None or view in distribution.red_minus_blue
        if is_trained_view and not all(is_present):
            advice = "Send it, unless your robot or the training lacks that camera."
            self._monitor.report(camera_key, f"observations have no {camera_key}. {advice}")
        elif not is_trained_view and any(is_present):
            trained_without = "the policy was trained without that camera"
            self._monitor.report(
                camera_key, f"observations have {camera_key}, but {trained_without}. Leave it out."
            )

    def _prepare_committed(self, prefixes: Sequence[Array]) -> flow.CommittedPrefix | None:
        """Normalize and pad the committed prefixes of B observations.

        Args:
            prefixes: B arrays [d, 8] in meters, with different lengths d; d is 0 for an observation
                without a committed prefix.

        Returns:
            Actions [B, H, 8] with a mask [B, H] of the committed ones; None if all d are 0.
        """
        num_committed = [len(prefix) for prefix in prefixes]
        if max(num_committed) == 0:
            return None
        if max(num_committed) > self.committed:
            raise SpearError(
                f"{max(num_committed)} actions are committed, but the policy has learned to "
                f"take {self.committed}. Commit fewer."
            )
        horizon = self.model.config.horizon
        limits = torch.tensor(num_committed, device="cpu")[:, None]  # [B, 1]
        is_committed = torch.arange(horizon, device="cpu") < limits  # [B, H]
        vectors = torch.zeros(len(prefixes), horizon, ACTION_DIM, dtype=torch.float32, device="cpu")
        # The mask selects rows in order of observation, then action: the order of `torch.cat`.
        vectors[is_committed] = torch.cat(
            [torch.as_tensor(prefix, device="cpu") for prefix in prefixes if len(prefix)]
        )
        actions = self.normalizer.normalize_action(Action.from_vector(vectors))
        device = self.model.device
        return flow.CommittedPrefix(actions.to(device), is_committed.to(device))

    def _sample_noise(self, observation: Mapping[str, Any]) -> Tensor:
        """Draw the noise [1, H, 8] from which the flow to an observation's actions begins."""
        observation_seed = int(observation.get("seed", self._num_observations))
        self._num_observations += 1
        seed = (self.seed * SEED_STRIDE + observation_seed) % SEED_LIMIT
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.model.config.horizon)
        return flow.sample_noise(shape, self.model.flow_config, generator).to_vector()


def _validate_unless_checked(observation: Mapping[str, Any]) -> CheckedObservation:
    """Check an observation, unless it has been checked before."""
    if isinstance(observation, CheckedObservation):
        return observation
    return validate_observation(
        {key: value for key, value in observation.items() if value is not None}
    )
