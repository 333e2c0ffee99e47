"""A task of your own in ManiSkill, as one file: scene, instruction, success, demonstrations, evaluation.

    spear label simpler:10000-10255 --out runs/simpler-labels
    python examples/simpler_task.py record 100 runs/mine
    spear train nano-simpler --init nano --episodes runs/mine/* --labels runs/simpler-labels --out runs/vla
    python examples/simpler_task.py evaluate 24 runs/vla

Its scene is made of SIMPLER's own models, on its own table. docs/simpler.md says what to change for others.
Nothing notices a changed scene: record it into a new folder.
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
SPOON, PLATE = "bridge_spoon_generated_modified", "bridge_plate_objaverse_larger"


@register_env(NAME, asset_download_ids=["bridge_v2_real2sim"])
class PutSpoonOnPlate(BaseBridgeEnv):
    """The first object is the one to move, the second is where it goes; others may follow."""

    objects_excluded_from_greenscreening = (SPOON, PLATE)  # what is seen in front of the photograph

    def __init__(self, **kwargs):
        # Official starts: every pair of places with every pair of turns. Evaluation takes them in this order.
        corners = [(-0.235, -0.075), (-0.235, 0.075), (-0.085, -0.075), (-0.085, 0.075)]
        places = [[(*a, 0.88), (*b, 0.87)] for a in corners for b in corners if a != b]
        upright, across = [1, 0, 0, 0], [0.5**0.5, 0, 0, 0.5**0.5]
        turns = [[upright, upright], [across, upright]]
        super().__init__([SPOON, PLATE], np.array(places), np.array(turns), **kwargs)

    def get_language_instruction(self, **kwargs):
        return ["put the spoon on the plate"]

    def evaluate(self):
        return self._evaluate(success_require_src_completely_on_target=True)


# 24 official starts, 60 steps. The script that demonstrates takes a spoon in either direction (2), 3 cm along
# its length. Starts off the grid lie within 10 cm of its middle, and 12 cm from each other.
TASKS[NAME] = Task(
    num_starts=24,
    max_steps=60,
    num_grasp_directions=2,
    grasp_offset_m=0.03,
    max_offset_m=(0.1, 0.1),
    min_distance_m=0.12,
)


def main(what: str, count: int, where: str) -> None:
    if what == "record":
        ((written, tried),) = record_demonstrations(
            Path(where), [NAME], range(FIRST_TRAIN_SEED, FIRST_TRAIN_SEED + count), height=128
        ).values()
        print(f"demonstrations that succeeded, in {where}: {written} of {tried}")
    else:
        agent = OracleAgent() if where == "oracle" else load_agent(where)
        results, _ = evaluate_simpler(agent, SimplerOptions(scenes=count, tasks=(NAME,)))
        print(f"{sum(o.success for o in results.outcomes)} of {len(results.outcomes)} succeeded")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
