"""What the README says is true of its programs, links and options."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_batcher import AsyncBatcher, WorkerPool

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PROGRAMS = [block for block in _BLOCKS if not block.startswith("# ")]
MODULES = {name: block for block in _BLOCKS for name in re.findall(r"\A# (\w+\.py)\n", block)}
EXAMPLES = sorted((ROOT / "tests/examples").glob("[a-z]*.py"))


def _run(program: Path, folder: Path) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    # Where a program shows a failure.
    log = re.compile(r"\S+: a batch of \d+ items failed: |\S+: of a failed batch of \d+ items, ")
    assert (
        finished.returncode,
        [line for line in finished.stderr.splitlines() if not log.match(line)],
    ) == (0, [])
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_every_program_in_the_readme_runs(index: int, tmp_path: Path) -> None:
    """Without a warning, with the output that the README shows."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[index])
    printed = _run(program, tmp_path).strip()
    assert printed
    if index == 0:
        assert f"prints `{printed}`" in README
        assert PROGRAMS[0].count("\n") == 12
    if "partial(" in PROGRAMS[index]:
        assert f"prints `{printed}`" in README
    if "process_many" in PROGRAMS[index]:
        assert "prints `{}` and `{}`".format(*printed.splitlines()) in README
    if "isolate_failures" in PROGRAMS[index]:
        assert f"prints `{printed.splitlines()[0]}`" in README


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
def test_the_run_in_the_readme(tmp_path: Path) -> None:
    """Its command over similar files: as many items fail, for the same reasons."""
    (tmp_path / "crunch.py").write_text(MODULES["crunch.py"])
    names = [f"file {number}" for number in range(212)]
    names[39], names[99] = "empty.py", "nothing.py"
    for number, name in enumerate(names):
        if name != "nothing.py":
            (tmp_path / name).write_bytes(b"" if name == "empty.py" else b"%d" % number * 99)
    (tmp_path / "files.txt").write_text("\n".join(names))
    (command,) = re.findall(r"^\$ async-batcher (map .*) --resume$", README, flags=re.MULTILINE)
    assert f"$ async-batcher {command}\n" in README
    done = subprocess.run(
        [sys.executable, "-m", "async_batcher", *command.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1,
        "async-batcher: 2 of 212 items failed; see bad.jsonl\n",
    )
    assert done.stderr in README
    shown = [json.loads(line) for line in re.findall(r"^\{.*\}$", README, flags=re.MULTILINE)]
    failed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [{**line, "traceback": ""} for line in failed] == [
        {**line, "traceback": ""} for line in shown
    ]
    assert [bool(line["traceback"]) for line in failed] == [
        bool(line["traceback"]) for line in shown
    ]
    assert len((tmp_path / "ratios.jsonl").read_text().splitlines()) == 210


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
def test_the_tuning_in_the_readme(tmp_path: Path) -> None:
    """Its command prints what the README shows, apart from the figures."""
    (tmp_path / "titles.py").write_text(MODULES["titles.py"])
    (tmp_path / "titles.txt").write_text("one title\nanother title\n")
    (tmp_path / "texts.txt").write_text("a text\nanother text\n" * 20)
    ((command, shown),) = re.findall(
        r"^\$ async-batcher (tune .*) --plot frontier.svg\n(.*?)```",
        README,
        flags=re.MULTILINE | re.DOTALL,
    )
    done = subprocess.run(
        [sys.executable, "-m", "async_batcher", *command.split(), "--time", "8", "--workers", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

    def heads(text: str) -> list[str]:
        """Return how lines begin, except for those that depend on measurements."""
        lines = (re.split(r"[\d=:]|  ", line)[0].strip() for line in text.splitlines())
        said = [
            line
            for line in lines
            if not line.startswith(("- ", "The machine", "executor", "max_", "No line"))
        ]
        return [line for line in said if line]

    # Whether these are worth saying depends on what was measured, too.
    may_lack = {"A batch costs", "The way to a worker process and back adds"}
    assert {line for line in heads(shown) if line not in heads(done.stdout)} <= may_lack


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    # a server, which tests/integrations/test_service.py starts
    [path for path in EXAMPLES if path.stem != "service"],
    ids=lambda path: path.stem,
)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    """Without a warning, and with output."""
    assert _run(example, tmp_path)


def test_every_example_is_linked() -> None:
    """The README leads to each example."""
    assert EXAMPLES
    assert [path for path in EXAMPLES if f"(tests/examples/{path.name})" not in README] == []


def test_every_link_to_a_file_is_valid() -> None:
    """A relative link names a file; the text of a link to a test names a test in it."""
    links = re.findall(r"\[([^\]]+)\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [target for _, target in links if not (ROOT / target).is_file()] == []
    tests = [
        (name.strip("`"), target) for name, target in links if name.startswith(("`test_", "`Test"))
    ]
    assert tests
    texts = {target: (ROOT / target).read_text(encoding="utf-8") for _, target in tests}
    assert [
        name
        for name, target in tests
        if f"def {name}(" not in texts[target] and f"\n{name} =" not in texts[target]
    ] == []


def _options(title: str) -> dict[str, str]:
    """Return the options in the table of a section, with their defaults."""
    section = README.partition(f"## {title}")[2].partition("##")[0]
    return dict(
        re.findall(r"^\| `(\w+)`(?:, `\w+`)? \|[^|]*\| ([^|]+?) \|", section, flags=re.MULTILINE)
    )


def test_the_options_are_those_of_the_batcher() -> None:
    """The table of options has each option, with its default."""
    rows = _options("Options")
    rows.pop("setup_worker")
    parameters = inspect.signature(AsyncBatcher).parameters.values()
    assert rows == {p.name: str(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_options_are_those_of_the_pool() -> None:
    """The table has each option of `WorkerPool`; ``initargs`` is with ``initializer``."""
    parameters = inspect.signature(WorkerPool).parameters.values()
    assert _options("A pool of workers") == {
        p.name: str(p.default) for p in parameters if p.name != "initargs"
    }
