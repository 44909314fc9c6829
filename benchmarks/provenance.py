"""What the figures were measured on, with which versions, and how much they vary (pure)."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.children import DISTRIBUTION, OLD, OURS
from benchmarks.figures import Results, answers, title

if TYPE_CHECKING:
    from collections.abc import Mapping


def machine(files: Mapping[str, Results]) -> str:
    """The machine, the system, every version, the commit and the days."""
    alike: dict[str, list[str]] = {}
    for name, results in files.items():
        alike.setdefault(_of(results), []).append(name)
    blocks = []
    for text, names in alike.items():
        versions = {name: version for one in names for name, version in _versions(files[one]).items()}
        listed = f"- Versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}"
        days = f"- Measured: {' to '.join(dict.fromkeys(sorted(files[one]['datetime'][:10] for one in names)))}"
        blocks.append("\n".join([*([f"{', '.join(names)}:", ""] if len(alike) > 1 else []), text, listed, days]))
    return "\n\n".join(blocks)


def noise(files: Mapping[str, Results]) -> str:
    """How far apart the rounds of one figure are."""
    spreads = sorted(
        ((known["q3"] - known["q1"]) / known["median"], title(facts))
        for facts in answers(files.values())
        if len(facts["rivals"][OURS]["data"][facts["measure"]]) > 1
        and (known := facts["rivals"][OURS]["spread"][facts["measure"]])["median"]
    )
    rounds = [len(facts["rivals"][OURS]["data"][facts["measure"]]) for facts in answers(files.values())]
    if not spreads:
        return "One round of each: nothing is known of the spread."
    worst, where = spreads[-1]
    usual = median(spread for spread, _ in spreads)
    return (
        f"{min(rounds)} to {max(rounds)} rounds of each figure. The quartiles of our own rounds are {usual:.0%} of their median "
        f"apart in the typical benchmark, and {worst:.0%} in the noisiest ({where})."
    )


def _of(results: Results) -> str:
    about, commit = results["machine_info"], results["commit_info"]
    lines = [
        f"- Machine: {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB",
        f"- System: {about['system']} {about['release']}, {about['machine']}",
        f"- Python: {about['python_implementation']} {about['python_version']}",
        f"- Worker processes: from a {about['start_method']}, where a rival can",
        f"- Commit: {commit['id'][:12]}{', with changes on top' if commit['dirty'] else ''}",
    ]
    if any(facts["mode"] == "quick" for facts in answers([results])):
        lines.append("- **A quick run: it shows that the benchmarks work, not how fast anything is.**")
    return "\n".join(lines)


def _versions(results: Results) -> dict[str, str]:
    """Of everything that took part."""
    versions: dict[str, str] = dict(results["machine_info"]["libraries"])
    for facts in answers([results]):
        for name, rival in facts["rivals"].items():
            versions |= _said(name, rival)
    return versions


def _said(name: str, rival: Mapping[str, Any]) -> dict[str, str]:
    said = {}
    if str(rival.get("loop", "")).startswith("uvloop"):
        said["uvloop"] = rival["loop"].partition(" ")[2]
    if rival.get("distribution"):  # we and what we succeed are one distribution, and have one name each
        said[OURS if rival["distribution"] == DISTRIBUTION and name != OLD else rival["distribution"]] = rival["version"]
    return said
