"""docs/finetune.md as a new user follows it: a LeRobot folder, four commands, a policy that answers over a
socket."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from spear.cli import main
from spear.data.readers.formats import read_episodes
from spear.evaluate.open_loop import observations
from spear.serve.client import RemotePolicy

QUICK = ["--steps", "2", "--set", "batch_size=4", "flow_samples=1", "warmup=1"]


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory, renderer: object) -> Path:
    """The simulator, recorded as a LeRobot v3.0 dataset: `my_robot`."""
    root = tmp_path_factory.mktemp("robot")
    words = ["--episodes", "3", "--families", "put_on", "--workers", "1"]
    assert main(["record", "--out", str(root / "episodes"), *words]) == 0
    assert main(["data", "export", str(root / "episodes"), "--out", str(root / "my_robot")]) == 0
    return root / "my_robot"


@contextmanager
def served(*words: str) -> Iterator[str]:
    """The address of `spear serve`, run as a user runs it."""
    code = "import sys; from spear.cli import main; sys.exit(main())"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *words, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r"ws://\S+", said)
        assert found, said
        yield found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_from_a_dataset_to_a_served_policy_in_four_commands(
    robot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned, held_out, out = "train[:2]", "train[2:]", str(tmp_path / "mine")
    assert main(["data", "audit", str(robot)]) == 0
    assert "WRONG" not in capsys.readouterr().out

    words = ["--init", "nano", "--episodes", str(robot), "--split", learned, "--out", out, *QUICK]
    assert main(["train", "nano-post", *words]) == 0
    assert "trained: " in capsys.readouterr().out

    assert main(["evaluate", "data", out, str(robot), "--split", held_out, "--train-split", learned]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "1 held-out episodes" and header.endswith("last action")
    assert len(rows) == 4 and all(row.count("(n = 1)") == 3 for row in rows)  # one episode gives no interval

    (episode,) = read_episodes(robot, held_out)
    with served(out) as address:
        policy = RemotePolicy(address)
        actions = policy.infer(observations(episode)[0])["actions"]
        policy.close()
    assert actions.shape == (5, 8) and np.isfinite(actions).all()
    np.testing.assert_allclose(np.linalg.norm(actions[:, 3:7], axis=1), 1, atol=1e-5)
