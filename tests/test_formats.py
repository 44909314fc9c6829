"""What an item is: lines, JSON Lines and files, there and back; and the function that the user names."""

from __future__ import annotations

import json
import os
import pickle
import select
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import _formats
from async_batcher._formats import Failure, InputError, Job, decode, encode, items, lines, read_items
from async_batcher._target import Target, TargetError, load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# Which items there are.


@pytest.mark.slow
@given(st.lists(st.lists(st.sampled_from(b"ab \xff\0"), max_size=5).map(bytes)), st.data())
def test_lines_are_whole_however_they_arrive(texts: list[bytes], data: st.DataObject) -> None:
    """Wherever a read ends, the same lines come out; LF and CR LF end a line, and the last one needs no end."""
    whole = b"".join(text + data.draw(st.sampled_from([b"\n", b"\r\n"])) for text in texts)
    if texts and texts[-1]:
        whole = whole.removesuffix(b"\n").removesuffix(b"\r") if data.draw(st.booleans()) else whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert list(lines(filter(None, pieces))) == texts


@given(st.integers(1, 6))
def test_a_byte_order_mark_is_no_part_of_the_first_line(cut: int) -> None:
    """Even if it arrives in two reads; elsewhere it is what it is."""
    text = b"\xef\xbb\xbfa\n\xef\xbb\xbfb"
    assert list(lines([text[:cut], text[cut:]])) == [b"a", b"\xef\xbb\xbfb"]
    assert list(lines([b"\xef\xbb\xbf"])) == []


def test_which_lines_are_items() -> None:
    """Blank lines are none, but for lines of text; the numbers are those that an editor shows."""
    found = [b"1", b"", b" \t", b"2"]
    assert list(items(found, "jsonl")) == list(items(found, "files")) == [(1, b"1"), (4, b"2")]
    assert [number for number, _ in items(found, "lines")] == [1, 2, 3, 4]


