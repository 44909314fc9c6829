"""Work that services do: source files analysed, texts classified, rows scored by a forest.

::

    item --> run, in the library's process or thread --> (value, process id, processor seconds)
                                                            |
                                      must equal the workload's `result` for that item

The process id tells the workers apart. The seconds are the item's share of its batch's processor
time; all items of a batch have the same. The first two workloads are mostly Python code under the
GIL. The third is mostly native code, a call of which takes as long for a batch as for one row.

A workload imports heavy modules when it needs them. Each process fits its model once, with its
first batch; the same seeds give the same model everywhere.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scenarios import source_analysis
from benchmarks.scenarios.workloads import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

# Native libraries start one thread, so that no library uses more cores than the load's workers.
# Every process imports this module before anything native.
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
os.environ.update(dict.fromkeys(_THREAD_LIMITS, "1"))

SEED = 1


def _timed(work: Callable[[list[Any]], list[Any]], batch: list[Any]) -> list[Any]:
    began = time.thread_time()
    values = work(batch)
    share = (time.thread_time() - began) / len(batch)
    return [(value, os.getpid(), share) for value in values]


def _cycle(items: list[Any]) -> Callable[[int], Any]:
    return lambda number: items[number % len(items)]


# Files of the standard library. An item is a path, its value the report on that file.

SOURCE_FILES = 120
SOURCE_FILE_BYTES = range(4_000, 12_000)  # about 4 ms each
_NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


def sources(_: dict[str, Any]) -> Workload:
    """Analyse source files. Computing the expected results reads them into the page cache."""
    return Workload(analyse, _cycle(_files()), _report)


def analyse(batch: list[str]) -> list[Any]:
    """Return the report on each file."""
    return _timed(_reports, batch)


def _reports(batch: list[str]) -> list[Any]:
    return [tuple(source_analysis.analyse(path)) for path in batch]


@functools.cache
def _report(path: str) -> Any:
    return _reports([path])[0]


@functools.cache
def _files() -> list[str]:
    found: list[str] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found.extend(str(path) for path in paths if path.stat().st_size in SOURCE_FILE_BYTES)
    chance = random.Random(SEED)  # noqa: S311 - no secret
    return sorted(chance.sample(sorted(found), SOURCE_FILES))


# Texts of made-up words, classified by scikit-learn. An item is a text, its value a topic and the
# probability of that topic.

TEXTS = 200
TEXT_WORDS = (300, 500)
TOPICS = 5
TRAINING_TEXTS = 300
TRAINING_TEXT_WORDS = 150
_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeioaeuoiuaeioya"
_SYLLABLES = ["".join(pair) for pair in zip(_CONSONANTS, _VOWELS, strict=True)]


def texts(_: dict[str, Any]) -> Workload:
    """Classify texts by weighted words and pairs of words, with a linear model."""
    return Workload(classify, _cycle(_texts()), lambda text: _topic_of_each()[text])


def classify(batch: list[str]) -> list[Any]:
    """Return the topic of each text."""
    return _timed(_topics, batch)


def _topics(batch: list[str]) -> list[Any]:
    probabilities = _classifier().predict_proba(batch)
    return [(int(row.argmax()), round(float(row.max()), 6)) for row in probabilities]


@functools.cache
def _topic_of_each() -> dict[str, Any]:
    return dict(zip(_texts(), _topics(_texts()), strict=True))


@functools.cache
def _texts() -> list[str]:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    return [_text(chance, number % TOPICS, chance.randint(*TEXT_WORDS)) for number in range(TEXTS)]


@functools.cache
def _classifier() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    chance = random.Random(SEED + 1)  # noqa: S311 - no secret
    topics = [number % TOPICS for number in range(TRAINING_TEXTS)]
    written = [_text(chance, topic, TRAINING_TEXT_WORDS) for topic in topics]
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    model = SGDClassifier(loss="log_loss", random_state=SEED)
    return make_pipeline(vectoriser, model).fit(written, topics)


def _text(chance: random.Random, topic: int, words: int) -> str:
    vocabulary, weights = _language()
    return " ".join(chance.choices(vocabulary, cum_weights=weights[topic], k=words))


@functools.cache
def _language() -> tuple[list[str], list[list[float]]]:
    """Return words and their cumulative weights by topic: Zipf's law, with a tenth favoured."""
    chance = random.Random(SEED + 2)  # noqa: S311 - no secret
    made = ("".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(4_000))
    words = list(dict.fromkeys(made))
    favoured = [[chance.random() < 0.1 for _ in words] for _ in range(TOPICS)]
    weights = [
        list(itertools.accumulate((5 if likes else 1) / rank for rank, likes in enumerate(row, 1)))
        for row in favoured
    ]
    return words, weights


# Rows of numbers, scored by a random forest. An item is a row, its value the probability of the
# first of two classes.

ROWS = 1_000
COLUMNS = 24
TREES = 100


def forest(_: dict[str, Any]) -> Workload:
    """Score rows with a random forest."""
    return Workload(score, _cycle(_rows(SEED)), lambda row: _score_of_each()[row])


def score(batch: list[tuple[float, ...]]) -> list[Any]:
    """Return the score of each row."""
    return _timed(_scores, batch)


def _scores(batch: list[tuple[float, ...]]) -> list[Any]:
    return [round(float(row[0]), 6) for row in _forest().predict_proba(batch)]


@functools.cache
def _score_of_each() -> dict[tuple[float, ...], Any]:
    rows = _rows(SEED)
    return dict(zip(rows, _scores(rows), strict=True))


@functools.cache
def _rows(seed: int) -> list[tuple[float, ...]]:
    chance = random.Random(seed)  # noqa: S311 - no secret
    return [tuple(chance.gauss(0, 1) for _ in range(COLUMNS)) for _ in range(ROWS)]


@functools.cache
def _forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    rows = _rows(SEED + 1)
    classes = [int(row[0] * row[1] + row[2] * row[3] > 0) for row in rows]
    return RandomForestClassifier(TREES, n_jobs=1, random_state=SEED).fit(rows, classes)
