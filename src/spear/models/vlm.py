"""SPEAR-VLM: PaliGemma with a second, 3D-aware visual encoder and 1,024 3D tokens.

In the shapes, B is the number of observations (each with an image per view), and N the number of
texts. Several texts may belong to one observation. T is the number of visual tokens per
observation, L the number of tokens per text, and S = T + L.
"""

import math
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
from spear.models.fast.linear import linear, run_in_parallel_if_capturing, use_fast_linear

IGNORE_LABEL = -100
"""The label of a token that is not to be learned (PyTorch's default for cross-entropy)."""

# If tensors have a new size in each training step, they fragment the heap, and every step takes
# longer (measured by `python -m experiments.tensor_sizes`). Therefore training pads sizes to
# multiples of these numbers.
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
    coordinate_smoothing    Standard deviation, in bins, of a Gaussian around the right bin, which
                            is the target of a 3D token. 0 is the paper's plain cross-entropy. Other
                            values help small models.
    initializer_range       Standard deviation of initial weights, where no other rule applies.
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
    # Logits are computed with the embedding matrix itself, so there is no second matrix to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # The configs of older checkpoints have this key; now it is in `processor.json`.
        kwargs.pop("image_sizes", None)
        super().__post_init__(**kwargs)
        patch = self.vision_config.patch_size
        if self.moge_config is not None and self.moge_config.patch_size != patch:
            raise SpearError(
                f"the patch of SigLIP is {patch}, that of MoGe {self.moge_config.patch_size}. "
                "Give both the same, because both must cut the image into one grid."
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
    """The result of running images and texts through the language model.

    Further tokens attend to it, such as the action expert's.

    cache   Keys and values of every layer.
    valid   [N, S] bool, False for padding and missing images.
    hidden  [N, L, D] output of the last layer at the text positions.
    """

    cache: layers.KVCache
    valid: Tensor
    hidden: Tensor


class SpearVLMForConditionalGeneration(PreTrainedModel):
    """SPEAR-VLM: images and a question in, text with 3D tokens out (the paper, "SPEAR-VLM").

    A sequence consists of the visual tokens of each view, then the text. A visual token stands for
    a patch of an image. It is the average of SigLIP's and MoGe's features of that patch, each after
    its own linear projection. Scaling, masks and positions are PaliGemma's.
    """

    config: SpearVLMConfig
    base_model_prefix = "vlm"
    _supports_sdpa = True

    def __init__(self, config: SpearVLMConfig) -> None:
        super().__init__(layers.set_default_attention(config))
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
        """Visual tokens of each view: [B, 3, h, w] uint8 -> [B, patches, width].

        The patches are in row-major order.
        """
        features, num_tokens = self._encode_and_join_views(views)
        return list(features.split(num_tokens, dim=1))

    def _encode_and_join_views(self, views: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Visual tokens of all views, concatenated [B, T, width], and their number per view.

        On a GPU the two encoders may run side by side (`run_in_parallel_if_capturing`).
        """
        moge = self.moge
        moge_projector = self.moge_projector
        encoders = [lambda: self.multi_modal_projector(self.vision_tower.compute_features(views))]
        if moge is not None and moge_projector is not None:
            encoders.append(lambda: moge_projector(moge(*views)))
        projected = run_in_parallel_if_capturing(encoders)
        features = projected[0]
        if len(projected) > 1:
            features = 0.5 * (projected[0] + projected[1])

        patch = self.config.vision_config.patch_size
        num_tokens = []
        for view in views:
            height, width = view.shape[2:]
            num_tokens.append((height // patch) * (width // patch))
        return features, num_tokens

    def encode_images(
        self, pixel_values: Mapping[str, Tensor], view_mask: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode all views of an observation, in the order of `config.views`.

        Args:
            pixel_values: View -> [B, 3, h, w] uint8.
            view_mask: View -> [B] bool, False for a missing image. None, or a view without a mask,
                means that no image is missing.

        Returns:
            The visual tokens [B, T, width], and [B, T] bool, False for the tokens of missing
            images.

        Raises:
            SpearError: The model does not know a view, images have a wrong type or size, or there
                is no view at all.
        """
        check_known("view", self.config.views, *pixel_values, *(view_mask or {}))
        views = [name for name in self.config.views if name in pixel_values]
        for name in views:
            vision.check_pixels(name, pixel_values[name], self.config.vision_config.patch_size)
        if not views:
            known_views = ", ".join(self.config.views)
            raise SpearError(f"there are no images. Pass at least one of the views {known_views}.")

        features, num_tokens = self._encode_and_join_views([pixel_values[name] for name in views])
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        # The parts of `valid` are views of its memory, so copying to them changes `valid`.
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
        """Run visual tokens and texts through the language model.

        Args:
            features: [N, T, width], the visual tokens of each text's images.
            image_valid: [N, T] bool, False for missing images.
            input_ids: [N, L].
            attention_mask: [N, L], 0 on padding. None if there is no padding.
            token_type_ids: [N, L], 1 on the answer, which is causal. None if there is no answer.
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
            attention_mask=layers.convert_mask_for_attention(self.language_model, mask, text.dtype),
            position_ids=layers.compute_position_ids(valid),
            use_cache=False,  # Transformers creates no cache; ours is passed in the next argument
            **{layers.CACHE_ARGUMENT: cache if keep_cache else None},
        )
        num_visual_tokens = features.shape[1]
        return Prefix(cache, valid, output.last_hidden_state[:, num_visual_tokens:])

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Token embeddings of ids [...]: [..., width].

        Under autocast the embeddings are float32, even if the weights are bfloat16.
        """
        text = self.language_model.embed_tokens(input_ids)
        return text.float() if torch.is_autocast_enabled(text.device.type) else text

    def compute_logits(
        self, hidden: Tensor, first_id: int = 0, end_id: int | None = None
    ) -> Tensor:
        """Logits of the tokens from `first_id` to `end_id` - 1: [..., D] -> [..., tokens].

        The logit of a token is the product of the hidden state and the token's embedding.
        """
        logits = linear(hidden, self.language_model.embed_tokens.weight[first_id:end_id])
        # Only Gemma 2 has a softcap.
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is None:
            return logits
        return softcap * (logits / softcap).tanh()

    def compute_aligned_token_loss(
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
            attention_mask: [N, L], 0 on padding. None if there is no padding.
            token_type_ids: [N, L], 0 on the prompt, which sees itself and the images in both
                directions, and 1 on the answer, which is causal. By default the answer is the
                tokens that have a label.
            image_index: [N] the observation in 0 … B - 1 that each text belongs to. By default,
                text i belongs to observation i.
            labels: [N, L] the token at the same position of `input_ids`, or `IGNORE_LABEL` if this
                token is not to be learned. Logits are computed only to predict learned tokens.
            view_mask: View -> [B] bool, False for a missing image.
            length_groups: The number of groups of similar length in which texts with labels run
                through the language model. More groups need less padding.
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
            # The hidden state of a position predicts the token at the next position.
            next_labels = labels[rows, 1:length]
            is_learned = next_labels != IGNORE_LABEL
            hidden_per_group.append(prefix.hidden[:, :-1][is_learned])
            targets_per_group.append(next_labels[is_learned])

        hidden = torch.cat(hidden_per_group)  # [learned tokens, D]
        targets = torch.cat(targets_per_group)  # [learned tokens]
        # Append rows up to the next multiple. These rows have no label, so they do not count.
        num_padding = -len(targets) % PAD_NUM_TARGETS_TO_MULTIPLE
        hidden = F.pad(hidden, (0, 0, 0, num_padding))
        targets = F.pad(targets, (0, num_padding), value=IGNORE_LABEL)
        loss, parts = self.compute_aligned_token_loss(hidden, targets)
        return LossOutput(loss=loss, parts=parts)


def compute_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    coordinate_ids: range,
    coordinate_weight: float,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted mean cross-entropy over M tokens, Σ wᵢ·lossᵢ / Σ wᵢ.

    The weight w is λ for 3D tokens (the paper) and 1 for text.

    Args:
        logits: [M, vocabulary].
        labels: [M], the right tokens. Tokens with `IGNORE_LABEL` do not count.
        coordinate_ids: The ids of the 3D tokens.
        coordinate_weight: λ.
        smoothing: Standard deviation, in bins, of the Gaussian that is the target of a 3D token.
            With 0, the target is the right bin alone.

    Returns:
        The loss, and the unweighted mean losses of text tokens ("text") and of 3D tokens
        ("coordinates").
    """
    log_p = logits.float().log_softmax(-1)
    has_label = labels != IGNORE_LABEL
    is_coordinate = (labels >= coordinate_ids.start) & (labels < coordinate_ids.stop)

    # `IGNORE_LABEL` is no index, so it becomes 0 here; its weight is 0 below.
    index = labels[:, None].clamp_min(0)
    label_log_p = log_p.gather(-1, index)[:, 0]  # [M]
    if smoothing > 0:
        coordinate_log_p = log_p[:, coordinate_ids.start : coordinate_ids.stop]
        bins = labels - coordinate_ids.start
        smoothed_log_p = _compute_expected_log_probability(coordinate_log_p, bins, smoothing)
        label_log_p = torch.where(is_coordinate, smoothed_log_p, label_log_p)
    losses = -label_log_p

    coordinate_mask = is_coordinate.float()
    text_mask = has_label.float() - coordinate_mask
    weights = text_mask + coordinate_weight * coordinate_mask
    loss = (weights * losses).sum() / weights.sum().clamp_min(1e-6)
    parts = {
        "text": _compute_masked_mean(losses.detach(), text_mask),
        "coordinates": _compute_masked_mean(losses.detach(), coordinate_mask),
    }
    return loss, parts


def _compute_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values whose mask is 1, or 0 if there are none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _compute_expected_log_probability(log_p: Tensor, bins: Tensor, sigma: float) -> Tensor:
    """The expected log probability of a bin that is drawn from a Gaussian around the right bin.

    The Gaussian is cut off at 3σ and at the first and the last bin, and sums to 1.

    Args:
        log_p: [M, bins], log probabilities of all bins.
        bins: [M], the right bins. The result is meaningless for rows whose token is no 3D token.
        sigma: σ, in bins.

    Returns:
        [M].
    """
    num_bins = log_p.shape[-1]
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=log_p.device)
    neighbors = bins[:, None] + offsets  # [M, 2 · reach + 1]
    is_inside = (neighbors >= 0) & (neighbors < num_bins)
    weight = torch.exp(-0.5 * (offsets / sigma) ** 2) * is_inside
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    neighbor_log_p = log_p.gather(-1, neighbors.clamp(0, num_bins - 1))
    return (weight * neighbor_log_p).sum(-1)


def _group_by_length(attention_mask: Tensor, num_groups: int) -> Iterator[tuple[Tensor, int]]:
    """Divide texts into groups of similar length, given their mask [N, L].

    Yields, for each group, the indices of its texts and the number of columns that they need.
    """
    if num_groups <= 1:
        all_rows = torch.arange(len(attention_mask), device=attention_mask.device)
        yield all_rows, attention_mask.shape[1]
        return
    # Padding after a text has the position of the text's last token, and `argmax` returns the
    # first column with the largest position.
    last_column = layers.compute_position_ids(attention_mask.bool()).argmax(dim=1)
    lengths = last_column + 1
    num_groups = min(num_groups, len(lengths))
    for rows in lengths.argsort(stable=True).tensor_split(num_groups):
        max_length = int(lengths[rows[-1]])
        rounded_up = math.ceil(max_length / PAD_LENGTH_TO_MULTIPLE) * PAD_LENGTH_TO_MULTIPLE
        yield rows, min(rounded_up, attention_mask.shape[1])


def build_projector(in_width: int, out_width: int) -> nn.Module:
    """A linear layer from an encoder's width to the language model's, [..., in] -> [..., out].

    The layer's name is `linear`, so that PaliGemma's weights have the same names.
    """
    return nn.Sequential(OrderedDict(linear=nn.Linear(in_width, out_width)))


AutoConfig.register(SpearVLMConfig.model_type, SpearVLMConfig, exist_ok=True)
AutoModel.register(SpearVLMConfig, SpearVLMForConditionalGeneration, exist_ok=True)
