"""`spear convert …`: makes SPEAR-VLM from published weights, and SPEAR-1 from it or from a π0."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from spear.errors import SpearError, check_known, escape_control_characters
from spear.util.files import check_new_or_empty_folder, write_text
from spear.util.network import is_hub_name
from spear.util.options import OptionalFile, OptionalName, Options, Preset, Seed

if TYPE_CHECKING:
    from spear.models.processing import Processor
    from spear.models.weights.conversion import Conversion
    from spear.models.weights.roles import Role
    from spear.tokens import CoordinateTokenizer


MAX_CANDIDATES = 4  # `spear convert roles` names at most this many for one group of weights


class ConvertOptions(Options, kw_only=True):
    """The options that all conversions have. A folder that cannot be written is refused."""

    out: Path
    """New folder to write to."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the result; by default that of the PaliGemma, SPEAR-VLM or π0 that is read."""
    dry_run: bool = False
    """Print what would be done, and write nothing."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dry_run:
            check_new_or_empty_folder(self.out)


MogeName = Annotated[
    Positional[str],
    arg(
        metavar="MOGE",
        help="A MoGe file (model.pt), its name on the Hub, or a folder of `spear train nano-depth`;"
        " none makes a model without 3D encoder.",
    ),
]
CoordinatesPath = Annotated[
    Path | None,
    arg(
        metavar="PATH",
        help="What the 3D tokens mean: a coordinates.json, or a folder of labeled images to fit"
        " them to. Without it the model is written without a processor, which training needs.",
    ),
]


class BackbonesOptions(ConvertOptions, kw_only=True):
    paligemma: Annotated[Positional[str], arg(metavar="PALIGEMMA")]
    """Folder of a PaliGemma 1 or 2 (config.json and safetensors), or its name on the Hugging Face
    Hub."""
    moge: MogeName
    out: Path = Path("runs/spear-vlm")
    coordinates: CoordinatesPath = None
    preset: Preset = "spear1"
    """Preset whose views, image sizes and number of 3D tokens the model gets (spear1 is the
    paper's)."""


def convert_backbones(options: BackbonesOptions) -> None:
    """Make a SPEAR-VLM, ready to be trained, from published PaliGemma and MoGe weights.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert backbones google/paligemma-3b-pt-224 Ruicheng/moge-vitl --coordinates labels
        spear convert backbones ./paligemma-3b-pt-224 ./moge-vitl/model.pt --dry-run
    """
    from spear.models.weights.backbones import plan_backbones

    plan = plan_backbones(options.paligemma, _parse_moge_name(options.moge), options.preset)
    processor = _make_processor(
        plan,
        options,
        f"{options.paligemma} has no tokenizer. Copy PaliGemma's tokenizer.json into that folder.",
    )
    _report_and_save(plan, processor, options)


class Pi0Options(ConvertOptions, kw_only=True):
    pi0: Annotated[Positional[str], arg(metavar="PI0")]
    """Folder of a π0 or π0.5 in safetensors, or its name on the Hugging Face Hub."""
    moge: MogeName
    out: Path = Path("runs/spear1")
    tokenizer: OptionalName = None
    """Folder of PaliGemma's tokenizer, or its name on the Hub; by default that in the folder of the
    π0, which usually has none."""
    coordinates: CoordinatesPath = None
    preset: Preset = "spear1"
    """Preset whose views, image sizes, number of 3D tokens, chunk length and flow the model gets
    (spear1 is the paper's)."""


def convert_pi0(options: Pi0Options) -> None:
    """Make a SPEAR-1 policy, ready to be trained, from a whole published π0, and MoGe.

    The policy has π0's VLM and action expert. MoGe joins such that it changes nothing at first.
    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert pi0 lerobot/pi0_base Ruicheng/moge-vitl --dry-run
        spear convert pi0 ./pi0_base ./model.pt --tokenizer ./paligemma --coordinates labels
    """
    from spear.models.weights.pi0_policy import plan_pi0

    moge = _parse_moge_name(options.moge)
    plan = plan_pi0(options.pi0, moge, options.preset, options.tokenizer)
    processor = _make_processor(
        plan,
        options,
        f"{options.tokenizer or options.pi0} has no tokenizer. Give PaliGemma's, for example"
        " --tokenizer google/paligemma-3b-pt-224.",
    )
    _report_and_save(plan, processor, options)


class PolicyOptions(ConvertOptions, kw_only=True):
    vlm: Annotated[Positional[str], arg(metavar="VLM")]
    """Folder of a SPEAR-VLM, or its name on the Hugging Face Hub."""
    out: Path = Path("runs/spear1")
    expert: OptionalName = None
    """Folder of a π0 or π0.5 in safetensors, or its name on the Hub; by default the expert is
    new."""
    preset: Preset = "spear1"
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
    from spear.models.weights.load import get_or_download_checkpoint
    from spear.policy import locate_checkpoint

    is_on_hub = is_hub_name(options.vlm) and not Path(options.vlm).exists()
    folder = (
        get_or_download_checkpoint(options.vlm, "SPEAR-VLM")
        if is_on_hub
        else locate_checkpoint(options.vlm)
    )
    plan = plan_policy(folder, options.expert, options.preset)
    processor = None
    if (folder / "processor.json").is_file():
        processor = Processor.load(folder, plan.config.vlm_config)
    _report_and_save(plan, processor, options)


class MappedOptions(ConvertOptions, kw_only=True):
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Folder of safetensors, or its name on the Hugging Face Hub."""
    mapping: OptionalFile = None
    """Which name of the checkpoint is which of ours (TOML, written by `spear convert roles
    --save-names`); by default the unverified mapping of the authors' release."""
    out: Path = Path("runs/spear1")
    tokenizer: OptionalName = None
    """Folder of PaliGemma's tokenizer, or its name on the Hub."""
    coordinates: CoordinatesPath = None
    preset: Preset = "spear1"
    """Preset whose networks the checkpoint has (spear1 is the paper's)."""


def convert_mapped(options: MappedOptions) -> None:
    """Make a SPEAR-1 policy from one whose weights another program saved under other names.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert mapped ./spear1-franka --mapping names.toml --dry-run
        spear convert mapped ./spear1-franka --mapping names.toml --out runs/spear1-franka
    """
    from spear.models.weights.mapping import AUTHORS_MAPPING, plan_mapped, read_mapping

    mapping_file = options.mapping or AUTHORS_MAPPING
    plan = plan_mapped(options.checkpoint, mapping_file, options.preset, options.tokenizer)
    processor = _make_processor(
        plan,
        options,
        "the 3D tokens need a tokenizer. Give PaliGemma's, for example --tokenizer "
        "google/paligemma-3b-pt-224.",
    )
    _report_and_save(plan, processor, options)
    if not read_mapping(mapping_file).verified:
        print(
            f"Nobody has verified {mapping_file.name}. Compare the policy's actions with those of"
            " the program that saved the weights before a robot moves."
        )


class RolesOptions(Options):
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Folder of safetensors, or its name on the Hugging Face Hub."""
    preset: Preset = "spear1"
    """Preset of the SPEAR-1 that it may be."""
    per_tensor: bool = False
    """Print a line for every tensor, not one for a weight of all layers."""
    save_names: OptionalFile = None
    """Write a first mapping of the names to this file (TOML), to be completed and verified."""


def convert_roles(options: RolesOptions) -> None:
    """Guess what the weights of a checkpoint with unknown names are in a SPEAR-1.

    Prints each group of weights with the weights that it may be, and whether their names, their
    shapes, or the stack of layers around them (position) say so. No weights are read.

    Examples:
        spear convert roles ./spear1-franka
        spear convert roles ./spear1-franka --per-tensor --save-names names.toml > roles.txt
    """
    from spear.models.weights.load import StoredCheckpoint
    from spear.models.weights.name_rules import read_name_rules
    from spear.models.weights.roles import format_mapping, guess_weight_roles, mask_numbers

    checkpoint = StoredCheckpoint.open(options.checkpoint, "checkpoint")
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    roles = guess_weight_roles(shapes, options.preset, read_name_rules("spear1_franka").renamed)
    if options.per_tensor:
        role_of_group = {(role.group.name, role.group.shape): role for role in roles}
        for name, shape in shapes.items():
            role = role_of_group[mask_numbers(name), shape]
            line = f"{name} {list(shape)}: {_describe_role(role, name)}"
            print(escape_control_characters(line))
    else:
        for role in roles:
            group = role.group
            line = f"{group.count:>4} × {group.name} {list(group.shape)}: {_describe_role(role)}"
            print(escape_control_characters(line))

    num_settled = sum(role.is_settled for role in roles)
    num_joined = sum(role.evidence.startswith("joined") for role in roles)
    num_unknown = sum(not role.candidates for role in roles)
    print(
        f"{len(roles)} groups of weights, of which {num_settled} have one candidate, "
        f"{num_joined} are several weights in one, and {num_unknown} are unknown (unverified)"
    )
    if options.save_names is not None:
        write_text(options.save_names, format_mapping(roles, options.checkpoint))


def _describe_role(role: "Role", stored_name: str = "") -> str:
    """Describe what a group of weights may be, and why.

    Args:
        role: the group of stored weights, with its candidates.
        stored_name: the name of one of these weights. Candidates are then named with the number of
            its layer. Otherwise they are named with "*", which stands for all layers.
    """
    from spear.models.weights.roles import insert_numbers

    if not role.candidates:
        return "unknown"
    names = [
        insert_numbers(candidate.name, stored_name)
        for candidate in role.candidates[:MAX_CANDIDATES]
    ]
    num_more = len(role.candidates) - len(names)
    more = f" or one of {num_more} more" if num_more > 0 else ""
    # Weights that are joined in one tensor are all in it; otherwise it is one of the candidates.
    conjunction = " and " if role.evidence.startswith("joined") else " or "
    return f"{conjunction.join(names)}{more} (by {role.evidence})"


class ExpectedOptions(Options):
    network: Annotated[Positional[str | None], arg(metavar="[NETWORK]")] = None
    """A published network by its name here. Without it the names, repositories, revisions and files
    of all are listed."""


def convert_expected(options: ExpectedOptions) -> None:
    """Show the names and shapes of the tensors that are read of a published network's files.

    If a conversion or the labeler rejects a file, its error says how that differs.

    Examples:
        spear convert expected
        spear convert expected paligemma
    """
    from spear.models.weights.conversion import ConversionReport, WeightStatus
    from spear.models.weights.published import PUBLISHED

    if options.network is not None:
        check_known("network", PUBLISHED, options.network)
    for name, network in PUBLISHED.items():
        if options.network in (None, name):
            print(f"{name:<15} {network.repository}@{network.revision}: {network.files}")
    if options.network is None:
        return

    tensors = PUBLISHED[options.network].list_tensors()
    report = ConversionReport(
        [WeightStatus(name, shape, "loaded", "") for name, shape in tensors.items()]
    )
    for weight, count in report.fold_layers():
        print(f"{count:>4} × {weight.name} {list(weight.shape)}")
    print(f"{len(tensors)} tensors, {report.count_parameters():,} numbers")


def _parse_moge_name(name: str) -> str | None:
    """Return the MoGe that an option names, or None for "none"."""
    return None if name == "none" else name


def _make_processor(
    plan: "Conversion[Any]",
    options: BackbonesOptions | Pi0Options | MappedOptions,
    problem: str,
) -> "Processor | None":
    """Return the processor for a model with new 3D tokens, or None without --coordinates.

    Raises:
        SpearError: There is no tokenizer, which the message explains by `problem`.
    """
    from spear.models.presets import get_preset
    from spear.models.processing import Processor

    if options.coordinates is None:
        return None
    if plan.tokenizer is None:
        raise SpearError(problem)
    preset = get_preset(options.preset)
    coordinate_tokenizer = _load_or_fit_coordinate_tokenizer(
        options.coordinates, preset.bins, options.seed
    )
    return Processor(
        plan.tokenizer, coordinate_tokenizer, dict(preset.image_sizes), preset.prompt_tokens
    )


def _report_and_save(
    plan: "Conversion[Any]", processor: "Processor | None", options: ConvertOptions
) -> None:
    """Print what becomes of each weight and, unless it is a dry run, write the model."""
    import torch

    dtype = plan.dtype if options.dtype is None else getattr(torch, options.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    size_gb = plan.report.count_parameters() * dtype.itemsize / 1e9
    size = f"{size_gb:.2f} GB, {dtype_name}"
    print(escape_control_characters(str(plan.report), keep_newlines=True))
    plan.check()
    if options.dry_run:
        print(f"nothing written (dry run); it would be {size} in {options.out}")
        return

    save_processor = processor.save if processor is not None else None
    plan.save(options.out, dtype, options.seed, save_processor)
    print(f"written: {options.out} ({size})")
    if processor is None:
        print(
            "The model is without a processor, which training needs."
            " See --coordinates of `spear convert backbones`."
        )


def _load_or_fit_coordinate_tokenizer(
    path: Path, num_bins: int, seed: int
) -> "CoordinateTokenizer":
    """Return the 3D tokens for --coordinates.

    Args:
        path: a file of 3D tokens, a folder that contains one, or a folder of labeled images, to
            whose coordinates the tokens are fitted.
        num_bins: number of 3D tokens of the preset.
        seed: seed of the fit.

    Raises:
        SpearError: the file has another number of 3D tokens.
    """
    from spear.tokens import CoordinateTokenizer
    from spear.train.tasks import fit_coordinates, load_labels

    file = path / "coordinates.json" if path.is_dir() else path
    if file.is_file():
        tokenizer = CoordinateTokenizer.load(file)
    else:
        labels = load_labels([path], ["external"])["external"]
        tokenizer = fit_coordinates(labels, num_bins, seed)
    if tokenizer.num_bins != num_bins:
        raise SpearError(
            f"{path} has {tokenizer.num_bins} 3D tokens, the preset {num_bins}. Fit them again "
            f"with {num_bins} 3D tokens."
        )
    return tokenizer
