"""The command's reference, from typer's own description of it."""

from __future__ import annotations

import re
from typing import Any

import typer
from tables import cell, table

MARKUP = re.compile(r"\[/?\w+\]")


def write_command() -> str:
    """A section for each command: what it does, its options, its examples."""
    from corematching.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(describe(name, command) for name, command in group.commands.items())


def describe(name: str, command: Any) -> str:
    """One command's section."""
    parts = [f"## corematching {name}", command.help.strip()]
    shown = [option for option in command.params if not option.hidden]
    for panel in dict.fromkeys(option.rich_help_panel for option in shown):
        rows = [row_of(option) for option in shown if option.rich_help_panel == panel]
        parts.append(table(("option" if panel is None else panel.lower(), "", "default"), rows))
    examples = MARKUP.sub("", command.epilog or "")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(f"corematching {name}")]
    if own:
        parts.append("```bash\n" + "\n".join(own) + "\n```")
    return "\n\n".join(parts)


def row_of(option: Any) -> tuple[str, str, str]:
    """An option's names, its help, and its default."""
    names = ", ".join(f"`{name}`{{.whole}}" for name in sorted(option.opts, key=len, reverse=True))
    if not option.is_flag:
        names += f" `{option.metavar or kind_of(option)}`"
    text = option.help or ""
    if option.multiple and "repeat" not in text:
        text += " Repeat it for several."
    default = "required" if option.required else ""
    if not option.is_flag and option.default is not None:
        default = f"`{option.default}`"
    return names, cell(text), default


def kind_of(option: Any) -> str:
    """What stands for an option's value."""
    annotation = option.type_descriptor.annotation
    inner = (getattr(annotation, "__args__", None) or (annotation,))[0]
    return {"str": "TEXT", "Path": "PATH", "float": "NUMBER", "int": "NUMBER"}[inner.__name__]
