"""The published networks that are read: where they are, and the tensors that their files must hold."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.models.presets import build_spear1_config, build_vlm_config, get_preset


@dataclass(frozen=True)
class Published:
    """A network on the Hugging Face Hub: the fields of `published.toml`, which explains them."""

    repository: str
    revision: str
    files: str
    kind: str
    config: Mapping[str, Any]
    names: list[tuple[str, str]] = field(default_factory=list)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)

    def build(self) -> Any:
        """The network that its weights go into, on the meta device: shapes without numbers."""
        import torch
        import transformers

        from spear.models.moge import networks
        from spear.models.spear1 import Spear1ForActionPrediction
        from spear.models.vlm import SpearVLMForConditionalGeneration

        size = get_preset("spear1")
        with torch.device("meta"):
            if self.kind.startswith("Moge"):
                return getattr(networks, self.kind)(self.config)
            if self.kind == "Pi0":
                policy = Spear1ForActionPrediction(build_spear1_config(size))
                del policy.vlm
                return policy
            if self.kind == "PaliGemma":
                inner = build_vlm_config(size)
                inner.moge_config, inner.text_config = (
                    None,
                    transformers.AutoConfig.for_model(**self.config),
                )
                return SpearVLMForConditionalGeneration(inner)
            kind: Any = getattr(transformers, self.kind)
            return kind(kind.config_class(**self.config))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that are read of its files, by their names there. What else they hold is left out."""
        from spear.models.moge.checkpoint import get_published_shapes
        from spear.models.weights.load import rename_prefixes

        network = self.build()
        if self.kind.startswith("Moge"):
            return get_published_shapes(network, int(self.kind[-1]))
        found = {
            rename_prefixes(ours, self.names): weight
            for ours, weight in network.state_dict().items()
        }
        return {name: tuple(self.shapes.get(name, weight.shape)) for name, weight in found.items()}


_FILE = Path(__file__).with_suffix(".toml")
PUBLISHED = {
    name: Published(**fields) for name, fields in tomllib.loads(_FILE.read_text("utf-8")).items()
}
"""By the names that `spear convert expected` and the labeller's options take."""
