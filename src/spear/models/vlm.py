"""SPEAR-VLM: PaliGemma with a second, 3D-aware visual encoder and 1,024 3D tokens."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel, SiglipVisionConfig
from transformers import Dinov2Config as MogeConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from spear.errors import SpearError, check_known
from spear.models import layers, vision
from spear.models.fast.linear import linear, run_in_parallel_streams, use_fast_linear

IGNORE_LABEL = -100
"""The label of a token that is not to be learned (PyTorch's default for cross-entropy)."""

# In training, tensors of ever new sizes fragment the heap, and every step takes longer (measured by
# `python -m experiments.tensor_sizes`). Sizes are therefore padded to multiples of these numbers.
PAD_LENGTH_TO_MULTIPLE = 8  # tokens per text
PAD_NUM_TARGETS_TO_MULTIPLE = 64  # learned tokens per batch


@strict
class SpearVLMConfig(layers.PortableConfig):
    """The parts of SPEAR-VLM and how it learns.

    vision_config           SigLIP's config.
    text_config             The config of Gemma, or of Gemma 2, as its `model_type` says.
    moge_config             DINOv2's config, or None for a plain PaliGemma. In both visual configs
                            an extra field `stem` = "conv" replaces the patch embedding by a
                            `vision.ConvStem`.
    views                   Camera names, in the order of their tokens.
    coordinate_start        The id of `<3d0000>`; the ids of the other 3D tokens follow.
    coordinate_bins         The number of 3D tokens.
    coordinate_loss_weight  λ, the weight of a 3D token in the loss (the paper: 2).
    coordinate_smoothing    Standard deviation, in bins, of the Gaussian over which the target of a
                            3D token is spread. 0 is the paper's plain cross-entropy; more helps
                            small models.
    """

    model_type = "spear_vlm"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma"),
        "moge_config": SubConfigSpec(config_class=MogeConfig, optional=True),
    }

    vision_config: Any = None
    text_config: Any = None
    moge_config: Any = None
    views: list[str] = field(default_factory=lambda: ["external", "wrist"])
    coordinate_start: int = 257152
    coordinate_bins: int = 1024
    coordinate_loss_weight: float | int = 2.0
    coordinate_smoothing: float | int = 0.0
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = (
        False  # nothing to tie: logits come from the embedding matrix itself
    )

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("image_sizes", None)  # older checkpoints have it; `processor.json` says it today
        super().__post_init__(**kwargs)
        patch = self.vision_config.patch_size
        if self.moge_config is not None and self.moge_config.patch_size != patch:
            raise SpearError(
                f"encoder configs disagree: SigLIP patch {patch}, MoGe patch"
                f" {self.moge_config.patch_size}: both must cut the image into the same grid"
            )

    @property
    def coordinate_ids(self) -> range:
        """The ids of the 3D tokens."""
        return range(self.coordinate_start, self.coordinate_start + self.coordinate_bins)


@dataclass
class LossOutput(ModelOutput):
    """What a network returns: either a loss with its parts, or logits.

    loss    0-d.
    parts   Named parts of the loss, 0-d and without gradients, such as "text" and "coordinates"
            (mean, nats).
    logits  [N, L, vocabulary], for N texts of L tokens each.
    """

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """Images and text after the language model, for the tokens that attend to them.

    There are N texts of L tokens each. S is the number of visual tokens plus L.

    cache   Keys and values of every layer.
    valid   [N, S] bool, False for padding and missing images.
    hidden  [N, L, D] output of the last layer at the text positions.
    """

    cache: layers.KVCache
    valid: Tensor
    hidden: Tensor


