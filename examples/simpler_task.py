r"""Your own task in ManiSkill, in one file: scene, instruction, success, demonstrations.

    spear label simpler:10000-10255 --out runs/simpler-labels
    python examples/simpler_task.py record 100 runs/mine
    spear train nano-simpler --init nano --episodes runs/mine/* \
        --labels runs/simpler-labels --out runs/vla
    python examples/simpler_task.py evaluate 24 runs/vla

The scene consists of SIMPLER's own models, on its own table. docs/howto/simpler.md says what to
change for others. If you change the scene, record it into a new folder: nothing notices the change.
"""

import sys
from pathlib import Path

import numpy as np
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv
from mani_skill.utils.registration import register_env

from spear.evaluate.agents import load_agent
from spear.evaluate.options import SimplerOptions
from spear.evaluate.simpler.record import record_demonstrations
from spear.evaluate.simpler.run import OracleAgent, evaluate_simpler
from spear.evaluate.simpler.tasks import TASKS, Task
from spear.util.held_out import FIRST_TRAIN_SEED

NAME = "PutSpoonOnPlate-v1"
SPOON = "bridge_spoon_generated_modified"
PLATE = "bridge_plate_objaverse_larger"
SPOON_HEIGHT_M = 0.88
PLATE_HEIGHT_M = 0.87
CORNERS_M = [(-0.235, -0.075), (-0.235, 0.075), (-0.085, -0.075), (-0.085, 0.075)]
UPRIGHT = [1, 0, 0, 0]
ACROSS = [0.5**0.5, 0, 0, 0.5**0.5]


@register_env(NAME, asset_download_ids=["bridge_v2_real2sim"])
class PutSpoonOnPlate(BaseBridgeEnv):
    """The first object is the one to move, and the second is where it goes; others may follow."""

    objects_excluded_from_greenscreening = (SPOON, PLATE)  # they stand in front of the photograph

    def __init__(self, **kwargs):
        # The official starts are all pairs of positions with all pairs of orientations. Evaluation
        # takes them in this order.
        positions = []
        for spoon_corner in CORNERS_M:
            for plate_corner in CORNERS_M:
                if spoon_corner != plate_corner:
                    spoon_position = (*spoon_corner, SPOON_HEIGHT_M)
                    plate_position = (*plate_corner, PLATE_HEIGHT_M)
                    positions.append([spoon_position, plate_position])
        orientations = [[UPRIGHT, UPRIGHT], [ACROSS, UPRIGHT]]
        super().__init__([SPOON, PLATE], np.array(positions), np.array(orientations), **kwargs)

    def get_language_instruction(self, **kwargs):
        return ["put the spoon on the plate"]

    def evaluate(self):
        return self._evaluate(success_require_src_completely_on_target=True)


TASKS[NAME] = Task(
    num_starts=24,  # 12 pairs of positions, each with 2 pairs of orientations
    max_steps=60,
    num_grasp_directions=2,  # the scripted expert takes a spoon in either direction …
    grasp_offset_m=0.03,  # … this far along its length
    max_offset_m=(0.1, 0.1),  # starts off the grid are this near its middle …
    min_distance_m=0.12,  # … and objects this far from each other
)


def record(num_episodes: int, folder: str) -> None:
    """Record demonstrations by the scripted expert."""
    seeds = range(FIRST_TRAIN_SEED, FIRST_TRAIN_SEED + num_episodes)
    counts = record_demonstrations(Path(folder), [NAME], seeds, height=128)
    for num_recorded, num_tried in counts.values():
        print(f"demonstrations that succeeded, in {folder}: {num_recorded} of {num_tried}")


def evaluate(num_scenes: int, policy: str) -> None:
    """Evaluate a policy, or the scripted expert if its name is "oracle"."""
    agent = OracleAgent() if policy == "oracle" else load_agent(policy)
    results, _ = evaluate_simpler(agent, SimplerOptions(num_scenes=num_scenes, tasks=(NAME,)))
    num_succeeded = sum(outcome.success for outcome in results.outcomes)
    print(f"{num_succeeded} of {len(results.outcomes)} succeeded")


if __name__ == "__main__":
    command, count, argument = sys.argv[1:]
    if command == "record":
        record(int(count), argument)
    else:
        evaluate(int(count), argument)
