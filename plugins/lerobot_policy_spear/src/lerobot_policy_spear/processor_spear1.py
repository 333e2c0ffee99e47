"""LeRobot's pipelines around the policy: images to SPEAR-1's sizes, nothing stretched; no numbers changed.

States and actions are turned and normalised inside the policy, by spear's own classes, whose statistics lie
with its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.processor import (
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RobotObservation,
)
from lerobot.processor.factory import (
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from spear.models.processing import Processor
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.load import check_checkpoint
from spear.policy import locate
from spear.util.images import fit_image

from .configuration_spear1 import Spear1Config


@ProcessorStepRegistry.register("spear1_fit_images")
@dataclass
class FitImagesProcessorStep(ObservationProcessorStep):
    """Images [..., 3, h, w], float 0 … 1 or uint8, as uint8 of `sizes`: feature → [width, height]."""

    sizes: dict[str, list[int]] = field(default_factory=dict)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        """Only the images change."""
        for key, (width, height) in self.sizes.items():
            if key in observation:
                observation[key] = _fitted(observation[key], height, width)
        return observation

    def get_config(self) -> dict[str, Any]:
        """What LeRobot saves."""
        return {"sizes": self.sizes}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """The images' sizes."""
        own = features[PipelineFeatureType.OBSERVATION]
        for key, (width, height) in self.sizes.items():
            if key in own:
                own[key] = PolicyFeature(own[key].type, (3, height, width))
        return features


def _fitted(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    rows = images.reshape(-1, *images.shape[-3:]).permute(0, 2, 3, 1).cpu().numpy()
    fitted = torch.stack([torch.tensor(fit_image(row, height, width)) for row in rows]).permute(
        0, 3, 1, 2
    )
    return fitted.reshape(*images.shape[:-2], height, width).contiguous()


def make_spear1_pre_post_processors(
    config: Spear1Config, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """What LeRobot calls for a new policy; a saved one brings its own."""
    folder = locate(config.checkpoint)
    sizes = Processor.load(
        folder, check_checkpoint(Spear1ForActionPrediction, folder).vlm_config
    ).image_sizes
    fit = FitImagesProcessorStep({key: list(sizes[view]) for key, view in config.views().items()})
    usual = make_default_policy_processor_steps(config)
    before = [usual.rename_observations, fit, usual.add_batch_dim, usual.to_device, usual.normalize]
    return make_policy_processor_pipelines(before, [usual.unnormalize, usual.to_cpu])