class SpearVLMForConditionalGeneration(PreTrainedModel):
    """SPEAR-VLM: images and a question in, text with 3D tokens out (the paper, "SPEAR-VLM").

    A sequence is [tokens of each view | text]. A visual token is the average of SigLIP's and MoGe's
    features of the same patch, each after its own linear projection. Scaling, masks and positions
    are PaliGemma's.
    """

    config: SpearVLMConfig
    base_model_prefix = "vlm"
    _supports_sdpa = True

    def __init__(self, config: SpearVLMConfig) -> None:
        super().__init__(layers.choose_attention(config))
        width = config.text_config.hidden_size
        self.vision_tower = vision.SiglipEncoder(config.vision_config)
        self.multi_modal_projector = build_projector(config.vision_config.hidden_size, width)
        self.moge: vision.MogeEncoder | None = None
        self.moge_projector: nn.Module | None = None
        if config.moge_config is not None:
            moge_width = vision.NUM_FEATURE_LAYERS * config.moge_config.hidden_size
            self.moge = vision.MogeEncoder(config.moge_config)
            self.moge_projector = build_projector(moge_width, width)
        self.language_model = layers.build_language_model(config.text_config)
        use_fast_linear(self)
        self.post_init()

    def encode_views(self, *views: Tensor) -> list[Tensor]:
        """Visual tokens of each view: [B, 3, h, w] uint8 -> [B, patches, width], row by row."""
        features, num_tokens = self._encode_side_by_side(views)
        return list(features.split(num_tokens, dim=1))

    def _encode_side_by_side(self, views: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Visual tokens of all views side by side, [B, T, width], and the number of each view."""
        moge = self.moge
        moge_projector = self.moge_projector
        encoders = [lambda: self.multi_modal_projector(self.vision_tower.features(views))]
        if moge is not None and moge_projector is not None:
            encoders.append(lambda: moge_projector(moge(*views)))
        projected = run_in_parallel_streams(encoders)
        features = projected[0]
        if len(projected) > 1:
            features = 0.5 * (projected[0] + projected[1])

        patch = self.config.vision_config.patch_size
        num_tokens = [view.shape[2] // patch * (view.shape[3] // patch) for view in views]
        return features, num_tokens

    def encode_images(
        self, pixel_values: Mapping[str, Tensor], view_mask: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode all views of an observation, in the order of `config.views`.

        Args:
            pixel_values: View -> [B, 3, h, w] uint8.
            view_mask: View -> [B] bool, False for a missing image.

        Returns:
            The visual tokens [B, T, width], and [B, T] bool, False for the tokens of missing
            images.

        Raises:
            SpearError: For a view that the model does not know, for images of a wrong type or size,
                or if there is no view at all.
        """
        check_known("view", self.config.views, *pixel_values, *(view_mask or {}))
        views = [name for name in self.config.views if name in pixel_values]
        for name in views:
            vision.check_pixels(name, pixel_values[name], self.config.vision_config.patch_size)
        if not views:
            known_views = ", ".join(self.config.views)
            raise SpearError(f"no images: pass at least one of the views {known_views}")

        features, num_tokens = self._encode_side_by_side([pixel_values[name] for name in views])
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        for name, view_valid in zip(views, valid.split(num_tokens, dim=1), strict=True):
            if view_mask is not None and name in view_mask:
                view_valid.copy_(view_mask[name][:, None])
        return features, valid

    def run_language_model(
        self,
        features: Tensor,
        image_valid: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        keep_cache: bool = True,
    ) -> Prefix:
        """Run visual tokens, one row per text, and text through the language model.

        Args:
            features: [N, T, width].
            image_valid: [N, T] bool.
            input_ids: [N, L].
            attention_mask: [N, L], 0 on padding; None where there is no padding.
            token_type_ids: [N, L], 1 on the answer, which is causal; None where there is no answer.
            keep_cache: Whether the result has keys and values.
        """
        text = self.embed_text(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        valid = torch.cat([image_valid, attention_mask.bool()], dim=1)
        causal = torch.cat([torch.zeros_like(image_valid), token_type_ids.bool()], dim=1)
        mask = layers.make_prefix_lm_mask(valid, causal)
        cache = layers.KVCache()
        output = self.language_model(
            inputs_embeds=torch.cat([features.to(text.dtype), text], dim=1),
            attention_mask=layers.prepare_mask(self.language_model, mask, text.dtype),
            position_ids=layers.compute_position_ids(valid),
            use_cache=False,
            **{layers.CACHE_ARGUMENT: cache if keep_cache else None},
        )
        num_visual_tokens = features.shape[1]
        return Prefix(cache, valid, output.last_hidden_state[:, num_visual_tokens:])

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [..., width].

        They are float32 under autocast, even if the weights are bfloat16.
        """
        text = self.language_model.embed_tokens(input_ids)
        return text.float() if torch.is_autocast_enabled(text.device.type) else text

    def compute_logits(
        self, hidden: Tensor, first_id: int = 0, end_id: int | None = None
    ) -> Tensor:
        """Logits of the tokens from `first_id` to before `end_id`: [..., D] -> [..., tokens].

        The embedding matrix computes them.
        """
        logits = linear(hidden, self.language_model.embed_tokens.weight[first_id:end_id])
        # Gemma 2 has it
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def compute_token_loss(
        self, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`compute_weighted_cross_entropy` of hidden states [M, D] with labels [M]."""
        return compute_weighted_cross_entropy(
            self.compute_logits(hidden),
            labels,
            self.config.coordinate_ids,
            self.config.coordinate_loss_weight,
            self.config.coordinate_smoothing,
        )

    def forward(  # noqa: PLR0913  the inputs of the network
        self,
        pixel_values: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        view_mask: Mapping[str, Tensor] | None = None,
        length_groups: int = 1,
    ) -> LossOutput:
        """The loss if `labels` are given, otherwise the logits.

        Args:
            pixel_values: View -> [B, 3, h, w] uint8.
            input_ids: [N, L] text, padded on either side.
            attention_mask: [N, L], 0 on padding; None where there is no padding.
            token_type_ids: [N, L], 0 on the prompt, which sees itself and the images in both
                directions, and 1 on the answer, which is causal. With None, tokens that have a
                label are the answer.
            image_index: [N] the image in 0 … B - 1 that each text belongs to; None: one text per
                image.
            labels: [N, L] the token that stands at each position, `IGNORE_LABEL` where it is not to
                be learned. Logits are computed only for positions that have a label.
            view_mask: View -> [B] bool, False for a missing image.
            length_groups: With labels, the texts run in that many groups of similar length, to save
                padding.
        """
        features, image_valid = self.encode_images(pixel_values, view_mask)
        if image_index is None:
            image_index = torch.arange(len(features), device=features.device)
        if labels is None:
            prefix = self.run_language_model(
                features[image_index],
                image_valid[image_index],
                input_ids,
                attention_mask,
                token_type_ids,
            )
            return LossOutput(logits=self.compute_logits(prefix.hidden))

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = labels != IGNORE_LABEL

        hidden_per_group = []
        targets_per_group = []
        for rows, length in _group_by_length(attention_mask, length_groups):
            prefix = self.run_language_model(
                features[image_index[rows]],
                image_valid[image_index[rows]],
                input_ids[rows, :length],
                attention_mask[rows, :length],
                token_type_ids[rows, :length],
                keep_cache=False,
            )
            # The hidden state of a position predicts the token of the next one.
            next_labels = labels[rows, 1:length]
            is_learned = next_labels != IGNORE_LABEL
            hidden_per_group.append(prefix.hidden[:, :-1][is_learned])
            targets_per_group.append(next_labels[is_learned])

        hidden = torch.cat(hidden_per_group)
        targets = torch.cat(targets_per_group)
        num_padding = -len(targets) % PAD_NUM_TARGETS_TO_MULTIPLE
        hidden = F.pad(hidden, (0, 0, 0, num_padding))
        targets = F.pad(targets, (0, num_padding), value=IGNORE_LABEL)
        loss, parts = self.compute_token_loss(hidden, targets)
        return LossOutput(loss=loss, parts=parts)


def compute_weighted_cross_entropy(
    logits: Tensor, labels: Tensor, coordinate_ids: range, weight: float, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted mean cross-entropy, Σ wᵢ·lossᵢ / Σ wᵢ.

    The weight w is λ on 3D tokens (the paper) and 1 on text.

    Args:
        logits: [M, vocabulary].
        labels: [M], `IGNORE_LABEL` where there is none.
        coordinate_ids: The ids of the 3D tokens.
        weight: λ.
        smoothing: Standard deviation, in bins, of the Gaussian that is the target of a 3D token.

    Returns:
        The loss, and its unweighted means over tokens of "text" and of "coordinates".
    """
    log_p = logits.float().log_softmax(-1)
    has_label = labels != IGNORE_LABEL
    is_coordinate = (labels >= coordinate_ids.start) & (labels < coordinate_ids.stop)

    label_log_p = log_p.gather(-1, labels[:, None].clamp_min(0))[:, 0]
    if smoothing > 0:
        coordinate_log_p = log_p[:, coordinate_ids.start : coordinate_ids.stop]
        bins = labels - coordinate_ids.start
        smoothed_log_p = _expected_log_probability(coordinate_log_p, bins, smoothing)
        label_log_p = torch.where(is_coordinate, smoothed_log_p, label_log_p)
    losses = -label_log_p

    coordinate = is_coordinate.float()
    text = has_label.float() - coordinate
    weights = text + weight * coordinate
    loss = (weights * losses).sum() / weights.sum().clamp_min(1e-6)
    parts = {
        "text": _masked_mean(losses.detach(), text),
        "coordinates": _masked_mean(losses.detach(), coordinate),
    }
    return loss, parts


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _expected_log_probability(log_p: Tensor, bins: Tensor, sigma: float) -> Tensor:
    """Expected log probability under a Gaussian around each bin: [M, bins], [M] -> [M].

    The Gaussian is cut off at 3σ and at the first and the last bin, and sums to 1.
    """
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=log_p.device)
    neighbors = bins[:, None] + offsets
    is_inside = (neighbors >= 0) & (neighbors < log_p.shape[-1])
    weight = torch.exp(-0.5 * (offsets / sigma) ** 2) * is_inside
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return (weight * log_p.gather(-1, neighbors.clamp(0, log_p.shape[-1] - 1))).sum(-1)


def _group_by_length(attention_mask: Tensor, num_groups: int) -> Iterator[tuple[Tensor, int]]:
    """Divide texts [N, L] into groups of similar length.

    Yields the rows of each group, and the length it needs.
    """
    if num_groups <= 1:
        all_rows = torch.arange(len(attention_mask), device=attention_mask.device)
        yield all_rows, attention_mask.shape[1]
        return
    last_position = layers.compute_position_ids(attention_mask.bool()).argmax(dim=1)
    lengths = last_position + 1
    num_groups = min(num_groups, len(lengths))
    for rows in lengths.argsort(stable=True).tensor_split(num_groups):
        longest = int(lengths[rows[-1]])
        padded = -(-longest // PAD_LENGTH_TO_MULTIPLE) * PAD_LENGTH_TO_MULTIPLE
        yield rows, min(padded, attention_mask.shape[1])


def build_projector(in_width: int, out_width: int) -> nn.Module:
    """A linear layer from an encoder's width to the language model's.

    It is called `linear`, as in PaliGemma: [..., in] -> [..., out].
    """
    return nn.Sequential(OrderedDict(linear=nn.Linear(in_width, out_width)))


AutoConfig.register(SpearVLMConfig.model_type, SpearVLMConfig, exist_ok=True)
AutoModel.register(SpearVLMConfig, SpearVLMForConditionalGeneration, exist_ok=True)
