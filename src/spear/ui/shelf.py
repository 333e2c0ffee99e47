"""The folder that `spear serve --episodes` names: recorded episodes, or the results of an evaluation.

Results hold how each episode ended, and few films. But the scene's seed fixes all of an episode, the policy's
noise too: an episode is run again, where the same weights are served.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.store.episode_store import EpisodeStore, is_store
from spear.errors import SpearError
from spear.evaluate import results
from spear.evaluate.agents import identity
from spear.policy import Spear1Policy
from spear.sim.render import Renderer
from spear.types import Array
from spear.ui.scenes import Recording, Scene, whole
from spear.util.images import decode_image

MOST_LISTED = 500
"""Episodes that the page offers (our choice): of more, the first; an evaluation's failures come first."""
SAID = {True: "success · ", False: "failure · ", None: ""}


class Shelf:
    """What a folder holds. dataset: whose units the policy uses (`Spear1Policy.load`).

    Raises `SpearError` for a folder of something else.
    """

    def __init__(self, folder: Path, dataset: str | None = None) -> None:
        self._dataset, self._weights = dataset, ""
        self._held: EpisodeStore | Sequence[results.Outcome]
        self._settings: dict[str, Any] | None = None
        if is_store(folder):
            self._held = store = EpisodeStore(folder)
            first = [store.without_images(i) for i in range(min(len(store), MOST_LISTED))]
            self._titles = [f"{i} · {SAID[e.success]}{e.instruction[:80]}" for i, e in enumerate(first)]
        elif results.journals(folder) or (folder / "results.json").is_file():
            found = results.load(folder)
            self._policy, self._settings = found.policy, found.settings
            self._held = sorted(found.outcomes, key=lambda o: o.success)
            some = self._held[:MOST_LISTED]
            self._titles = [f"{SAID[o.success]}{o.family.replace('_', ' ')} {o.seed}" for o in some]
        else:
            what = "recorded episodes (of spear record, or prepared ones) or results of spear evaluate --out"
            raise SpearError(f"--episodes {folder}: holds neither {what}")
        self.about = {"episodes": self._titles, "episodes_in_all": len(self._held)}

    def open(self, index: object, policy: Spear1Policy, renderer: Renderer) -> Scene | Recording:
        """An episode, to be looked at. Raises `SpearError` for one that cannot be."""
        number, held = whole("episode", index, len(self._titles) - 1), self._held
        if isinstance(held, EpisodeStore):
            return _recorded(held, number)
        assert self._settings is not None
        outcome, dtype = held[number], next(policy.model.parameters()).dtype
        if policy.folder and not self._weights:
            self._weights = identity(policy.folder, dtype, self._dataset)
        same = self._settings.get("weights") == self._weights and policy.steps == Spear1Policy.steps
        if not same or "execution" not in self._settings:
            raise SpearError(
                f"{outcome.film_name}: only with the policy that made it can it be run again: serve "
                f"{self._policy}, with its --dtype and --dataset and without --steps (SIMPLER: see its films)"
            )
        return Scene(outcome.family, outcome.seed, policy, renderer, (self._settings, outcome))


def _recorded(store: EpisodeStore, index: int) -> Recording:
    e = store.without_images(index)

    def picture(step: int, camera: str) -> Array | None:
        data = store.image(index, step, camera)
        return None if data is None else decode_image(data, f"{e.source} step {step}")

    states = np.concatenate([e.position, e.rotation, e.gripper[:, None]], 1).astype(np.float32)
    about = f"episode-{index}", picture, states, e.instruction, e.rate_hz, e.success
    return Recording("recording", *about)
