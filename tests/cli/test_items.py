"""Items: reading them, decoding and encoding them, and processing a batch in a worker."""

from __future__ import annotations

import itertools
import json
import os
import select
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher.cli import _worker_function
from async_batcher.cli._errors import CommandError
from async_batcher.cli._import_string import ImportedFunction
from async_batcher.cli._items import open_items, read_chunks, split_lines
from async_batcher.cli._worker_function import (
    EACH_HINT,
    ISOLATE_HINT,
    BatchFailure,
    ItemFailure,
    ItemProcessor,
    decode,
    encode,
    worker_setup,
)
from async_batcher.exceptions import BadResultError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# Which items there are.


@pytest.mark.slow
@given(st.lists(st.lists(st.sampled_from(b"ab \xff\0"), max_size=5).map(bytes)), st.data())
def test_lines_are_whole_however_they_arrive(texts: list[bytes], data: st.DataObject) -> None:
    """Lines do not depend on where a read ends; LF or CR LF ends a line, the last one optionally."""
    whole = b"".join(text + data.draw(st.sampled_from([b"\n", b"\r\n"])) for text in texts)
    if texts and texts[-1]:
        whole = whole.removesuffix(b"\n").removesuffix(b"\r") if data.draw(st.booleans()) else whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert list(split_lines(filter(None, pieces))) == texts


@given(st.integers(1, 6))
def test_a_byte_order_mark_is_no_part_of_the_first_line(cut: int) -> None:
    """A byte order mark at the start is dropped, even if two reads split it; elsewhere it is kept."""
    text = b"\xef\xbb\xbfa\n\xef\xbb\xbfb"
    assert list(split_lines([text[:cut], text[cut:]])) == [b"a", b"\xef\xbb\xbfb"]
    assert list(split_lines([b"\xef\xbb\xbf"])) == []


def test_which_lines_are_items(tmp_path: Path) -> None:
    """Blank lines are items in lines of text only; lines are numbered as in an editor."""
    (tmp_path / "in").write_bytes(b"1\n\n \t\n2\n")
    for form, expected in (("jsonl", [1, 4]), ("files", [1, 4]), ("lines", [1, 2, 3, 4])):
        items: Any = open_items(str(tmp_path / "in"), form)  # type: ignore[arg-type]
        assert [number for number, _ in items] == expected


def test_a_directory_is_its_files(tmp_path: Path) -> None:
    """A directory stands for its regular files in path order; formats of lines reject it."""
    for name in ("b.txt", "a/c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling").symlink_to("nowhere")
    paths = [str(tmp_path / name).encode() for name in ("a.txt", "a/c.txt", "b.txt")]
    assert list(open_items(str(tmp_path), "files")) == list(enumerate(paths, 1))
    with pytest.raises(CommandError, match="is a directory; --format files"):
        open_items(str(tmp_path), "jsonl")


def test_a_directory_is_read_with_the_first_item(tmp_path: Path) -> None:
    """It is not read before: only a reader of items has to expect that it cannot be."""
    items = open_items(str(tmp_path), "files")
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        next(items)


