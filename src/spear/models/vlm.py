"""SPEAR-VLM: PaliGemma with a second, 3D-aware visual encoder and 1,024 tokens for 3D coordinates."""

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
from spear.models.fast.linear import linear, side_by_side, use_fast_linear

IGNORE_LABEL = -100
"""The label of a place that is not to be learned."""
PAD_LENGTH_TO_MULTIPLE, PAD_NUM_TARGETS_TO_MULTIPLE = 8, 64
"""In training, lengths of texts and counts of targets are filled up to multiples of these: tensors of ever
new sizes break the heap into pieces, and every step takes longer (`experiments/tensor_sizes`)."""


@strict
class SpearVLMConfig(layers.PortableConfig):
    """The parts of SPEAR-VLM and how it learns.

    vision_config, text_config  SigLIP's and Gemma's, or Gemma 2's, as its model_type says.
    moge_config             DINOv2's, or None for a plain PaliGemma. An extra field `stem` = "conv" in either
                            visual config swaps the patch embedding for a `ConvStem`.
    views                   camera names in the order of their tokens.
    coordinate_start        id of `<3d0000>`; the 3D tokens' ids follow each other, `coordinate_bins` of them.
    coordinate_loss_weight  λ, the weight of a 3D token in the loss (the paper: 2).
    coordinate_smoothing    standard deviation, in bins, of the Gaussian that a 3D token's target is spread
                            over; 0 is the paper's plain cross-entropy, more is our choice for small models.
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
    tie_word_embeddings: bool = False  # nothing to tie: the head reads the embedding matrix itself

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("image_sizes", None)  # of older checkpoints: `processor.json` says it
        super().__post_init__(**kwargs)
        patch = self.vision_config.patch_size
        if self.moge_config is not None and self.moge_config.patch_size != patch:
            apart = f"SigLIP patch {patch}, MoGe patch {self.moge_config.patch_size}"
            raise SpearError(
                f"encoder configs disagree: {apart}: both must cut the image into the same grid"
            )

    @property
    def coordinate_ids(self) -> range:
        """The ids of the 3D tokens."""
        return range(self.coordinate_start, self.coordinate_start + self.coordinate_bins)


@dataclass
class LossOutput(ModelOutput):
    """loss and its parts, of answers "text" and "coordinates" (mean, nats); or logits [N, L, vocabulary]."""

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """What images and text leave for later tokens.

    cache   keys and values of every layer; valid [N, S] bool: which of their places are not padding.
    hidden  [N, L, D] the last layer's output at the text positions.
    """

    cache: layers.KVCache
    valid: Tensor
    hidden: Tensor


class SpearVLMForConditionalGeneration(PreTrainedModel):
    """SPEAR-VLM (the paper, SPEAR-VLM): images and a question in, text with 3D tokens out.

    A sequence is [tokens of each view | text]. A visual token is the average of SigLIP's and MoGe's features
    of the same patch, each through its own linear projection. Scaling, masks and positions are PaliGemma's.
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
            self.moge = vision.MogeEncoder(config.moge_config)
            self.moge_projector = build_projector(
                vision.NUM_FEATURE_LAYERS * config.moge_config.hidden_size, width
            )
        self.language_model = layers.build_language_model(config.text_config)
        use_fast_linear(self)
        self.post_init()

    def encode_views(self, *views: Tensor) -> list[Tensor]:
        """Visual tokens of views: [B, 3, h, w] uint8 -> [B, patches, width] each, patches row by row."""
        features, counts = self._encode(views)
        return list(features.split(counts, dim=1))

    def _encode(self, views: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Visual tokens of all views side by side, [B, T, width], and how many each has."""
        encoders = [lambda: self.multi_modal_projector(self.vision_tower.features(views))]
        if (moge := self.moge) is not None and (onto := self.moge_projector) is not None:
            encoders.append(lambda: onto(moge(*views)))
        found = side_by_side(encoders)
        patch = self.config.vision_config.patch_size
        counts = [view.shape[2] // patch * (view.shape[3] // patch) for view in views]
        return found[0] if len(found) == 1 else 0.5 * (found[0] + found[1]), counts

    def encode_images(
        self, pixel_values: Mapping[str, Tensor], view_mask: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens [B, T, width] of all views given, in the order of `config.views`; valid [B, T] bool.

        pixel_values: view -> [B, 3, h, w] uint8. view_mask: view -> [B] bool, False for a missing image.
        Raises SpearError for a view that the model does not know, or images of a wrong type.
        """
        check_known("view", self.config.views, *pixel_values, *(view_mask or {}))
        given = [name for name in self.config.views if name in pixel_values]
        for name in given:
            vision.check_pixels(name, pixel_values[name], self.config.vision_config.patch_size)
        if not given:
            raise SpearError(
                f"no images: pass at least one of the views {', '.join(self.config.views)}"
            )
        features, counts = self._encode([pixel_values[name] for name in given])
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        for name, part in zip(given, valid.split(counts, dim=1), strict=True):
            if view_mask is not None and name in view_mask:
                part.copy_(view_mask[name][:, None])
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
        """Visual tokens (of `encode_images`, one row per text) and text through the language model."""
        text = self.embed_text(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        valid = torch.cat([image_valid, attention_mask.bool()], dim=1)
        causal = torch.cat([torch.zeros_like(image_valid), token_type_ids.bool()], dim=1)
        cache, mask = layers.KVCache(), layers.make_prefix_lm_mask(valid, causal)
        output = self.language_model(
            inputs_embeds=torch.cat([features.to(text.dtype), text], dim=1),
            attention_mask=layers.prepare_mask(self.language_model, mask, text.dtype),
            position_ids=layers.compute_position_ids(valid),
            use_cache=False,
            **{layers.CACHE_ARGUMENT: cache if keep_cache else None},
        )
        return Prefix(cache, valid, output.last_hidden_state[:, features.shape[1] :])

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embeddings of tokens [..., width]; float32 under autocast, even if they are kept in bfloat16."""
        text = self.language_model.embed_tokens(input_ids)
        return text.float() if torch.is_autocast_enabled(text.device.type) else text

    def compute_logits(self, hidden: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Logits of the tokens first … last − 1, by the embedding matrix. [..., D] -> [..., tokens]."""
        logits = linear(hidden, self.language_model.embed_tokens.weight[first:last])
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma 2's
        return logits if cap is None else cap * (logits / cap).tanh()

    def token_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts (see `token_loss`) of tokens [M], read off `hidden` [M, D]."""
        c, logits = self.config, self.compute_logits(hidden)
        return token_loss(
            logits, labels, c.coordinate_ids, c.coordinate_loss_weight, c.coordinate_smoothing
        )

    def forward(
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
        """The loss where `labels` are given, else the logits.

        pixel_values    view -> [B, 3, h, w] uint8.
        input_ids       [N, L] text, padded on either side; attention_mask [N, L], 0 on padding.
        token_type_ids  [N, L] 0 prompt (attends both ways, with the images), 1 answer (causal); None: 1 at
                        the `labels`.
        image_index     [N] the image in 0 … B−1 that each text belongs to; None: one text per image.
        labels          [N, L] the token that stands at each place, −100 where it is not to be learned. Only
                        the places that have one go through the head.
        length_groups   with `labels`: the texts run in so many groups of similar length, to save padding.
        """
        features, image_valid = self.encode_images(pixel_values, view_mask)
        if image_index is None:
            image_index = torch.arange(len(features), device=features.device)
        if labels is None:
            own = features[image_index], image_valid[image_index]
            state = self.run_language_model(*own, input_ids, attention_mask, token_type_ids)
            return LossOutput(logits=self.compute_logits(state.hidden))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kinds = (labels != IGNORE_LABEL) if token_type_ids is None else token_type_ids
        hidden, targets = [], []
        for rows, length in _by_length(mask, length_groups):
            own = features[image_index[rows]], image_valid[image_index[rows]]
            ids, valid, kind = (part[rows, :length] for part in (input_ids, mask, kinds))
            state = self.run_language_model(*own, ids, valid, kind, keep_cache=False)
            target = labels[rows, 1:length]
            wanted = target != IGNORE_LABEL
            hidden.append(state.hidden[:, :-1][wanted])
            targets.append(target[wanted])
        read, target = torch.cat(hidden), torch.cat(targets)
        more = -len(target) % PAD_NUM_TARGETS_TO_MULTIPLE
        read, target = F.pad(read, (0, 0, 0, more)), F.pad(target, (0, more), value=IGNORE_LABEL)
        loss, parts = self.token_loss(read, target)
        return LossOutput(loss=loss, parts=parts)


def token_loss(
    logits: Tensor, labels: Tensor, coordinates: range, weight: float, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted mean cross-entropy, Σ wᵢ·lossᵢ / Σ wᵢ (our choice), w = λ on 3D tokens (the paper), else 1.

    logits [M, vocabulary], labels [M], `IGNORE` where there is none. coordinates: the ids of the 3D tokens;
    weight: λ; smoothing: the standard deviation, in bins, of the Gaussian that is a 3D token's target.
    Returns the loss and the plain means over "text" and "coordinates".
    """
    log_p, known = logits.float().log_softmax(-1), labels != IGNORE_LABEL
    is_coordinate = (labels >= coordinates.start) & (labels < coordinates.stop)
    score = log_p.gather(-1, labels[:, None].clamp_min(0))[:, 0]
    if smoothing > 0:
        of_coordinates = log_p[:, coordinates.start : coordinates.stop]
        smooth = _smoothed_score(of_coordinates, labels - coordinates.start, smoothing)
        score = torch.where(is_coordinate, smooth, score)
    losses = -score
    coordinate = is_coordinate.float()
    text = known.float() - coordinate
    weights = text + weight * coordinate
    loss = (weights * losses).sum() / weights.sum().clamp_min(1e-6)
    means = (
        (losses.detach() * part).sum() / part.sum().clamp_min(1) for part in (text, coordinate)
    )
    return loss, dict(zip(("text", "coordinates"), means, strict=True))


def _smoothed_score(log_p: Tensor, bins: Tensor, sigma: float) -> Tensor:
    """Expected log probability under a Gaussian cut off at 3σ and at the ends. [M, bins], [M] -> [M]."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=log_p.device)
    near = bins[:, None] + offsets
    inside = (near >= 0) & (near < log_p.shape[-1])
    weight = torch.exp(-0.5 * (offsets / sigma) ** 2) * inside
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return (weight * log_p.gather(-1, near.clamp(0, log_p.shape[-1] - 1))).sum(-1)


def _by_length(attention_mask: Tensor, groups: int) -> Iterator[tuple[Tensor, int]]:
    """Texts [N, L] in `groups` groups of similar length: their rows, and to where they are needed."""
    if groups <= 1:
        yield (
            torch.arange(len(attention_mask), device=attention_mask.device),
            attention_mask.shape[1],
        )
        return
    lengths = (
        layers.compute_position_ids(attention_mask.bool()).argmax(dim=1) + 1
    )  # up to the last token
    for rows in lengths.argsort(stable=True).tensor_split(min(groups, len(lengths))):
        longest = -(-int(lengths[rows[-1]]) // PAD_LENGTH_TO_MULTIPLE) * PAD_LENGTH_TO_MULTIPLE
        yield rows, min(longest, attention_mask.shape[1])


def build_projector(width: int, out: int) -> nn.Module:
    """One layer, `linear`, from an encoder's width to the language model's: [..., width] -> [..., out]."""
    return nn.Sequential(OrderedDict(linear=nn.Linear(width, out)))


AutoConfig.register(SpearVLMConfig.model_type, SpearVLMConfig, exist_ok=True)
AutoModel.register(SpearVLMConfig, SpearVLMForConditionalGeneration, exist_ok=True)
