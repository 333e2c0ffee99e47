"""`spear convert …` makes a VLM from published weights and a policy from the VLM, and refuses bad
input in one line.

The published weights are tiny ones, which `published_checkpoints` writes.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from published_checkpoints import (
    NUM_PUBLISHED_TOKENS,
    TINY14,
    make_paligemma,
    make_pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
)
from refusals import Command
from spear.cli import main
from spear.models.presets import build_spear1_config
from spear.models.processing import Processor
from spear.models.spear1 import Spear1ForActionPrediction, load_inner_vlm
from spear.models.weights import conversion
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.models.weights.published import PUBLISHED
from spear.tokens import CoordinateTokenizer

BACKBONES = ("convert", "backbones")
SIZE = ("--preset", "tiny14")

pytestmark = pytest.mark.usefixtures("tiny_published_presets")


def save_coordinates(path: Path, num_bins: int = TINY14.bins) -> str:
    """Save 3D tokens, fitted to random numbers; return the path."""
    values = np.random.default_rng(0).normal(size=1000)
    CoordinateTokenizer.fit(values, num_bins, "metre").save(path)
    return str(path)


class TestFromBackbonesToAPolicy:
    """Both conversions, one after the other."""

    @pytest.fixture(autouse=True)
    def several_shards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets even these tiny models have several files of weights."""
        monkeypatch.setattr(conversion, "MAX_SHARD_SIZE", "100KB")

    @pytest.fixture
    def vlm(self, tmp_path: Path) -> Path:
        """The folder of the converted VLM."""
        return tmp_path / "vlm"

    @pytest.fixture
    def policy(self, tmp_path: Path) -> Path:
        """The folder of the converted policy."""
        return tmp_path / "policy"

    @pytest.fixture
    def vlm_command(self, tmp_path: Path, vlm: Path) -> list[str]:
        """The command that makes the VLM."""
        folder = publish_paligemma(make_paligemma(), tmp_path / "paligemma")
        moge = publish_moge(tmp_path / "model.pt")
        coordinates = save_coordinates(tmp_path / "coordinates.json")
        options = ["--out", str(vlm), "--coordinates", coordinates, *SIZE]
        return [*BACKBONES, str(folder), str(moge), *options]

    @pytest.fixture
    def policy_command(self, tmp_path: Path, vlm: Path, policy: Path) -> list[str]:
        """The command that makes the policy from the VLM."""
        expert = publish_pi0(make_pi0(state_dim=32, action_dim=32), tmp_path / "pi0")
        return ["convert", "vlm", str(vlm), "--out", str(policy), "--expert", str(expert), *SIZE]

    @pytest.fixture
    def converted_models(
        self,
        tiny_published_presets: None,
        run_command: Command,
        vlm_command: list[str],
        policy_command: list[str],
    ) -> None:
        """Runs both commands, so that the folders `vlm` and `policy` have their files."""
        run_command(vlm_command)
        run_command(policy_command)

    def test_a_dry_run_prints_the_report_and_writes_nothing(
        self,
        run_command: Command,
        vlm_command: list[str],
        policy_command: list[str],
        vlm: Path,
        policy: Path,
    ) -> None:
        for command, folder in ((vlm_command, vlm), (policy_command, policy)):
            dry_output = run_command(command, "--dry-run")

            assert "nothing written" in dry_output
            assert "SPEAR-VLM" in dry_output
            assert not folder.exists()
            report = dry_output.partition("nothing written")[0]
            output = run_command(command)
            assert output.startswith(report)

    @pytest.mark.usefixtures("converted_models")
    def test_the_policy_has_the_weights_of_its_vlm(self, vlm: Path, policy: Path) -> None:
        expected = load_inner_vlm(vlm).state_dict()
        weights = load_inner_vlm(policy).state_dict()
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight)

    @pytest.mark.usefixtures("converted_models")
    def test_a_large_policy_is_written_as_several_files(self, policy: Path) -> None:
        assert len(list(policy.glob("*.safetensors"))) > 1

    @pytest.mark.usefixtures("converted_models")
    def test_both_have_a_processor_and_say_what_they_were_made_from(
        self, vlm: Path, policy: Path
    ) -> None:
        for folder in (vlm, policy):
            processor = Processor.load(folder)
            assert processor.coordinate_ids.start == NUM_PUBLISHED_TOKENS
            assert dict(processor.image_sizes) == dict(TINY14.image_sizes)
            assert json.loads((folder / "recipe.json").read_text())["converted"]
            assert (folder / "README.md").read_text().startswith("---\nlicense: gemma\n")