def test_a_directory_is_its_files(tmp_path: Path) -> None:
    """All regular files below it, in the order of their paths; a directory is refused where lines are expected."""
    for name in ("b.txt", "a/c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_items(str(tmp_path), "files", 9) == [b"a.txt", b"a/c.txt", b"b.txt"]
    with pytest.raises(InputError, match="is a directory; --format files"):
        read_items(str(tmp_path), "jsonl", 1)


def test_the_first_items_of_an_input(tmp_path: Path) -> None:
    """As many as asked for are decoded, and what comes after them is not looked at."""
    file = tmp_path / "items"
    file.write_bytes(b'\n{"a": 1}\n[2]\nnonsense\n')
    assert read_items(str(file), "jsonl", 2) == [{"a": 1}, [2]]
    assert read_items(str(file), "lines", 2) == ["", '{"a": 1}']
    with pytest.raises(InputError, match=r"^line 4: not JSON: Expecting value at column 1$"):
        read_items(str(file), "jsonl", 3)
    with pytest.raises(InputError, match=r"^there is no file '.*none'$"):
        read_items(str(tmp_path / "none"), "jsonl", 3)


def test_a_reader_that_is_left_closes_its_file(tmp_path: Path) -> None:
    """A source that is not read to its end gives its descriptor back when it is closed."""
    file = tmp_path / "items"
    file.write_text("1\n2\n")
    before = os.listdir("/dev/fd")  # noqa: PTH208 - no paths are wanted
    source = _formats.open_input(str(file), "jsonl")
    assert next(source) == (1, b"1")
    assert len(os.listdir("/dev/fd")) == len(before) + 1  # noqa: PTH208
    source.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/dev/fd")) == len(before)  # noqa: PTH208


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_pipe_that_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has made it so: it is waited for as any other."""
    theirs, ours = os.pipe()
    os.set_blocking(theirs, False)
    wait = select.select

    def wait_and_write(*files: Any) -> Any:
        os.write(ours, b"at last")
        return wait(*files)

    monkeypatch.setattr(select, "select", wait_and_write)
    monkeypatch.setattr(os, "dup", lambda _: theirs)  # of standard input
    source = _formats.chunks(None)
    assert next(source) == b"at last"
    os.close(ours)
    assert list(source) == []


# One item.


@pytest.mark.parametrize(
    ("raw", "form", "error"),
    [
        (b"{'a': 1}", "jsonl", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"1 2", "jsonl", "not JSON: Extra data at column 3"),
        (b'"\xff"', "jsonl", "not UTF-8: byte 0xff at column 2"),
        (b"a\xe9", "lines", "not UTF-8: byte 0xe9 at column 2"),
        (b"[" * 100_000, "jsonl", "not JSON that can be read: nested too deeply"),
        (b"9" * 5000, "jsonl", "not JSON: Exceeds the limit"),
        (b"no/such/file", "files", "cannot be read: No such file or directory"),
        (b"null\0", "files", "is no path: embedded null"),
        (b"/", "files", "cannot be read: Is a directory"),
    ],
)
def test_what_cannot_be_decoded(raw: bytes, form: Any, error: str) -> None:
    """It says what is wrong with it, and where."""
    failure = decode(raw, form)
    assert isinstance(failure, Failure)
    assert failure.error.startswith(error)
    assert "\n" not in failure.error


class _Array:
    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.slow
@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_what_is_encoded_is_one_line_of_the_same(value: Any) -> None:
    """Whatever JSON can hold comes out as it was, halves of surrogate pairs too."""
    line = encode(value)
    assert isinstance(line, bytes)
    assert b"\n" not in line
    assert decode(line, "jsonl") == value == json.loads(line)


def test_arrays_are_what_they_hold() -> None:
    """Objects with a ``tolist`` are converted, inside others too."""
    assert encode({"a": _Array()}) == b'{"a": [1, 2]}'


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ({1, 2}, "the result is not JSON: TypeError: a value of type set"),
        (float("nan"), "the result is not JSON: ValueError: Out of range float"),
        (_Array, "the result is not JSON: TypeError: a value of type type"),
        ({(1, 2): 3}, "the result is not JSON: TypeError: keys must be"),
        (ValueError("mine\nand more"), "ValueError: mine and more"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_cannot_be_encoded(result: object, error: str) -> None:
    """It fails alone, and says why in one line; an exception among the results is its item's error."""
    failure = encode(result)
    assert isinstance(failure, Failure)
    assert failure.error.startswith(error)
    assert "\n" not in failure.error


# A batch.


def _job(function: Callable[[Any], Any], form: Any = "jsonl", *, each: bool = False) -> Job:
    return Job(Target("here:function", __name__, function, None), form, each=each)


def test_bad_items_are_left_out_of_the_batch() -> None:
    """The function gets the good ones; each answer is in the place of its item."""
    seen: list[object] = []

    def double(batch: list[int]) -> Iterator[int]:
        seen.append(batch)
        return (2 * n for n in batch)

    answers = _job(double)([b"1", b"nonsense", b"3", b"{"])
    assert seen == [[1, 3]]
    assert (answers[0], answers[2]) == (b"2", b"6")
    assert all(isinstance(answers[i], Failure) for i in (1, 3))


def test_a_batch_of_bad_items_alone_is_not_run() -> None:
    """There is nothing to call the function with."""

    def fail(_: object) -> None:
        raise AssertionError

    assert all(isinstance(answer, Failure) for answer in _job(fail)([b"x", b"y"]))


def test_each_item_fails_alone() -> None:
    """With a function over one item; its traceback shows the user's code and nothing of ours."""

    def inverse(n: float) -> float:
        return 1 / n

    answers = _job(inverse, each=True)([b"2", b"0", b"4"])
    assert answers[::2] == [b"0.5", b"0.25"]
    failure = answers[1]
    assert isinstance(failure, Failure)
    assert failure.error.startswith("ZeroDivisionError: ")
    assert "in inverse" in failure.traceback
    assert _formats.__file__ not in failure.traceback


def test_what_a_batch_raises_passes_through() -> None:
    """So that the batcher can find the guilty item, or end the run."""
    with pytest.raises(ZeroDivisionError):
        _job(lambda batch: [1 / n for n in batch])([b"0"])
    with pytest.raises(ValueError, match="1 results for 2 items"):
        _job(lambda _: [1])([b"1", b"2"])


# The function that the user names.


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, from which modules can be imported that are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


_MODULE = """
from async_batcher import AsyncBatcher, batched

def double(batch): return [2 * n for n in batch]
async def slow(batch): return batch
def two(a, b): return a
number = 5
class Batcher(AsyncBatcher):
    def setup_worker(self): self.is_set_up = True
    def process_batch(self, batch): return batch
    @staticmethod
    def plain(batch): return batch
ready = Batcher()
decorated = batched(double)
"""


def test_functions_that_are_found(folder: Path) -> None:
    """By module or file, inside a class, or as what a batcher runs; with its set-up where it has one."""
    (folder / "found_here.py").write_text(_MODULE)
    module = load_target("found_here:double")
    assert (module.name, module.module, module.function([1]), module.setup) == ("found_here:double", "found_here", [2], None)
    assert load_target("found_here:decorated").function([1]) == [2]
    assert load_target("found_here:Batcher.plain").function([1]) == [1]
    ready = load_target("found_here:ready")
    assert ready.setup is not None
    ready.setup()
    assert sys.modules["found_here"].ready.is_set_up
    (folder / "below").mkdir()
    (folder / "below" / "found_there.py").write_text(_MODULE)
    assert load_target("below/found_there.py:double").module == "found_there"
    assert sys.path[0] == str(folder / "below")


def test_a_function_crosses_by_name(folder: Path) -> None:
    """What is pickled is its name, so that a worker imports the module."""
    (folder / "by_name.py").write_text(_MODULE)
    target = load_target("by_name:double")
    data = pickle.dumps(target)
    assert b"by_name" in data
    assert pickle.loads(data) == target  # noqa: S301 - our own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "'wrong' does not name a function: write MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("wrong.thing", "did you mean 'wrong:thing'?"),
        (":f", "does not name a function"),
        ("wrong_module_that_is_none:f", r"No module named 'wrong_module_that_is_none' \(tried: .*, then"),
        ("json.nothing:f", "No module named 'json.nothing'"),
        ("broken:f", r"module 'broken' cannot be imported: ZeroDivisionError: .* \(.*broken.py, line 2\)"),
        ("exits:f", "module 'exits' cannot be imported: SystemExit: no"),
        (
            "lacks:f",
            r"module 'lacks' cannot be imported: ModuleNotFoundError: No module named 'missing_one' \(.*lacks.py",
        ),
        ("syntax:f", "module 'syntax' cannot be imported: SyntaxError: "),
        ("there:doubel", "'there' has no 'doubel'; did you mean 'double'?"),
        ("there:double.more", "'there.double' has no 'more'"),
        ("there:number", "'there:number' is no function but of type int"),
        ("there:slow", "is an async function"),
        ("there:two", r"takes \(a, b\); it must take one argument"),
        ("there:Batcher", "is a class; name an instance"),
        ("none.py:f", "there is no file 'none.py'"),
        ("./there:f", "the name of a module's file ends in '.py'"),
        ("json.py:f", "'json' is the name of another module"),
    ],
)
def test_functions_that_are_not_found(folder: Path, name: str, message: str) -> None:
    """One line says what was tried and what is wrong."""
    (folder / "there.py").write_text(_MODULE)
    (folder / "there").touch()
    (folder / "broken.py").write_text("\n1 / 0\n")
    (folder / "exits.py").write_text("import sys; sys.exit('no')")
    (folder / "lacks.py").write_text("import missing_one")
    (folder / "syntax.py").write_text("def")
    (folder / "json.py").touch()
    with pytest.raises(TargetError, match=message) as caught:
        load_target(name)
    assert "\n" not in str(caught.value)
