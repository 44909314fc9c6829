"""The check for words that the project's prose avoids, which runs with the linter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.packaging import check_words

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Whoever asks, gets it.", ["Whoever"]),
        ("a future that is settled", ["settled"]),
        ("def _settle_shares(): ...", ["settle"]),
        ("one whose caller does not wait any more", ["any more"]),
        ("does not wait any\n    # more", ["any more"]),
        ("does not wait any\nmore", ["any more"]),
        ("the worker is told, and is told again", ["is told", "is told"]),
        ("task._fut_waiter is the future", []),
        ("condition._waiters", []),
        ("a settlement; manyfor goods; unsettled", []),
        ("the smallest value, in any case; many more", []),
    ],
)
def test_whole_words_are_found_in_any_case_and_across_lines(text: str, found: list[str]) -> None:
    """Parts of longer words and names of other libraries are skipped."""
    assert [word for _, word in check_words.uses(text)] == found


def test_each_use_is_printed_with_its_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 1; the check reads Python and Markdown files of folders."""
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("one = 1\n# the cargo\n", encoding="utf-8")
    (tmp_path / "package" / "data.txt").write_text("cargo", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("lest\n", encoding="utf-8")
    assert check_words.main([str(module.parent), str(readme)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"{module}:2: cargo", f"{readme}:1: lest"]


def test_clean_files_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check prints nothing and exits with 0."""
    (tmp_path / "module.py").write_text("one = 1\n", encoding="utf-8")
    assert check_words.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """A typing error in the command must not pass as a clean check."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_words.main([str(tmp_path / "nowhere")])
