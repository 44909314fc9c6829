"""What the README says is true of its programs, links and options."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from async_batcher import AsyncBatcher, WorkerPool, exceptions
from tests.support import scripts

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
    log = re.compile(r"\S+: a batch of \d+ items? failed: |\S+: of a failed batch of \d+ items?, ")
    assert (
        finished.returncode,
        [line for line in finished.stderr.splitlines() if not log.match(line)],
    ) == (0, [])
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_every_program_in_the_readme_runs(index: int, tmp_path: Path) -> None:
    """Without a warning, and each line that prints has what it prints as its comment."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[index])
    shown = re.findall(r"^ *print\(.*\)  # (.+)$", PROGRAMS[index], flags=re.MULTILINE)
    assert len(shown) == PROGRAMS[index].count("print(") > 0
    assert _run(program, tmp_path).splitlines() == shown


def test_the_first_program_is_short() -> None:
    """It fits on the first screen."""
    assert len([line for line in PROGRAMS[0].splitlines() if line]) <= 12


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
def test_the_web_application_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifespan of ``app.py`` starts and stops the batcher, and its endpoint answers."""
    pytest.importorskip("fastapi")
    (tmp_path / "app.py").write_text(MODULES["app.py"])
    check = """
        import asyncio
        import app

        async def main():
            async with app.app.router.lifespan_context(app.app):
                print(await app.classify_text("Is it?"), await app.classify.is_running())
            print(await app.classify.is_running())

        asyncio.run(main())
        """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(check))
    assert _run(program, tmp_path) == "question True\nFalse\n"


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


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_every_link_is_valid(page: str) -> None:
    """A relative link names a file, or a heading; the text of a link to a test, a test in it."""
    path = ROOT / page
    links = _links(path.read_text(encoding="utf-8"))
    assert links
    for name, target in links:
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.is_file(), target
        text = linked.read_text(encoding="utf-8")
        assert not heading or heading in _headings(text), target
        if name.startswith(("`test_", "`Test")):
            test = name.strip("`")
            assert f"def {test}(" in text or f"class {test}" in text or f"\n{test} =" in text, name


def _links(page: str) -> list[tuple[str, str]]:
    return re.findall(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)", page)


def _headings(page: str) -> list[str]:
    """Return the anchors that GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


def test_every_promise_links_to_a_test() -> None:
    """The list in ``tests/README.md``."""
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    promises = page.partition("# What the project promises")[2].split("\n- ")[1:]
    assert len(promises) >= 49
    assert [promise for promise in promises if "](" not in promise] == []


def test_the_readme_is_short() -> None:
    """At most 220 lines are shown before a reader opens a reference."""
    shown = re.sub(r"<details>.*?</details>\n", "", README, flags=re.DOTALL)
    assert len(shown.splitlines()) <= 220


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_socket_has_an_address(tmp_path: Path) -> None:
    """While workers run, no socket of the program's processes can be connected to."""
    program = """
        import asyncio, os
        from async_batcher import batched
        from tests.conftest import descendants

        @batched(executor="process", max_workers=2)
        def sockets(batch):
            return [inodes(os.getpid())] * len(batch)

        def inodes(pid):
            links = [os.readlink(file.path) for file in os.scandir(f"/proc/{pid}/fd") if os.path.islink(file.path)]
            return {link[8:-1] for link in links if link.startswith("socket:")}

        async def main():
            async with sockets:
                found = await sockets(0)
                for pid in (os.getpid(), *descendants()):
                    found |= inodes(pid)
            assert len(found) > 2, found
            for table in ("tcp", "tcp6", "udp", "udp6"):
                rows = [line.split() for line in open(f"/proc/net/{table}")][1:]
                print(table, [row for row in rows if row[9] in found])
            rows = [line.split() for line in open("/proc/net/unix")][1:]
            assert any(row[6] in found for row in rows)
            print("unix", [row for row in rows if row[6] in found and len(row) > 7])

        asyncio.run(main())
        """
    printed = scripts.run_script(tmp_path, program)
    assert printed.splitlines() == ["tcp []", "tcp6 []", "udp []", "udp6 []", "unix []"]


def _options(title: str) -> dict[str, str]:
    """Return the options in the table of a reference, with their defaults."""
    reference = README.partition(f"<details><summary><b>{title}</b>")[2].partition("</details>")[0]
    return dict(
        re.findall(r"^\| `(\w+)`(?:, `\w+`)? \| ([^|]+?) \|", reference, flags=re.MULTILINE)
    )


def test_the_options_are_those_of_the_batcher() -> None:
    """The table of options has each option, with its default."""
    rows = _options("Options and methods")
    rows.pop("setup_worker")
    parameters = inspect.signature(AsyncBatcher).parameters.values()
    assert rows == {p.name: str(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_options_are_those_of_the_pool() -> None:
    """The table has each option of `WorkerPool`; ``initargs`` is with ``initializer``."""
    parameters = inspect.signature(WorkerPool).parameters.values()
    assert _options("WorkerPool") == {
        p.name: str(p.default) for p in parameters if p.name != "initargs"
    }


@pytest.mark.parametrize(
    ("title", "kind"), [("Options and methods", AsyncBatcher), ("WorkerPool", WorkerPool)]
)
def test_the_methods_have_these_parameters(title: str, kind: type) -> None:
    """The tables show each parameter of a method, with its default."""
    reference = README.partition(f"<details><summary><b>{title}</b>")[2].partition("</details>")[0]
    rows = re.findall(r"`(?:await )?(?:batcher|pool)\.(\w+)\(([^`]*)\)`", reference)
    assert len(rows) >= 6
    for name, shown in rows:
        parameters = [*inspect.signature(getattr(kind, name)).parameters.values()][1:]
        words = [f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in parameters]
        defaults = ["" if p.default is p.empty else f"={p.default}" for p in parameters]
        assert shown == ", ".join(map("".join, zip(words, defaults, strict=True))), name


def test_the_errors_are_those_of_the_package() -> None:
    """The table has each class of `async_batcher.exceptions`, and no other."""
    reference = README.partition("<details><summary><b>Errors</b>")[2].partition("</details>")[0]
    named = set(re.findall(r"`(\w+(?:Error|Exception))`", reference))
    classes = inspect.getmembers(exceptions, inspect.isclass)
    own = {name for name, found in classes if found.__module__ == exceptions.__name__}
    assert named - {"CancelledError", "RuntimeError"} == own