def test_a_reader_that_is_left_closes_its_file(tmp_path: Path) -> None:
    """Closing an iterator that was not read to its end closes the file."""
    file = tmp_path / "items"
    file.write_text("1\n2\n")
    before = os.listdir("/dev/fd")  # noqa: PTH208 - no paths are wanted
    source = open_items(str(file), "jsonl")
    assert next(source) == (1, b"1")
    assert len(os.listdir("/dev/fd")) == len(before) + 1  # noqa: PTH208
    source.close()
    assert len(os.listdir("/dev/fd")) == len(before)  # noqa: PTH208


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_pipe_that_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader waits for a pipe that another process has made non-blocking."""
    theirs, ours = os.pipe()
    os.set_blocking(theirs, False)
    wait = select.select

    def wait_and_write(*files: Any) -> Any:
        os.write(ours, b"at last")
        return wait(*files)

    monkeypatch.setattr(select, "select", wait_and_write)
    monkeypatch.setattr(os, "dup", lambda _: theirs)  # of standard input
    source = read_chunks("-")
    assert next(source) == b"at last"
    os.close(ours)
    assert list(source) == []


# One item.


@pytest.mark.parametrize(
    ("raw", "form", "error"),
    [
        (
            b"{'a': 1}",
            "jsonl",
            "not JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (b"1 2", "jsonl", "not JSON: Extra data at column 3"),
        (b'"\xff"', "jsonl", "not UTF-8: byte 0xff at column 2"),
        (b"a\xe9", "lines", "not UTF-8: byte 0xe9 at column 2"),
        (b"[" * 100_000, "jsonl", "not JSON that can be read: nested too deeply"),
        (b"9" * 5000, "jsonl", "not JSON: Exceeds the limit"),
        (b"no/such/file", "files", "cannot be read: No such file or directory"),
        (b"null\0", "files", "is not a path: embedded null"),
        (b"/", "files", "cannot be read: Is a directory"),
    ],
)
def test_what_cannot_be_decoded(raw: bytes, form: Any, error: str) -> None:
    """The error says what is wrong with the item, and where."""
    failure = decode(raw, form)
    assert isinstance(failure, ItemFailure)
    assert failure.error.startswith(error)
    assert "\n" not in failure.error


class _Array:
    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.slow
@settings(max_examples=50)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_what_is_encoded_is_one_line_of_the_same(value: Any) -> None:
    """Any JSON value survives encoding and decoding, lone surrogates included."""
    line = encode(value)
    assert isinstance(line, bytes)
    assert b"\n" not in line
    assert decode(line, "jsonl") == value == json.loads(line)


def test_arrays_are_what_they_hold() -> None:
    """Objects with a ``tolist`` method are converted, also inside other values."""
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
    """The item fails alone, with one line of error; so does one whose result is an exception."""
    failure = encode(result)
    assert isinstance(failure, ItemFailure)
    assert failure.error.startswith(error)
    assert "\n" not in failure.error


# A batch.


def _process(
    function: Callable[[Any], Any], *raw: bytes, each: bool = False, isolates: bool = False
) -> list[bytes | ItemFailure | BatchFailure]:
    imported = ImportedFunction("here:function", __name__, function, None)
    processor = ItemProcessor(imported, "jsonl", each=each, isolates=isolates)
    return processor(list(enumerate(raw, 1)))


def test_bad_items_are_left_out_of_the_batch() -> None:
    """The function gets only the valid items; results keep the order of the batch."""
    seen: list[object] = []

    def double(batch: list[int]) -> Iterator[int]:
        seen.append(batch)
        return (2 * n for n in batch)

    answers = _process(double, b"1", b"nonsense", b"3", b"{")
    assert seen == [[1, 3]]
    assert (answers[0], answers[2]) == (b"2", b"6")
    assert all(isinstance(answers[i], ItemFailure) for i in (1, 3))


def test_a_batch_of_bad_items_alone_is_not_run() -> None:
    """The function is not called if no item of the batch is valid."""

    def fail(_: object) -> None:
        raise AssertionError

    assert all(isinstance(answer, ItemFailure) for answer in _process(fail, b"x", b"y"))


def test_each_item_fails_alone() -> None:
    """With ``each``, an item fails alone, and its traceback begins in the user's code."""

    def inverse(n: float) -> float:
        return 1 / n

    answers = _process(inverse, b"2", b"0", b"4", each=True)
    assert answers[::2] == [b"0.5", b"0.25"]
    failure = answers[1]
    assert isinstance(failure, ItemFailure)
    assert failure.error.startswith("ZeroDivisionError: ")
    assert "in inverse" in failure.traceback
    assert _worker_function.__file__ not in failure.traceback


def test_what_a_batch_raises_passes_through_to_be_isolated() -> None:
    """With isolation, an exception of a whole batch is raised for the batcher to find its cause."""
    with pytest.raises(ZeroDivisionError):
        _process(lambda batch: [1 / n for n in batch], b"0", b"1", isolates=True)
    with pytest.raises(ValueError, match="1 result for 2 items"):
        _process(lambda _: [1], b"1", b"2", isolates=True)


def test_a_batch_fails_with_a_traceback_of_user_code() -> None:
    """Without isolation, each item that the function got has the failure of its batch."""

    def inverse(batch: list[float]) -> list[float]:
        while batch:
            1 / batch.pop()
        return []

    failures = _process(inverse, b"1", b"nonsense", b"0")
    assert isinstance(failures[1], ItemFailure)
    assert isinstance(failures[0], BatchFailure)
    assert failures[0] == failures[2]
    (error, traceback), size, _ = failures[0]
    assert (error, size) == ("ZeroDivisionError: division by zero", 2)
    assert traceback.count("  File ") == 1
    assert "in inverse\n" in traceback


def _divide_by_list(batch: list[int]) -> list[float]:
    return [1 / batch]  # type: ignore[operator]  # as a function over one item


def _raise_key_error(_: list[int]) -> list[int]:
    msg = "a list"
    raise KeyError(msg)


