"""A published π0 or π0.5, whose weights are listed: which networks it consists of.

π0 is a PaliGemma and an action expert, with layers for states, actions and the flow time. The
configs of openpi and LeRobot do not describe these networks, so their sizes are read from the
shapes of the weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PaliGemmaConfig

from spear.errors import SpearError, summarize_error
from spear.models.weights.load import StoredCheckpoint
from spear.models.weights.name_rules import NameRules, read_name_rules

VLM_PREFIX = "vlm."
"""Beginning of our names of the weights of π0's PaliGemma."""

NUM_SIGLIP_HEADS = 16
"""Number of attention heads of SigLIP So400m, the only image encoder of openpi and LeRobot. The
shapes of the weights do not say it."""

NUM_KEY_VALUE_HEADS = 1
"""Number of key-value heads of every Gemma of openpi and LeRobot."""


@dataclass(frozen=True)
class Pi0Checkpoint:
    """A π0 or π0.5 whose weights have been listed, not read.

    checkpoint  Its weights and config.
    names       Our name of each weight -> the name in the checkpoint.
    rules       The rules that made our names.
    is_pi05     Whether it is a π0.5.
    """

    checkpoint: StoredCheckpoint
    names: Mapping[str, str]
    rules: NameRules
    is_pi05: bool

    @staticmethod
    def open(name: Path | str) -> "Pi0Checkpoint":
        """List the weights of a π0 or π0.5, given as a folder or a name on the Hub.

        Raises:
            SpearError: The checkpoint is not found, incomplete, broken, or no π0.
        """
        checkpoint = StoredCheckpoint.open(name, "π0")
        is_pi05 = any(_belongs_to_pi05(stored_name) for stored_name in checkpoint.weights)
        rules = read_name_rules("pi05" if is_pi05 else "pi0")
        names = checkpoint.map_to_stored_names(rules.renamed)
        if "expert.layers.0.self_attn.q_proj.weight" not in names:
            raise SpearError(
                f"{checkpoint.folder} contains no action expert. Give a π0 (lerobot/pi0_base)."
            )
        return Pi0Checkpoint(checkpoint, names, rules, is_pi05)

    @property
    def title(self) -> str:
        """What reports call the checkpoint."""
        return "π0.5" if self.is_pi05 else "π0"

    def map_vlm_to_stored_names(self) -> dict[str, str]:
        """Map our names of the weights of its PaliGemma, as in a SPEAR-VLM, to the stored names."""
        names = {}
        for our_name, stored_name in self.names.items():
            if our_name.startswith(VLM_PREFIX):
                names[our_name.removeprefix(VLM_PREFIX)] = stored_name
        return names

    def read_paligemma_config(self) -> Any:
        """Return the `PaliGemmaConfig` of its VLM: from its config, or else from the shapes.

        Raises:
            SpearError: The config is broken, or a weight is missing whose shape is needed.
        """
        vlm_config = self.checkpoint.config.get("vlm_config")
        if vlm_config is None:
            vlm_config = {
                "vision_config": self._make_siglip_config_from_shapes(),
                "text_config": {
                    "model_type": "gemma",
                    "vocab_size": self._num_embeddings(),
                    **self._read_gemma_sizes_from_shapes("vlm.language_model", head_dim=None),
                },
                "projection_dim": self._shape("vlm.multi_modal_projector.linear.weight")[0],
            }
        try:
            return PaliGemmaConfig.from_dict(vlm_config)
        except Exception as error:  # any kind, such as the errors of the decorator `strict`
            reason = summarize_error(error.__cause__ or error)
            file = self.checkpoint.folder / "config.json"
            raise SpearError(
                f"vlm_config in {file} is broken ({reason}). Copy it again."
            ) from error

    def read_expert_config_fields(self, head_dim: int) -> dict[str, Any]:
        """Return config fields of the expert's Gemma.

        The sizes are from the shapes of its weights. Other settings are those that the
        checkpoint's own config has. `head_dim` is that of the VLM, which the expert shares.
        """
        fields: dict[str, Any] = {}
        # Transformers' own format of π0 has the expert's config under this name.
        expert_config = self.checkpoint.config.get("dit_config") or {}
        for name in ("rms_norm_eps", "rope_parameters", "hidden_act"):
            if name in expert_config:
                fields[name] = expert_config[name]
        return {**fields, **self._read_gemma_sizes_from_shapes("expert", head_dim)}

    def _read_gemma_sizes_from_shapes(self, prefix: str, head_dim: int | None) -> dict[str, int]:
        """Read the sizes of a Gemma, whose weights' names begin with `prefix`, from the shapes.

        Without `head_dim`, the Gemma has `NUM_KEY_VALUE_HEADS`.
        """
        layer = f"{prefix}.layers.0"
        query_rows, width = self._shape(f"{layer}.self_attn.q_proj.weight")
        key_rows = self._shape(f"{layer}.self_attn.k_proj.weight")[0]
        if head_dim is None:
            head_dim = key_rows // NUM_KEY_VALUE_HEADS
        return {
            "hidden_size": width,
            "intermediate_size": self._shape(f"{layer}.mlp.gate_proj.weight")[0],
            "num_hidden_layers": self._num_layers(f"{prefix}.layers."),
            "num_attention_heads": query_rows // head_dim,
            "num_key_value_heads": key_rows // head_dim,
            "head_dim": head_dim,
        }

    def _make_siglip_config_from_shapes(self) -> dict[str, Any]:
        """Read the sizes of SigLIP from the shapes of its weights."""
        tower = "vlm.vision_tower"
        width, _, patch_px, _ = self._shape(f"{tower}.embeddings.patch_embedding.weight")
        num_patches = self._shape(f"{tower}.embeddings.position_embedding.weight")[0]
        return {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": self._shape(f"{tower}.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": self._num_layers(f"{tower}.encoder.layers."),
            "num_attention_heads": NUM_SIGLIP_HEADS,
            "patch_size": patch_px,
            "image_size": patch_px * math.isqrt(num_patches),
            "vision_use_head": False,
        }

    def _num_embeddings(self) -> int:
        """Return the number of token embeddings.

        The file may have only the output head, which is the same matrix.
        """
        embeddings = "vlm.language_model.embed_tokens.weight"
        return self._shape(embeddings if embeddings in self.names else "vlm.lm_head.weight")[0]

    def _num_layers(self, prefix: str) -> int:
        """Return the number of layers whose weights' names are `prefix`, a number, and more."""
        layer_numbers = set()
        for name in self.names:
            if name.startswith(prefix):
                layer_numbers.add(name.removeprefix(prefix).split(".")[0])
        return len(layer_numbers)

    def _shape(self, our_name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        if our_name not in self.names:
            raise SpearError(f"{self.checkpoint.folder} has no {our_name}. Copy it again.")
        return self.checkpoint.weights[self.names[our_name]].shape


def _belongs_to_pi05(stored_name: str) -> bool:
    """Return whether only a π0.5 has a weight of this name: a norm's, or the flow time's layers."""
    return ".dense." in stored_name or stored_name.removeprefix("model.").startswith("time_mlp_")
