"""`spear convert …`: published weights to SPEAR-VLM, and SPEAR-VLM to SPEAR-1."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from spear.errors import SpearError, check_known
from spear.util.files import check_new_folder
from spear.util.network import is_hub_name
from spear.util.options import OptionalName, Options, Seed

if TYPE_CHECKING:
    from spear.models.processing import Processor
    from spear.models.weights.conversion import Conversion
    from spear.tokens import CoordinateTokenizer


class ConvertOptions(Options, kw_only=True):
    """What every conversion takes."""

    out: Path
    """New folder to write to."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the result; without it that of the PaliGemma or SPEAR-VLM that is read."""
    dry_run: bool = False
    """Only say what would be done; nothing is written."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dry_run:
            check_new_folder(self.out)


class BackbonesOptions(ConvertOptions, kw_only=True):
    paligemma: Annotated[Positional[str], arg(metavar="PALIGEMMA")]
    """Folder of a PaliGemma 1 or 2 (config.json and safetensors), or its name on the Hugging Face Hub."""
    moge: Annotated[Positional[str], arg(metavar="MOGE")]
    """A MoGe file (model.pt), or its name on the Hub; none leaves the 3D encoder out."""
    out: Path = Path("runs/spear-vlm")
    coordinates: Annotated[Path | None, arg(metavar="PATH")] = None
    """What the 3D tokens shall mean: a coordinates.json, or a folder of labelled images to fit them to.
    Without it the model is written without a processor, which training needs."""
    preset: str = "spear1"
    """Preset whose views, image sizes and number of 3D tokens the model gets (spear1 is the paper's)."""


def convert_backbones(options: BackbonesOptions) -> None:
    """Make a SPEAR-VLM, ready to be trained, from published PaliGemma and MoGe weights.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert backbones google/paligemma-3b-pt-224 Ruicheng/moge-vitl --coordinates runs/labels
        spear convert backbones ./paligemma-3b-pt-224 ./moge-vitl/model.pt --dry-run
    """
    from spear.models.presets import get_preset
    from spear.models.processing import Processor
    from spear.models.weights.backbones import plan_backbones

    size = get_preset(options.preset)
    moge = None if options.moge == "none" else options.moge
    plan = plan_backbones(options.paligemma, moge, options.preset)
    processor = None
    if options.coordinates is not None:
        if plan.tokenizer is None:
            raise SpearError(
                f"--coordinates: {options.paligemma} has no tokenizer: add tokenizer.json there"
            )
        meaning = _coordinates(options.coordinates, size.bins, options.seed)
        processor = Processor(plan.tokenizer, meaning, dict(size.image_sizes), size.prompt_tokens)
    _finish(plan, processor, options)


class PolicyOptions(ConvertOptions, kw_only=True):
    vlm: Annotated[Positional[str], arg(metavar="VLM")]
    """Folder of a SPEAR-VLM, or its name on the Hugging Face Hub."""
    out: Path = Path("runs/spear1")
    expert: OptionalName = None
    """Folder of a π0 in safetensors, or its name on the Hub; without it the action expert is new."""
    preset: str = "spear1"
    """Preset of the chunk length, the flow and a new expert (spear1 is the paper's)."""


def convert_vlm(options: PolicyOptions) -> None:
    """Make a SPEAR-1 policy, ready to be trained, from a SPEAR-VLM and an action expert.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert vlm runs/vlm-stage2/final --out runs/spear1
        spear convert vlm runs/vlm-stage2/final --expert lerobot/pi0_base --dry-run
    """
    from spear.models.processing import Processor
    from spear.models.weights.action_expert import plan_policy
    from spear.models.weights.load import find_checkpoint
    from spear.policy import locate

    on_hub = is_hub_name(options.vlm) and not Path(options.vlm).exists()
    folder = find_checkpoint(options.vlm, "SPEAR-VLM") if on_hub else locate(options.vlm)
    plan = plan_policy(folder, options.expert, options.preset)
    has_one = (folder / "processor.json").is_file()
    _finish(plan, Processor.load(folder, plan.config.vlm_config) if has_one else None, options)


class ExpectedOptions(Options):
    network: Annotated[Positional[str], arg(metavar="NETWORK")] = "list"
    """A published network by its name here; list shows the names, repositories, revisions and files."""


def convert_expected(options: ExpectedOptions) -> None:
    """Show the names and shapes of the tensors that are read of a published network's files.

    Where a conversion or the labeller refuses a file, its error says how that differs.

    Examples:
        spear convert expected list
        spear convert expected paligemma
    """
    from spear.models.weights.published import PUBLISHED

    check_known("network", ["list", *PUBLISHED], options.network)
    for name, known in PUBLISHED.items():
        if options.network in ("list", name):
            print(f"{name:<15} {known.repository}@{known.revision}: {known.files}")
    if options.network != "list":
        from spear.models.weights.conversion import ConversionReport, WeightStatus

        tensors = PUBLISHED[options.network].tensors()
        report = ConversionReport(
            [WeightStatus(name, shape, "loaded", "") for name, shape in tensors.items()]
        )
        for key, count in report.fold_layers():
            print(f"{count:>4} × {key.name} {list(key.shape)}")
        print(f"{len(tensors)} tensors, {report.num_parameters():,} numbers")


def _finish(
    plan: "Conversion[Any]", processor: "Processor | None", options: ConvertOptions
) -> None:
    """Print what becomes of each weight and, unless it is a dry run, write the model."""
    import torch

    kind = plan.dtype if options.dtype is None else getattr(torch, options.dtype)
    name = str(kind).removeprefix("torch.")
    size = f"{plan.report.num_parameters() * kind.itemsize / 1e9:.2f} GB, {name}"
    print(plan.report)
    plan.check()
    if options.dry_run:
        print(f"nothing written (dry run); it would be {size} in {options.out}")
        return
    also = processor.save if processor is not None else None
    plan.save(options.out, kind, options.seed, also)
    print(f"written: {options.out} ({size})")
    if processor is None:
        print(
            "without a processor: training needs one, see --coordinates of `spear convert backbones`"
        )


def _coordinates(path: Path, bins: int, seed: int) -> "CoordinateTokenizer":
    """3D tokens from a file, a folder that holds one, or fitted to labelled images."""
    from spear.tokens import CoordinateTokenizer
    from spear.train.tasks import fit_coordinates, load_labels

    file = path / "coordinates.json" if path.is_dir() else path
    if file.is_file():
        tokens = CoordinateTokenizer.load(file)
    else:
        tokens = fit_coordinates(load_labels([path], ["external"])["external"], bins, seed)
    if tokens.num_bins != bins:
        raise SpearError(
            f"{path}: has {tokens.num_bins} 3D tokens, the preset {bins}: fit them again"
        )
    return tokens