@pytest.mark.parametrize(
    ("function", "items", "hint"),
    [
        (_divide_by_list, 2, EACH_HINT),
        (_divide_by_list, 1, EACH_HINT),
        (lambda batch: batch.upper(), 2, EACH_HINT),
        (float, 2, EACH_HINT),
        (len, 2, EACH_HINT),
        (lambda batch: batch * 2, 2, EACH_HINT),
        (lambda batch: [1 / (n - 1) for n in batch], 2, ISOLATE_HINT),
        (lambda batch: [n + "" for n in batch], 2, ISOLATE_HINT),
        (_raise_key_error, 2, ISOLATE_HINT),
        (lambda batch: [1 / (n - 1) for n in batch], 1, ""),
    ],
)
def test_which_option_helps(function: Callable[[Any], Any], items: int, hint: str) -> None:
    """It is ``--each`` if the function cannot do with a list, and isolation if an item may fail."""
    failures = _process(function, *[b"1"] * items)
    assert [failure.hint for failure in failures if isinstance(failure, BatchFailure)] == (
        [hint] * items
    )


def test_an_item_that_is_isolated_fails_with_a_traceback() -> None:
    """With isolation, an item alone in its batch fails with a traceback of the user's code."""

    def inverse(batch: list[float]) -> list[float]:
        return [1 / n for n in batch]

    (failure,) = _process(inverse, b"0", isolates=True)
    assert isinstance(failure, ItemFailure)
    assert failure.error.startswith("ZeroDivisionError: ")
    assert "in inverse" in failure.traceback
    assert _worker_function.__file__ not in failure.traceback


def test_a_missing_function_is_no_fault_of_an_item() -> None:
    """A function that cannot be imported in a worker fails the batch, not its items."""

    def missing(_: object) -> None:
        msg = "cannot be imported"
        raise PoolBrokenError(msg)

    for each in (True, False):
        with pytest.raises(PoolBrokenError):
            _process(missing, b"0", each=each, isolates=True)


class _OneByOne:
    """A sequence without ``__iter__``."""

    def __getitem__(self, index: int) -> int:
        return [7, 8][index]


@pytest.mark.parametrize(
    ("returned", "results"),
    [
        ((1, 2), [b"1", b"2"]),
        (iter([1, 2]), [b"1", b"2"]),
        ({1: "a", 2: "b"}.values(), [b'"a"', b'"b"']),
        (_OneByOne(), [b"7", b"8"]),
        (None, [b"null", b"null"]),
    ],
)
def test_what_a_function_may_return(returned: object, results: list[bytes]) -> None:
    """Any iterable with one result per item, or None, is accepted."""
    assert _process(lambda _: returned, b"1", b"2") == results


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ("ab", "returned one str for 2 items"),
        ({1: 2, 3: 4}, "returned one dict for 2 items"),
        (5, "returned one int for 2 items"),
        ([1], "returned 1 result for 2 items"),
        ([1, 2, 3, 4], "returned 4 results for 2 items"),
        (itertools.count(), "returned at least 3 results for 2 items"),
    ],
)
def test_what_a_function_may_not_return(returned: object, complaint: str) -> None:
    """Strings, mappings, single values and wrong counts are rejected, even from endless iterators."""
    with pytest.raises(BadResultError, match=complaint):
        _process(lambda _: returned, b"1", b"2", isolates=True)


# The set-up.


def _set_up(function: Callable[[], Any]) -> Iterator[None]:
    setup = worker_setup(ImportedFunction("here:function", __name__, print, function))
    assert setup is not None
    return setup()


def test_a_set_up_with_a_tear_down() -> None:
    """A generator runs up to its yield in the set-up, and the rest in the tear-down."""
    steps = []

    def set_up() -> Iterator[None]:
        steps.append("up")
        yield
        steps.append("down")

    generator = _set_up(set_up)
    next(generator)
    assert steps == ["up"]
    assert next(generator, None) is None
    assert steps == ["up", "down"]


@pytest.mark.parametrize("is_generator", [True, False])
def test_a_set_up_that_fails_is_no_fault_of_an_item(is_generator: bool) -> None:
    """A set-up that fails raises `PoolBrokenError` with one line of error."""

    def fail() -> None:
        msg = "no\nmodel"
        raise OSError(msg)

    def fail_later() -> Iterator[None]:
        fail()
        yield

    with pytest.raises(PoolBrokenError, match=r"^a worker cannot be set up: OSError: no model$"):
        next(_set_up(fail_later if is_generator else fail))
