"""Commands that refuse repeated options; the parser alone would take the last value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """Refuses a repeated option, unless it collects values or is a flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; see the base class."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        seen: set[str] = set()
        for param in order:
            if getattr(param, "multiple", False) or getattr(param, "is_flag", False):
                continue
            if param.name in seen:
                ctx.fail(f"{param.opts[0]} is given twice: give it once.")
            seen.add(str(param.name))
        return super().parse_args(ctx, args)