class TestWholePi0:
    """`spear convert pi0`."""

    @pytest.fixture
    def policy(self, tmp_path: Path) -> Path:
        """The folder of the converted policy."""
        return tmp_path / "policy"

    @pytest.fixture
    def command(self, tmp_path: Path, policy: Path) -> list[str]:
        """The command, with everything but a tokenizer."""
        pi0 = publish_pi0(make_pi0(state_dim=32, action_dim=32), tmp_path / "pi0")
        moge = publish_moge(tmp_path / "model.pt")
        coordinates = save_coordinates(tmp_path / "coordinates.json")
        options = ["--out", str(policy), "--coordinates", coordinates, *SIZE]
        return ["convert", "pi0", str(pi0), str(moge), *options]

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> str:
        """The path of a PaliGemma with its tokenizer."""
        return str(publish_paligemma(make_paligemma(), tmp_path / "paligemma"))

    def test_a_dry_run_prints_what_becomes_of_each_weight(
        self, run_command: Command, command: list[str], tokenizer: str, policy: Path
    ) -> None:
        output = run_command(command, "--tokenizer", tokenizer, "--dry-run")

        rows = [line.split() for line in output.splitlines()]
        expert = "model.paligemma_with_expert.gemma_expert"
        assert [
            "loaded",
            "expert.norm.weight",
            "16",
            "1",
            "π0:",
            f"{expert}.model.norm.weight",
        ] in rows
        assert any(row[:3] == ["left", "out", f"{expert}.lm_head.weight"] for row in rows)
        assert any(row[:2] == ["new", "vlm.moge_projector.linear.weight"] for row in rows)
        assert "nothing written" in output
        assert not policy.exists()

    def test_the_policy_has_a_processor_and_says_what_it_was_made_from(
        self, run_command: Command, command: list[str], tokenizer: str, policy: Path
    ) -> None:
        run_command(command, "--tokenizer", tokenizer)

        assert Processor.load(policy).coordinate_ids.start == NUM_PUBLISHED_TOKENS
        sources = json.loads((policy / "recipe.json").read_text())["converted"]
        assert list(sources) == ["π0", "MoGe", "tokenizer"]
        assert sources["tokenizer"] == tokenizer

    def test_coordinates_need_a_tokenizer(
        self, run_refused_command: Command, command: list[str]
    ) -> None:
        assert "--tokenizer google/paligemma-3b-pt-224" in run_refused_command(command)

    def test_a_missing_tokenizer_is_named(
        self, run_refused_command: Command, command: list[str], tmp_path: Path
    ) -> None:
        missing = str(tmp_path / "nowhere")

        message = run_refused_command(command, "--tokenizer", missing)

        assert f"there is no tokenizer {missing}. Give its folder (tokenizer.json)" in message


