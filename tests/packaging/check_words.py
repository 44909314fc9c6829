"""Look for words that the project's prose avoids.

``python tests/packaging/check_words.py PATH...`` prints ``file:line: word`` for each use in the
given files, and in the Python and Markdown files of the given folders. It exits with 1 if there are
any. An underscore separates words, so that ``_settle`` is a use of "settle". Names that belong to
other libraries are skipped.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WORDS = [
    "whoever",
    "whatever",
    "nobody",
    "somebody",
    "those who",
    "lest",
    "any more",
    "for good",
    "is told",
    "are told",
    "cargo",
    "freight",
    "crews?",
    "census",
    "settle[ds]?",
    "settling",
    "waiters?",
]

# Identifiers of other libraries, which the source may have to use.
FOREIGN = ["_fut_waiter", "_waiters"]

SUFFIXES = {".py", ".md"}

# The words of a phrase may be on two lines, each of them a comment.
_PHRASES = "|".join(word.replace(" ", r"(?:\s|\n\s*\#)+") for word in WORDS)
_PATTERN = re.compile(
    rf"(?<!\w)(?:{'|'.join(FOREIGN)})(?!\w)|(?<![^\W_])(?P<word>{_PHRASES})(?![^\W_])",
    re.IGNORECASE,
)


def uses(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and the word of each use in a text."""
    for match in _PATTERN.finditer(text):
        if match["word"] is not None:
            yield text.count("\n", 0, match.start()) + 1, re.sub(r"[\s#]+", " ", match["word"])


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the given files, and those of the given folders that are checked.

    Raises:
        FileNotFoundError: One of the paths does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        elif path.exists():
            yield path
        else:
            msg = f"{path} does not exist"
            raise FileNotFoundError(msg)


def main(arguments: list[str]) -> int:
    """Print every use in the files and folders; return the exit status."""
    status = 0
    for file in files(map(Path, arguments)):
        for line, word in uses(file.read_text(encoding="utf-8")):
            print(f"{file}:{line}: {word}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
