"""What the figures were measured on, with which versions, and how much they vary (pure)."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from benchmarks.libraries.names import DISTRIBUTION, OLD, OURS
from benchmarks.report.results import Files, Results, read

if TYPE_CHECKING:
    from collections.abc import Mapping


def environment(files: Files) -> str:
    """Write machine, system, versions, commit and dates; files that share them in one block."""
    groups: dict[str, list[str]] = {}
    for name, results in files.items():
        groups.setdefault(_machine(results), []).append(name)
    blocks = []
    for machine, names in groups.items():
        versions = {key: it for one in names for key, it in _versions(files[one]).items()}
        dates = dict.fromkeys(sorted(files[one]["datetime"][:10] for one in names))
        files_of = ", ".join(f"`{name}.json`" for name in names)
        heading = [f"{files_of}:", ""] if len(groups) > 1 else []
        lines = [machine, f"- Versions: {_listed(versions)}", f"- Measured: {' to '.join(dates)}"]
        blocks.append("\n".join([*heading, *lines]))
    return "\n\n".join(blocks)


def machines(files: Files) -> str:
    """Write a line for each machine and version of Python, and one with the other versions."""
    dates: dict[str, list[str]] = {}
    versions: dict[str, str] = {}
    for results in files.values():
        about = results["machine_info"]
        python = f"{about['python_implementation']} {about['python_version']}"
        machine = f"{about['processor']}, {about['cores']} cores, {about['system']}, {python}"
        dates.setdefault(machine, []).append(results["datetime"][:10])
        versions |= _versions(results)
    lines = [
        f"- {machine}, measured {' to '.join(dict.fromkeys((min(known), max(known))))}"
        for machine, known in dates.items()
    ]
    return "\n".join([*lines, f"- {_listed(versions)}"])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def noise(files: Files) -> str:
    """Write how far apart the rounds of this project's figures are."""
    records = read(files.values())
    counts = [len(record.rounds(OURS)) for record in records]
    widths = []
    for record, count in zip(records, counts, strict=True):
        spread = record.spread(OURS)
        if count > 1 and spread is not None and spread["median"]:
            widths.append(((spread["q3"] - spread["q1"]) / spread["median"], record.title))
    if not widths:
        return "Each figure has one round, so the spread is not known."
    worst, where = max(widths)
    typical = median(width for width, _ in widths)
    return (
        f"Each figure has {min(counts)} to {max(counts)} rounds. The quartiles of this project's "
        f"rounds are {typical:.0%} of their median apart in the typical benchmark, and "
        f"{worst:.0%} in the noisiest ({where})."
    )


def _machine(results: Results) -> str:
    about, commit = results["machine_info"], results["commit_info"]
    changed = ", with changes on top" if commit["dirty"] else ""
    lines = [
        f"- Machine: {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB",
        f"- System: {about['system']} {about['release']}, {about['machine']}",
        f"- Python: {about['python_implementation']} {about['python_version']}",
        f"- Worker processes: from a {about['start_method']}, if the library can",
        f"- Commit: {commit['id'][:12]}{changed}",
    ]
    if any(record.mode == "quick" for record in read([results])):
        lines.append("- **A quick run, which only shows that the benchmarks work.**")
    return "\n".join(lines)


def _versions(results: Results) -> dict[str, str]:
    versions: dict[str, str] = dict(results["machine_info"]["libraries"])
    for record in read([results]):
        for name, known in record.libraries.items():
            if str(known.get("loop", "")).startswith("uvloop"):
                versions["uvloop"] = known["loop"].partition(" ")[2]
            if distribution := known.get("distribution"):
                # 0.2.2 has this project's distribution, and is listed apart.
                is_ours = distribution == DISTRIBUTION and name != OLD
                versions[OURS if is_ours else distribution] = known["version"]
    return versions