class TestWithoutTokenizer:
    """Conversions of a PaliGemma folder that has no tokenizer; "none" is for "without a MoGe"."""

    @pytest.fixture
    def paligemma(self, tmp_path: Path) -> str:
        """The path of the folder."""
        folder = tmp_path / "bare"
        return str(publish_paligemma(make_paligemma(), folder, with_tokenizer=False))

    def test_coordinates_need_a_tokenizer(
        self, run_refused_command: Command, paligemma: str, tmp_path: Path
    ) -> None:
        coordinates = save_coordinates(tmp_path / "few.json", num_bins=8)

        message = run_refused_command(
            BACKBONES, paligemma, "none", "--coordinates", coordinates, SIZE, "--dry-run"
        )

        assert "tokenizer" in message

    def test_an_unknown_option_gets_a_suggestion(
        self, run_refused_command: Command, paligemma: str
    ) -> None:
        assert "--dry-run" in run_refused_command(BACKBONES, paligemma, "none", "--dryrun")

    def test_a_file_cannot_be_written_into(
        self, run_refused_command: Command, paligemma: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        out = str(tmp_path / "file" / "out")

        assert "cannot be written" in run_refused_command(
            BACKBONES, paligemma, "none", "--out", out, SIZE
        )

    def test_a_full_disk_leaves_nothing_behind(
        self,
        run_refused_command: Command,
        paligemma: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))  # bytes
        out = str(tmp_path / "full")

        assert "has no room" in run_refused_command(
            BACKBONES, paligemma, "none", "--out", out, SIZE
        )

        names = [path.name for path in tmp_path.iterdir()]
        assert not [name for name in names if name.startswith((".part", "full"))]

    def test_the_result_is_without_a_processor(
        self, run_command: Command, paligemma: str, tmp_path: Path
    ) -> None:
        out = str(tmp_path / "out")

        assert "without a processor" in run_command(
            BACKBONES, paligemma, "none", "--out", out, SIZE
        )

    @pytest.mark.parametrize("command", [(*BACKBONES, "{}", "none"), ("convert", "vlm", "{}")])
    def test_a_folder_with_content_is_refused_before_any_work(
        self,
        command: tuple[str, ...],
        paligemma: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        words = [word.format(paligemma) for word in command]

        assert main([*words, "--out", str(tmp_path / "out")]) == 2

        output = capsys.readouterr()
        assert "is there already" in output.err
        assert not output.out


class TestMapped:
    """`spear convert mapped`: all names of the checkpoint begin with "policy."."""

    @pytest.fixture
    def command(self, tmp_path: Path) -> list[str]:
        """The command, with everything but a tokenizer."""
        model = Spear1ForActionPrediction(build_spear1_config(TINY14))
        weights = {f"policy.{name}": weight for name, weight in model.state_dict().items()}
        folder = tmp_path / "theirs"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        mapping = tmp_path / "names.toml"
        mapping.write_text('renamed = [["policy.", ""]]')
        return ["convert", "mapped", str(folder), "--mapping", str(mapping), *SIZE]

    def test_a_dry_run_prints_what_becomes_of_each_weight(
        self, run_command: Command, command: list[str]
    ) -> None:
        output = run_command(command, "--dry-run")

        rows = [line.split() for line in output.splitlines()]
        row = ["loaded", "expert.norm.weight", "16", "1", "SPEAR-1:", "policy.expert.norm.weight"]
        assert row in rows
        assert "nothing written" in output
        assert "Nobody has verified names.toml" in output

    def test_the_policy_has_a_processor_and_says_what_it_was_made_from(
        self, run_command: Command, command: list[str], tmp_path: Path
    ) -> None:
        coordinates = save_coordinates(tmp_path / "coordinates.json")
        tokenizer = str(publish_paligemma(make_paligemma(), tmp_path / "paligemma"))
        out = tmp_path / "out"

        run_command(
            command, "--tokenizer", tokenizer, "--coordinates", coordinates, "--out", str(out)
        )

        assert Processor.load(out).coordinate_ids.start == NUM_PUBLISHED_TOKENS
        sources = json.loads((out / "recipe.json").read_text())["converted"]
        assert list(sources) == ["SPEAR-1", "mapping", "tokenizer"]

    def test_coordinates_need_a_tokenizer(
        self, run_refused_command: Command, command: list[str], tmp_path: Path
    ) -> None:
        coordinates = save_coordinates(tmp_path / "coordinates.json")

        message = run_refused_command(command, "--coordinates", coordinates, "--dry-run")

        assert "need a tokenizer" in message


class TestExpected:
    """`spear convert expected`."""

    def test_list_shows_all_networks(self, run_command: Command) -> None:
        output = run_command("convert", "expected")

        assert len(output.splitlines()) == len(PUBLISHED)
        assert PUBLISHED["moge"].revision in output

    def test_a_name_shows_its_tensors(self, run_command: Command) -> None:
        output = run_command("convert", "expected", "moge")

        # The 24 layers are one line. Queries, keys and values have 1,024 rows each.
        assert "24 × backbone.blocks.0…23.attn.qkv.weight [3072, 1024]" in output
        assert "420 tensors" in output

    def test_an_unknown_name_gets_a_suggestion(self, run_refused_command: Command) -> None:
        assert "'pi0'" in run_refused_command("convert", "expected", "pi00")


class TestRoles:
    """`spear convert roles`."""

    def test_shows_what_weights_may_be_and_how_it_knows(self, run_command: Command) -> None:
        output = run_command("convert", "roles", str(BUNDLED_WEIGHTS / "nano"), "--preset", "nano")

        line = next(line for line in output.splitlines() if "expert.layers.*.mlp.up_proj" in line)
        assert line.endswith(": expert.layers.*.mlp.up_proj.weight (by name and shape)")
        assert "unverified" in output.splitlines()[-1]

    def test_shows_each_tensor_and_saves_a_mapping(
        self, run_command: Command, tmp_path: Path
    ) -> None:
        names = tmp_path / "names.toml"
        nano = str(BUNDLED_WEIGHTS / "nano")

        output = run_command(
            "convert", "roles", nano, "--preset", "nano", "--per-tensor", "--save-names", str(names)
        )

        name = "expert.layers.4.mlp.up_proj.weight"
        assert f"{name} [384, 160]: {name} (by name and shape)" in output.splitlines()
        assert "verified = false" in names.read_text().splitlines()

    def test_a_folder_without_weights_is_refused(
        self, run_refused_command: Command, tmp_path: Path
    ) -> None:
        assert "model.safetensors" in run_refused_command("convert", "roles", str(tmp_path))
