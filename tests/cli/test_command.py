"""The command ``async-batcher``: arguments, help, and imports."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import async_batcher
from async_batcher import cli
from async_batcher.cli._parser import new_parser
from tests.support import scripts

if TYPE_CHECKING:
    import argparse

MODULES = sorted(Path(cli.__file__).parent.rglob("*.py"))
PUBLIC_MODULES = ("exceptions", "failures", "loops", "stats")
# Pure helpers that the package needs, too.
SHARED_MODULES = ("_batching.records.batch_cost", "_serialization.exception_text")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["demo", "--workers", "0"], "--workers: must be a number from 1, not '0'"),
        (["demo", "--workers", "-1"], "--workers: must be a number from 1, not '-1'"),
        (["demo", "--workers", "two"], "--workers: must be a number from 1, not 'two'"),
        (
            ["map", "m:f", "--max-batch-size", "0"],
            "--max-batch-size: must be a number from 1, not '0'",
        ),
        (["demo", "--loop", "curio"], "--loop: invalid choice: 'curio'"),
        (["demo", "--nonsense"], "--nonsense"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    """A request that cannot be met gives one line of error and exit status 2."""
    try:
        status: Any = cli.main(arguments)
    except SystemExit as exc:
        status = exc.code
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.startswith("async-batcher: ")
    assert complaint in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["demo"], ["tune", "m:f", "items"], ["map", "m:f"]], ids=lambda command: command[0]
)
def test_uvloop_is_asked_for_but_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """The error names the package to install."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert cli.main([*command, "--loop", "uvloop"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "uvloop is not installed; pip install" in output.err
    assert output.err.count("\n") == 1


def test_without_a_command_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The help names every subcommand."""
    assert cli.main([]) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("map", "tune", "demo"))


COMMANDS = ("map", "tune", "demo")


def help_of(monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """Return the help of a command, as in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command, "--help"])
    return stdout.getvalue()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_the_help_reads_well(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Descriptions and the help of each argument are sentences, and all lines fit a terminal."""
    parser = new_parser("async-batcher")
    commands = {
        name: found
        for action in parser._actions
        if isinstance(action.choices, dict)
        for name, found in action.choices.items()
    }
    assert tuple(commands) == COMMANDS
    one: argparse.ArgumentParser = commands[command[0]] if command else parser
    described = [one.description, *(action.help for action in one._actions if action.help)]
    assert len(described) >= 3
    for text in described:
        assert text
        assert re.match(r"[A-Z]", text), text
        assert text.endswith("."), text
    assert max(map(len, help_of(monkeypatch, *command).splitlines())) < 80


def test_every_example_of_the_help_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of each command ends with an example of it, and the main one with all of them."""
    for name in COMMANDS:
        _, found, example = help_of(monkeypatch, name).partition("\nexample:\n  async-batcher ")
        assert found
        arguments = new_parser("async-batcher").parse_args(example.splitlines()[0].split())
        assert arguments.command.split(".")[2] == name
    examples = help_of(monkeypatch).partition("\nexamples:\n")[2].splitlines()
    assert [line.split()[:2] for line in examples] == [["async-batcher", name] for name in COMMANDS]
    for line in examples:
        new_parser("async-batcher").parse_args(line.split()[1:])


@pytest.mark.slow
def test_the_example_of_map_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The module that the help shows works with the command that it shows."""
    example = help_of(monkeypatch, "map").partition("\nexample:\n")[2]
    command, _, module = example.partition("The file parse.py:")
    (tmp_path / "parse.py").write_text(textwrap.dedent(module))
    (tmp_path / "pages.jsonl").write_text('{"text": "two words"}\n{"text": ""}\n')
    arguments = command.split()
    assert arguments.pop(0) == "async-batcher"
    subprocess.run(
        [sys.executable, "-m", "async_batcher", *arguments],
        cwd=tmp_path,
        env=scripts.environment(),
        check=True,
    )
    assert (tmp_path / "results.jsonl").read_text() == "2\n0\n"


def test_it_knows_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the version of the package, which the distribution has, too."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"async-batcher {async_batcher.__version__}\n"
    with contextlib.suppress(PackageNotFoundError):
        assert version("async-batcher") == async_batcher.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["map", "--help"], ["tune", "--help"], ["demo", "--help"], []],
)
def test_help_imports_next_to_nothing(arguments: list[str]) -> None:
    """Help imports neither asyncio nor cloudpickle, nor a subcommand's module."""
    program = (
        "import sys, atexit\nfrom async_batcher.cli import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=scripts.environment(),
        check=False,
    )
    loaded = set(done.stderr.split())
    assert done.returncode == 0
    assert "async-batcher" in done.stdout
    assert not loaded & {
        "asyncio",
        "cloudpickle",
        "concurrent.futures",
        "multiprocessing",
        "uvloop",
        "sqlite3",
        "tqdm",
    }
    ours = {name for name in loaded if name.startswith("async_batcher")}
    assert ours == {
        "async_batcher",
        "async_batcher.cli",
        "async_batcher.cli._errors",
        "async_batcher.cli._parser",
    }


@pytest.mark.slow
def test_a_worker_imports_no_asyncio() -> None:
    """The modules that ``map`` and ``tune`` load in workers import no asyncio."""
    program = (
        "import sys\nimport async_batcher.cli._worker_function, async_batcher.cli._import_string\n"
        "import async_batcher.cli.tune.alone\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=scripts.environment(),
        check=True,
    )
    assert not set(done.stdout.split()) & {
        "asyncio",
        "argparse",
        "sqlite3",
        "async_batcher.batcher",
        "logging",
    }


def _imports(path: Path) -> list[tuple[str, str]]:
    """Return the modules of this package that a module imports, each with a name or an empty string."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.partition(".")[0] == "async_batcher"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(MODULES[0].parent)))
def test_public_names_only(path: Path) -> None:
    """The command imports only public names of the library, and uses no private attribute."""
    for module, name in _imports(path):
        if module == "async_batcher":
            assert name in {*async_batcher.__all__, "__version__"}, name
        elif not module.startswith("async_batcher.cli"):
            public = module.removeprefix("async_batcher.")
            if public in SHARED_MODULES:
                continue
            assert public in PUBLIC_MODULES, module
            assert name in getattr(
                sys.modules.get(module) or __import__(module, fromlist=[name]), "__all__", ()
            ), name
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_of_python = node.attr in (
                "_exit",
                "_asdict",
                "_fields",
                "_replace",
                "_SubParsersAction",
            )
            assert is_own or is_of_python, f"{node.attr} in line {node.lineno}"
