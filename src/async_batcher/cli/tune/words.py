"""Numbers with their units, and lines of at most 80 columns (pure)."""

from __future__ import annotations

import re
import textwrap

_COLUMNS = 80
_NO_BREAK = "\N{NO-BREAK SPACE}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Break into lines, but not between a number and its unit."""
    lines = textwrap.wrap(
        re.sub(r"(?<=\d) (?=%|(?:s|ms|us|x)\b)", _NO_BREAK, text),
        _COLUMNS,
        initial_indent="" if text.startswith("- ") else indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def counted(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"
