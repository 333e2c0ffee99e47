"""What mkdocs needs beyond its configuration.

It generates the reference of the public Python API and of the command line, and turns links that
lead out of docs/ into plain text.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PUBLIC_MODULES = {
    "spear.types": "Types: episodes, actions, labels, questions, policies",
    "spear.policy": "Load a policy or a SPEAR-VLM, act and answer",
    "spear.chunks": "Execute action chunks",
    "spear.embodiments": "Robots",
    "spear.embodiments.interface": "What a robot consists of",
    "spear.embodiments.actions": "Check an action chunk",
    "spear.serve.client": "Client of the server",
    "spear.data.readers.formats": "Read datasets of robot episodes",
    "spear.data.store.episode_store": "Read an episode store",
    "spear.labels.store": "Read and write labeled images",
    "spear.geometry": "Rotations and poses",
    "spear.flow": "Flow matching on R³ × S³",
    "spear.tokens": "3D tokens",
    "spear.train.recipes": "Recipes",
    "spear.errors": "The error that spear raises",
}
"""Each module with public names, and the title of its page. All other modules are internal."""

PUBLIC_NAMES = {
    "spear.types": (
        "Action",
        "Episode",
        "Frame",
        "Box3D",
        "LabeledObject",
        "LabeledImage",
        "Question",
        "Policy",
        "FlowConfig",
    ),
    "spear.policy": ("Spear1Policy", "load_vlm", "VlmBundle", "Answer"),
    "spear.chunks": ("Pilot", "ChunkExecutor"),
    "spear.embodiments": ("list_names", "load"),
    "spear.embodiments.interface": ("Embodiment", "Control"),
    "spear.embodiments.actions": ("validate_chunk",),
    "spear.serve.client": ("RemotePolicy",),
    "spear.data.readers.formats": ("read_episodes", "open_dataset"),
    "spear.data.store.episode_store": ("EpisodeStore",),
    "spear.labels.store": ("read_labels", "write_labels"),
    "spear.geometry": (
        "quat_exp",
        "quat_log",
        "quat_slerp",
        "quat_rotate",
        "euler_to_quat",
        "action_between_poses",
        "apply_action",
    ),
    "spear.flow": ("sample_noise", "interpolate", "compute_loss", "integrate"),
    "spear.tokens": ("CoordinateTokenizer",),
    "spear.train.recipes": ("get_recipe",),
    "spear.errors": ("SpearError",),
}
"""The public names of each module. Its other names are internal, and the reference omits them."""

PUBLIC_METHODS = {
    "EpisodeStore": ("subset", "image", "source", "served_steps", "without_images"),
}
"""The public methods of a class that has internal ones, too."""

PRINT_HELP = """
import io, sys
from contextlib import redirect_stdout
from spear.cli import COMMANDS, main
for name in COMMANDS:
    output = io.StringIO()
    with redirect_stdout(output):
        try:
            main([*name.split(), "--help"])
        except SystemExit:
            pass
    print(f"## spear {name}\\n\\n```text\\n{output.getvalue().strip()}\\n```\\n")
"""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def page_of_module(module: str) -> str:
    """Return the address of a module's page in docs/."""
    return f"reference/api/{module.removeprefix('spear.')}.md"


def on_config(config: Any) -> Any:
    """Append the generated pages to the section "Reference" of the navigation."""
    (section,) = [entry["Reference"] for entry in config.nav if "Reference" in entry]
    section.append({"Command line": "reference/cli.md"})
    section.append({"Python": [{name: page_of_module(name)} for name in PUBLIC_MODULES]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page with the public names of each module, and the page of the command line."""
    for module, title in PUBLIC_MODULES.items():
        text = f"# {title}\n\n{format_directive(module, members=())}"
        for name in PUBLIC_NAMES[module]:
            text += format_directive(f"{module}.{name}", PUBLIC_METHODS.get(name))
        files.append(File.generated(config, page_of_module(module), content=text))

    text = f"# Command line\n\n{read_help_of_commands()}"
    files.append(File.generated(config, "reference/cli.md", content=text))
    return files


def format_directive(path: str, members: tuple[str, ...] | None) -> str:
    """Return the Markdown that mkdocstrings replaces by the docstring of a name.

    members: the names below this one to show; None for all public ones.
    """
    directive = f"::: {path}\n"
    if members is not None:
        directive += f"    options:\n      members: [{', '.join(members)}]\n"
    return f"{directive}\n"


def read_help_of_commands() -> str:
    """Return the help of every command, each under its heading."""
    command = [sys.executable, "-c", PRINT_HELP]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links out of docs/ into plain text."""
    folder = posixpath.dirname(page.file.src_uri)

    def keep_inner_link(match: re.Match[str]) -> str:
        is_image, text, target = match.groups()
        leads_out = posixpath.normpath(posixpath.join(folder, target)).startswith("..")
        if "://" in target or is_image or not leads_out:
            return match[0]
        return text

    return LINK.sub(keep_inner_link, markdown)
