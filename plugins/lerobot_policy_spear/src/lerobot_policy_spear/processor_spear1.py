"""LeRobot's pipelines around the policy: images are fitted, and numbers stay as they are.

The policy itself converts and normalizes states and actions, with spear's own classes, whose
statistics are saved with its weights.
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
from spear.models.weights.load import read_compatible_config
from spear.policy import locate_checkpoint
from spear.util.images import fit_image

from .configuration_spear1 import Spear1Config


@ProcessorStepRegistry.register("spear1_fit_images")
@dataclass
class FitImagesProcessorStep(ObservationProcessorStep):
    """Fits images [..., 3, h, w], float from 0 to 1 or uint8, into sizes, without stretching.

    The result is uint8.

    sizes  Image feature → [width, height].
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        """Replace the images of an observation."""
        for key, (width, height) in self.sizes.items():
            if key in observation:
                observation[key] = _fit_images(observation[key], height, width)
        return observation

    def get_config(self) -> dict[str, Any]:
        """What LeRobot saves."""
        return {"sizes": self.sizes}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Set the images' sizes in a description of the features."""
        observation = features[PipelineFeatureType.OBSERVATION]
        for key, (width, height) in self.sizes.items():
            if key in observation:
                observation[key] = PolicyFeature(observation[key].type, (3, height, width))
        return features


def _fit_images(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[..., 3, h, w] → uint8 [..., 3, height, width]."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    batch = images.reshape(-1, *images.shape[-3:]).permute(0, 2, 3, 1).cpu().numpy()
    fitted = [torch.tensor(fit_image(image, height, width)) for image in batch]
    stacked = torch.stack(fitted).permute(0, 3, 1, 2)
    return stacked.reshape(*images.shape[:-2], height, width).contiguous()


def make_spear1_pre_post_processors(
    config: Spear1Config, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Make the pipelines of a new policy; LeRobot calls this. A saved policy has its own."""
    folder = locate_checkpoint(config.checkpoint)
    model_config = read_compatible_config(Spear1ForActionPrediction, folder)
    view_sizes = Processor.load(folder, model_config.vlm_config).image_sizes
    sizes = {key: list(view_sizes[view]) for key, view in config.map_views().items()}

    defaults = make_default_policy_processor_steps(config)
    pre_steps = [
        defaults.rename_observations,
        FitImagesProcessorStep(sizes),
        defaults.add_batch_dim,
        defaults.to_device,
        defaults.normalize,
    ]
    return make_policy_processor_pipelines(pre_steps, [defaults.unnormalize, defaults.to_cpu])
