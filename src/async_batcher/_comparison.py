"""How the demo's modes compare: are the answers the same, what did each mode take, what was found; as numbers and as text."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from async_batcher._analysis import Answer, Report

THREADS = "threads"  # the mode that the others' speed is measured by


class Files(NamedTuple):
    """What is to be analysed.

    Attributes:
        root: The folder.
        paths: Files in it, in order.
        size: All together, in bytes.
    """

    root: str
    paths: list[str]
    size: int


class Run(NamedTuple):
    """What came of one mode.

    Attributes:
        mode: Its name.
        start_seconds: Seconds that its workers took to start.
        seconds: Seconds for all files, from then on.
        answers: One for each file, in order.
    """

    mode: str
    start_seconds: float
    seconds: float
    answers: list[Answer]

    def reports(self) -> list[Report]:
        """What was found, without what it took."""
        return [answer.report for answer in self.answers]


class Comparison(NamedTuple):
    """The runs of all modes over the same files.

    Attributes:
        files: The files.
        runs: A run for each mode; that of the threads is among them.
        cores: Cores that this process may use.
        workers: Threads, and processes.
        tasks: How many tasks asked at a time.
        max_batch_size: Files in a batch at most.
        loop: The event loop's name.
    """

    files: Files
    runs: list[Run]
    cores: int
    workers: int
    tasks: int
    max_batch_size: int
    loop: str

    def difference(self) -> str | None:
        """Says where two modes give different answers; None: nowhere."""
        one = self.runs[0]
        for other in self.runs[1:]:
            for left, right in zip(one.reports(), other.reports(), strict=True):
                if left != right:
                    return f"{one.mode!r} and {other.mode!r} give different answers: {left} and {right}"
        return None

    def figures(self) -> dict[str, Any]:
        """All numbers, with their units in their names."""
        return {
            "python": platform.python_version(),
            "loop": self.loop,
            "path": self.files.root,
            "files": len(self.files.paths),
            "bytes": self.files.size,
            "cores": self.cores,
            "workers": self.workers,
            "tasks": self.tasks,
            "max_batch_size": self.max_batch_size,
            "modes": [self._figures_of(run) for run in self.runs],
            "analysis": self._findings(),
        }

    def text(self) -> str:
        """The table, between what was compared and what was found."""
        figures = self.figures()
        found, most = figures["analysis"], figures["analysis"]["most_complex"]
        starts = ", ".join(f"{run.mode} {run.start_seconds:.2f} s" for run in self.runs)
        counts = ", ".join(f"{found[what]:,} {what}" for what in ("functions", "classes", "branches"))
        return "\n".join(
            [
                f"{self.files.root}, Python {figures['python']}, {self.loop}",
                f"{self.tasks} tasks, each with one file at a time; {self.workers} workers on {self.cores} cores",
                "",
                *_table(figures),
                "",
                f"The same answers from each: {counts}; files that cannot be parsed: {found['unparsable_files']:,}.",
                f"The most complex function: {most['function'] or 'none'} in {most['path']}, complexity {most['complexity']}.",
                f"Start-up, not counted above: {starts}.",
            ]
        )

    def _figures_of(self, run: Run) -> dict[str, Any]:
        count = len(run.answers)
        threads = next(other for other in self.runs if other.mode == THREADS)
        cpu_seconds = sum(answer.cpu_seconds for answer in run.answers)
        batches = round(sum(1 / answer.batch_size for answer in run.answers))
        return {
            "mode": run.mode,
            "start_seconds": run.start_seconds,
            "seconds": run.seconds,
            "files_per_second": count / run.seconds,
            "speed_over_threads": threads.seconds / run.seconds,
            "cpu_seconds": cpu_seconds,
            "cores_used_percent": 100 * cpu_seconds / (run.seconds * self.cores),
            "batches": batches,
            "mean_batch_size": count / batches,
        }

    def _findings(self) -> dict[str, Any]:
        reports = self.runs[0].reports()
        most = max(reports, key=lambda report: report.complexity)
        return {
            "functions": sum(report.functions for report in reports),
            "classes": sum(report.classes for report in reports),
            "branches": sum(report.branches for report in reports),
            "unparsable_files": sum(not report.is_parsed for report in reports),
            "most_complex": {
                "path": os.path.relpath(most.path, self.files.root),
                "function": most.most_complex,
                "complexity": most.complexity,
            },
        }


def _table(figures: dict[str, Any]) -> list[str]:
    rows = [("", "files", "MB", "seconds", "files/s", "over threads", "cores used", "batches", "mean size")]
    rows += [
        (
            mode["mode"],
            f"{figures['files']:,}",
            f"{figures['bytes'] / 1e6:.1f}",
            f"{mode['seconds']:.2f}",
            f"{mode['files_per_second']:,.0f}",
            f"{mode['speed_over_threads']:.2f} x",
            f"{mode['cores_used_percent']:.0f} %",
            f"{mode['batches']:,}",
            f"{mode['mean_batch_size']:.1f}",
        )
        for mode in figures["modes"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
