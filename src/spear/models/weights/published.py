"""The published networks that this package can read: where they are on the Hub, and the tensors
that their files must contain."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.models.presets import build_spear1_config, build_vlm_config, get_preset


@dataclass(frozen=True)
class Published:
    """A network on the Hugging Face Hub, from `published.toml`.

    repository  Its name on the Hub.
    revision    The commit of the repository.
    files       Names of the files that are read, separated by commas, for people.
    kind        The class that `build` makes: "MogeV1" or "MogeV2" (ours), "Pi0" or "PaliGemma"
                (parts of a SPEAR-1), or the name of a class of Transformers.
    config      The sizes of the network, in the form that its class takes.
    names       Rules (our prefix, the files' prefix), which turn our names into those in the files.
    shapes      Name in the files -> shape, of the tensors whose shapes differ from ours.
    """

    repository: str
    revision: str
    files: str
    kind: str
    config: Mapping[str, Any]
    names: list[tuple[str, str]] = field(default_factory=list)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)

    def build(self) -> Any:
        """Build the network for these weights on the meta device, where tensors have no values."""
        import torch
        import transformers

        from spear.models.moge import networks
        from spear.models.spear1 import Spear1ForActionPrediction
        from spear.models.vlm import SpearVLMForConditionalGeneration

        preset = get_preset("spear1")
        with torch.device("meta"):
            if self.kind.startswith("Moge"):
                return getattr(networks, self.kind)(self.config)
            if self.kind == "Pi0":
                vlm_config = build_vlm_config(preset, self.config["vocab_size"])
                vlm_config.moge_config = None
                return Spear1ForActionPrediction(build_spear1_config(preset, vlm_config))
            if self.kind == "PaliGemma":
                config = build_vlm_config(preset)
                config.moge_config = None
                config.text_config = transformers.AutoConfig.for_model(**self.config)
                return SpearVLMForConditionalGeneration(config)
            network_class: Any = getattr(transformers, self.kind)
            return network_class(network_class.config_class(**self.config))

    def list_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this package reads from the files: name in the files -> shape.

        The files may contain other tensors, too.
        """
        from spear.models.moge.checkpoint import compute_published_shapes
        from spear.models.weights.load import rename_prefixes

        network = self.build()
        if self.kind.startswith("Moge"):
            version = int(self.kind[-1])  # of "MogeV1" or "MogeV2"
            return compute_published_shapes(network, version)
        tensors = {}
        for our_name, weight in network.state_dict().items():
            name = rename_prefixes(our_name, self.names)
            tensors[name] = tuple(self.shapes.get(name, weight.shape))
        return tensors


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
PUBLISHED = {name: Published(**fields) for name, fields in _TABLES.items()}
"""The networks, by the names that `spear convert expected` and the labeler's options accept."""
