"""Checkpoints as something that answers and acts: `load_vlm(...)` and `Spear1Policy.load(...)`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear import flow
from spear.chunks import check_chunk
from spear.data.normalize import Normalizer
from spear.embodiments.observations import (
    CheckedObservation,
    camera_key,
    check_observation,
    is_camera_key,
)
from spear.errors import SpearError, check_known, notice, unknown_name_error
from spear.models.decode import LogitRecorder, decode_greedily
from spear.models.devices import choose_device, is_bfloat16_fast, keep_freed_memory, limit_threads
from spear.models.processing import Processor, map_pixel
from spear.models.readout import Distribution
from spear.models.spear1 import Spear1ForActionPrediction, load_inner_vlm
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.models.weights.folders import locate
from spear.models.weights.load import ModelT
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import DriftMonitor
from spear.question_types import (
    NUM_ANSWER_NUMBERS,
    NUM_ANSWER_PIXELS,
    NUM_NUMBERS_BETWEEN_WORDS,
    QUESTION_TYPES,
    QUESTION_TYPES_2D,
    QUESTION_TYPES_PIXEL,
)
from spear.types import ACTION_DIM, Action, Array, Pixel, Segments, Unit
from spear.util.fingerprints import fingerprint_checkpoint


@dataclass(frozen=True)
class Answer:
    """An answer: its words, numbers (in `unit`, camera frame) and image locations, in order.

    distribution  what the model held possible for each number, where that was asked for.
    family        of the question, to whose form it was held; None for a free answer.
    """

    segments: Segments
    unit: Unit
    distribution: Distribution | None = field(default=None, compare=False, repr=False)
    family: str | None = field(default=None, compare=False)

    @property
    def values(self) -> list[float]:
        """The numbers alone."""
        return [s for s in self.segments if isinstance(s, float)]


@dataclass(frozen=True)
class VlmBundle:
    """SPEAR-VLM with its processor."""

    model: SpearVLMForConditionalGeneration
    processor: Processor

    def answer(
        self,
        images: Sequence[Array],
        prompts: Sequence[str],
        family: str | None = None,
        view: str = "external",
        max_new_tokens: int = 64,
        distributions: bool = False,
    ) -> list[Answer]:
        """Greedy answers, one per (image [h, w, 3] uint8, prompt) pair.

        family  of the questions: answers are then held to its form, with exactly as many numbers or
                image locations as it has. None: the model answers freely.
        distributions  also give the probabilities of the 3D tokens with each answer.
        Raises SpearError for an unknown family or view, an empty or too long prompt, or not one per
        image.
        """
        if len(prompts) != len(images):
            raise SpearError(
                f"{len(images)} images, {len(prompts)} prompts: give a prompt for each image"
            )
        if not prompts:
            return []
        device, tokens = self.model.device, self.processor.coordinate_ids
        pixels = torch.stack([self.processor.prepare_image(image, view) for image in images])
        sizes, target = [image.shape[1::-1] for image in images], self.processor.image_sizes[view]
        framed = [
            self.processor.map_text_pixels(*both, view) for both in zip(prompts, sizes, strict=True)
        ]
        text = self.processor.encode_prompts(framed)
        watched = LogitRecorder((tokens.start, tokens.stop)) if distributions else None
        with limit_threads(self.model, len(prompts)):
            ids = decode_greedily(
                self.model,
                {view: pixels.to(device)},
                text["input_ids"].to(device),
                text["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                grammar=self._grammar(family),
                recorder=watched,
            )
        probable, held = None, None
        if watched is not None and watched.logits:
            probable = torch.stack(watched.logits, dim=1).softmax(-1).cpu().numpy()
        answers = []
        for index, (row, size) in enumerate(zip(ids.tolist(), sizes, strict=True)):
            said = self.processor.decode_answer(row)
            places = [
                map_pixel(s, size, target, inverse=True) if isinstance(s, Pixel) else s
                for s in said
            ]
            if probable is not None:
                of_numbers = probable[index, [i for i, token in enumerate(row) if token in tokens]]
                held = Distribution(of_numbers, self.processor.coordinates)
            answers.append(Answer(places, self.processor.coordinates.unit, held, family))
        return answers

    def _grammar(self, family: str | None) -> Any:
        if family is None:
            return None
        check_known(
            "question family", (*QUESTION_TYPES, *QUESTION_TYPES_2D, *QUESTION_TYPES_PIXEL), family
        )
        if family in NUM_ANSWER_NUMBERS or family in NUM_ANSWER_PIXELS:
            return self.processor.coordinate_grammar(
                NUM_ANSWER_NUMBERS.get(family, 0), NUM_ANSWER_PIXELS.get(family, 0)
            )
        if family in NUM_NUMBERS_BETWEEN_WORDS:
            return self.processor.free_text_grammar(NUM_NUMBERS_BETWEEN_WORDS[family])
        return None


def load_vlm(
    name: str | Path = "nano-vlm",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> VlmBundle:
    """SPEAR-VLM from a folder or a shipped name; of a policy, the SPEAR-VLM inside it.

    device as in `choose_device`; dtype of the weights. Raises `SpearError` when it is missing or
    broken.
    """
    folder, model = _load(load_inner_vlm, name, device, dtype)
    return VlmBundle(model, Processor.load(folder, model.config))


def _load(
    read: Callable[[Path, torch.dtype], ModelT],
    name: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> tuple[Path, ModelT]:
    """The folder of that name, and the model that is read from it, on its device."""
    folder, place = locate(name), choose_device(device) if isinstance(device, str) else device
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise unknown_name_error("dtype", str(dtype), ["float32", "bfloat16", "float16"])
    model = read(folder, kind)
    if model.dtype == torch.bfloat16 and not is_bfloat16_fast(place):
        notice("bfloat16 takes longer than float32 on this CPU: it only saves memory")
    torch.nn.Module.to(model, place)
    if place.type == "cpu":
        keep_freed_memory()  # else the temporaries of a batch of eight are a tenth of its time
    return folder, model


@dataclass
class Spear1Policy:
    """SPEAR-1 behind the `Policy` protocol: observations in, metric actions out.

    steps  Euler steps of the flow; `load` takes the model's own unless some are given.
    seed   the noise of an observation depends on (seed, its "seed" key) alone, or, without that
           key, on how many observations came before it; never on what else is in the batch.
    folder where it was loaded from; dataset: whose units were asked for.
    known  what it saw in training; what its first observations have otherwise is noted.
    cut    whether a too long instruction is cut, as in training, instead of being refused.
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
    _observed: int = field(default=0, init=False, repr=False)
    _monitor: DriftMonitor = field(default_factory=DriftMonitor, init=False, repr=False)

    @staticmethod
    def load(
        name: str | Path = "nano",
        device: str | torch.device = "cpu",
        steps: int | None = None,
        seed: int = 0,
        dataset: str | None = None,
        dtype: str | torch.dtype = "float32",
    ) -> "Spear1Policy":
        """From a folder or a shipped name. Raises `SpearError` when it is missing or broken.

        device   as in `choose_device`.
        dataset  whose units to use, where (and only there) each dataset of the mixture had its own.
        dtype    of the weights: bfloat16 takes half the memory of float32.
        """
        folder, model = _load(
            functools.partial(weights.load, Spear1ForActionPrediction), name, device, dtype
        )
        normalizer = Normalizer.load(folder / "normalizer.json")
        if dataset is not None and not normalizer.datasets:
            raise SpearError(
                f"{folder}: has the same units for all datasets: leave out --dataset {dataset}"
            )
        processor = Processor.load(folder, model.config.vlm_config)
        steps = model.flow.steps if steps is None else steps
        known = TrainingDistribution.load(folder / "seen.json")
        return Spear1Policy(
            model, processor, normalizer.for_dataset(dataset), steps, seed, folder, dataset, known
        )

    @property
    def identity(self) -> str | None:
        """Which weights act, in which precision, units and number of flow steps: results of others
        never mix. None where they are from no folder."""
        dtype, own, units = self.model.dtype, self.steps == self.model.flow.steps, self.dataset
        told = ("" if dtype == torch.float32 else f" {dtype}") + (
            "" if units is None else f" {units}"
        )
        return self._files and self._files + told + ("" if own else f" steps {self.steps}")

    @functools.cached_property
    def _files(self) -> str | None:
        return None if self.folder is None else fingerprint_checkpoint(self.folder)

    @property
    def committed(self) -> int:
        """The most actions that an observation may come with as decided already; 0: never trained
        for it."""
        return int(self.model.config.committed)

    @property
    def image_sizes(self) -> Mapping[str, tuple[int, int]]:
        """Its cameras: view → (width, height)."""
        return self.processor.image_sizes

    def reset(self) -> None:
        """Start the noise again, so that a run repeats."""
        self._observed = 0
        self._monitor.reset()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One observation (keys: see `spear.types.Policy`) → {"actions": [H, 8] float32},
        metres."""
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Several observations in one pass. Raises `SpearError` for a bad image, state or
        instruction."""
        if not observations:
            return []
        with limit_threads(self.model, len(observations)):
            actions = self.normalizer.unnormalize_action(
                self.predict(self.prepare_inputs(observations))
            )
        vectors = actions.to_vector()
        vectors[..., 7].clamp_(0, 1)
        chunks = vectors.cpu().numpy().astype(np.float32)
        told = [{"actions": check_chunk(chunk)} for chunk in chunks]
        self._monitor.record_commands(observations, chunks)
        return told

    def predict(self, inputs: Mapping[str, Any]) -> Action:
        """The network alone: normalised actions [B, H, ·] for what `inputs` gives."""
        return self.model.sample_actions(**inputs, steps=self.steps)

    def prepare_inputs(self, observations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Observations as the network's arguments. Unchecked ones are checked first."""
        device = self.model.device
        observations = [
            o
            if isinstance(o, CheckedObservation)
            else check_observation({k: v for k, v in o.items() if v is not None})
            for o in observations
        ]
        states = torch.from_numpy(np.stack([o["observation/state"] for o in observations]))
        pixels, there = self._pixels(observations)
        self._monitor.check_batch(
            self.training_distribution, observations, states.numpy(), pixels, there
        )
        text = self.processor.encode_instructions(
            [o["prompt"] for o in observations], self.truncate_instructions
        )
        padded = not bool(
            text["attention_mask"].all()
        )  # the network is faster when it need not look
        return {
            "pixel_values": {view: images.to(device) for view, images in pixels.items()},
            "view_mask": {
                v: torch.tensor(there[v], device=device) for v in pixels if not all(there[v])
            },
            "input_ids": text["input_ids"].to(device),
            "attention_mask": text["attention_mask"].to(device) if padded else None,
            "state": self.normalizer.state_vector(states[:, :3], states[:, 3:7], states[:, 7:8]).to(
                device
            ),
            "noise": Action.from_vector(torch.cat([self._noise(o) for o in observations])).to(
                device
            ),
            "committed": self._committed([o.get("committed", ()) for o in observations]),
        }

    def _pixels(
        self, observations: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
        """View → images [B, 3, h, w] uint8, without views that nobody has; and which [B] are
        there."""
        keys = {camera_key(view): view for view in self.image_sizes}
        for key in (key for observation in observations for key in observation):
            if is_camera_key(key) and key not in keys:
                raise SpearError(
                    f"{key}: not a camera of the model (it has {', '.join(keys)}): leave it out"
                )
        pixels: dict[str, torch.Tensor] = {}
        there: dict[str, list[bool]] = {}
        for key, view in keys.items():
            images = [o.get(key) for o in observations]
            sent = there[view] = [image is not None for image in images]
            learned = (
                self.training_distribution is None
                or view in self.training_distribution.red_minus_blue
            )  # training had that camera
            without = "the policy was trained without that camera"
            if learned and not all(sent):
                self._monitor.report(key, f"observations without {key}: send it, unless {without}")
            elif not learned and any(sent):
                self._monitor.report(key, f"observations with {key}: {without}: leave it out")
            if any(sent):  # a view that nobody has costs nothing
                width, height = self.image_sizes[view]
                blank = torch.zeros(3, height, width, dtype=torch.uint8)
                fitted = (
                    blank if i is None else self.processor.prepare_image(i, view) for i in images
                )
                pixels[view] = torch.stack([*fitted])
        return pixels, there

    def _committed(self, rows: Sequence[Array]) -> flow.CommittedPrefix | None:
        """Each observation's actions [d, 8] that are decided already; None where there are none."""
        if not (most := max(map(len, rows))):
            return None
        if most > self.committed:
            raise SpearError(
                f"committed: {most} of them: the policy has learned to take {self.committed}"
            )
        vectors = torch.zeros(len(rows), self.model.config.horizon, ACTION_DIM)
        held = torch.arange(vectors.shape[1]) < torch.tensor([[len(row)] for row in rows])
        vectors[held] = torch.cat([torch.as_tensor(row) for row in rows if len(row)])
        actions, device = (
            self.normalizer.normalize_action(Action.from_vector(vectors)),
            self.model.device,
        )
        return flow.CommittedPrefix(actions.to(device), held.to(device))

    def _noise(self, observation: Mapping[str, Any]) -> torch.Tensor:
        """The noise [1, H, ·] that an observation's actions flow from."""
        draw = int(observation.get("seed", self._observed))
        self._observed += 1
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + draw) % 2**63)
        return flow.sample_noise(
            (1, self.model.config.horizon), self.model.flow, generator
        ).to_vector()
