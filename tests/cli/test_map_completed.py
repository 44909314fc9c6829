"""The command ``async-batcher map --resume``, where there is no interrupted run."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher.cli._errors import CommandError
from async_batcher.cli.map.completed import CompletedRun, find_completed
from async_batcher.cli.map.journal import RunHeader
from async_batcher.cli.map.output import FinishedItem, ResumableOutput
from tests.support.map_command import files_in, numbers, run, run_here

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="named pipes")

HEADER = RunHeader("digest", "module:function", "jsonl", each=False, unordered=False)


@pytest.fixture(name="out")
def _out(tmp_path: Path) -> Path:
    """Return the path of an output that a run has completed."""
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.probe", b"1")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes")
    probe.unlink()
    _complete(tmp_path / "out")
    return tmp_path / "out"


def _complete(out: Path, *lines: bytes) -> None:
    with contextlib.closing(ResumableOutput(str(out), None)) as output:
        output.start(HEADER)
        items = lines or (b"1\n", b"2\n", b"")
        output.write([FinishedItem(n, line, not line) for n, line in enumerate(items, 1)])
        output.finish()


def _resume(out: Path, header: RunHeader = HEADER) -> CompletedRun | None:
    with contextlib.closing(ResumableOutput(str(out), None)) as output:
        return output.resume(header)


def _state(out: Path) -> tuple[bytes, int, list[Path]]:
    return out.read_bytes(), out.stat().st_mtime_ns, list(out.parent.iterdir())


def test_a_complete_run_is_recognized(out: Path) -> None:
    """Nothing is begun anew, and no file changes."""
    before = _state(out)
    completed = _resume(out)
    assert completed is not None
    assert (completed.done, completed.failed) == (3, 1)
    assert completed.description == "is complete (3 items, 1 of them failed)"
    assert _state(out) == before


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        (HEADER._replace(input="other"), "the input has changed"),
        (HEADER._replace(target="other:one"), "the function was 'module:function'"),
        (HEADER._replace(records=True), "it was run without --records"),
    ],
)
def test_another_run_does_not_replace_a_complete_one(
    out: Path, header: RunHeader, difference: str
) -> None:
    """It is rejected with the difference, and no file changes."""
    before = _state(out)
    with pytest.raises(CommandError, match=f"{difference}; --restart begins anew"):
        _resume(out, header)
    assert _state(out) == before


@pytest.mark.parametrize("how", ["edited", "of the same size", "of another program"])
def test_an_output_of_which_no_run_is_known(out: Path, how: str) -> None:
    """It is neither taken for complete nor overwritten."""
    if how == "of another program":
        out.unlink()
    out.write_text("3\n4\n" if how == "of the same size" else "3\n")
    os.utime(out, ns=(0, 0))
    before = _state(out)
    with pytest.raises(CommandError, match="out' exists, and there is no interrupted run"):
        _resume(out)
    assert _state(out) == before


def test_a_file_system_without_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is complete cannot be marked; it is not overwritten either."""

    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "setxattr", fail, raising=False)
    _complete(tmp_path / "out")
    with pytest.raises(CommandError, match="there is no interrupted run to resume; --restart"):
        _resume(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"1\n2\n"


def test_an_empty_output(out: Path) -> None:
    """It is complete if a run has written it; otherwise, there is nothing to lose."""
    _complete(out, b"", b"")
    assert out.read_bytes() == b""
    completed = _resume(out)
    assert completed is not None
    assert completed.failed == 2
    out.unlink()
    out.touch()
    assert _resume(out) is None


@pytest.mark.parametrize("mark", [b"", b"[]", b"{}", b'{"state": 1}', b"\xff"])
def test_a_mark_that_cannot_be_read(out: Path, mark: bytes) -> None:
    """The output counts as one of which no run is known."""
    os.setxattr(out, "user.async_batcher.run", mark)
    assert find_completed(out) is None


def test_a_run_that_was_killed_at_once_over_an_older_output(out: Path) -> None:
    """``--resume`` is for that run, and begins it anew."""
    journal = out.with_name("out.journal")
    with contextlib.closing(ResumableOutput(str(out), None)) as output:
        output.start(HEADER._replace(input="other"))
        left = {path: path.read_bytes() for path in output._journal.files if path.exists()}
    for path, content in left.items():
        path.write_bytes(content)
    assert journal in left
    assert _resume(out, HEADER._replace(input="other")) is None


@pytest.mark.slow
@pytest.mark.usefixtures("out")
def test_resuming_a_complete_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says so, with the exit status of the run; another input is rejected."""
    (work / "out").unlink()
    source = numbers(work, 8)
    arguments = ("work:fail_at_5", source, "-o", "out", "--isolate", "--max-batch-size", 1)
    assert run(*arguments)[0] == 1
    before = _state(work / "out")
    said = "async-batcher: 'out' is complete (8 items, 1 of them failed); --restart begins anew\n"
    assert run_here(capsys, *arguments, "--resume") == (1, said)
    numbers(work, 3)
    status, said = run_here(capsys, *arguments, "--resume")
    assert status == 2
    assert "'out' cannot be resumed: the input has changed; --restart begins anew" in said
    assert _state(work / "out") == before
    assert run("work:mean", source, "-o", "out", "--restart") == (0, "", "")
    assert run_here(capsys, "work:mean", source, "-o", "out", "--resume") == (
        0,
        "async-batcher: 'out' is complete (3 items); --restart begins anew\n",
    )
    assert files_in(work) - {"__pycache__"} == {"out"}
