"""Work that services do have: source files analysed, texts classified, rows scored by a forest.

::

    item --> run, in whatever process or thread the rival runs it --> (value, process id, processor seconds)
                                                                         |
                                              must be the job's `answer` for that item

The last two say which worker it was, and the item's share of what its batch took there: all items of a batch have the same.
Python's own code under the GIL makes up nearly all of the first two jobs. The third is native code in the main, a call of
which takes as long for a whole batch as for one row.

Nothing heavy is imported before a job needs it. A model is fitted once in each process, with the first batch there; the same
seeds give the same model everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import random
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _jobs import Job

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# This module comes before anything native, in the rival's process and in its workers: no library there starts threads of its own,
# so that nobody has more cores than the load's workers say.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

_SEED = 1


def _timed(work: Callable[[list[Any]], list[Any]], batch: list[Any]) -> list[tuple[Any, int, float]]:
    began = time.thread_time()
    values = work(batch)
    share = (time.thread_time() - began) / len(batch)
    return [(value, os.getpid(), share) for value in values]


def _cycle(items: list[Any]) -> Callable[[int], Any]:
    return lambda number: items[number % len(items)]


# Files of the standard library, as in `async-batcher demo`. An item is a path, its value what is in the file.

_FILES = 120
_FILE_BYTES = range(4_000, 12_000)  # some 4 ms each
_NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


def sources(_: dict[str, Any]) -> Job:
    """The job of the demo. Whoever finds the answers reads the files, so that nobody waits for the disk."""
    return Job(analyse, _cycle(_files()), _report)


def analyse(batch: list[str]) -> list[Any]:
    """What is in each file."""
    return _timed(_reports, batch)


def _reports(batch: list[str]) -> list[Any]:
    return [tuple(_analysis().analyse(path)) for path in batch]


@functools.cache
def _report(path: str) -> Any:
    return _reports([path])[0]


@functools.cache
def _analysis() -> ModuleType:
    """The demo's module, from its file: it imports only the standard library, and not every rival can import our package."""
    path = Path(__file__).parents[2] / "src" / "async_batcher" / "_analysis.py"
    spec = importlib.util.spec_from_file_location("_analysis_of_the_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.be_quiet()
    return module


@functools.cache
def _files() -> list[str]:
    found: list[str] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found.extend(str(path) for path in paths if path.stat().st_size in _FILE_BYTES)
    return sorted(random.Random(_SEED).sample(sorted(found), _FILES))  # noqa: S311 - no secret


# Texts of made-up words, classified by scikit-learn. An item is a text, its value a topic and how probable it is.

_TEXTS = 200
_TEXT_WORDS = (300, 500)
_TOPICS = 5
_FITTED_TEXTS = 300
_FITTED_WORDS = 150  # in each
_SYLLABLES = ["ba", "de", "fi", "go", "ha", "ke", "lu", "mo", "ni", "pu", "ra", "se", "ti", "vo", "wy", "za"]


def texts(_: dict[str, Any]) -> Job:
    """A text classifier: weighted words and pairs of words, and a linear model."""
    return Job(classify, _cycle(_texts()), lambda text: _topic_of_each()[text])


def classify(batch: list[str]) -> list[Any]:
    """The topic of each text."""
    return _timed(_topics, batch)


def _topics(batch: list[str]) -> list[Any]:
    probabilities = _classifier().predict_proba(batch)
    return [(int(row.argmax()), round(float(row.max()), 6)) for row in probabilities]


@functools.cache
def _topic_of_each() -> dict[str, Any]:
    return dict(zip(_texts(), _topics(_texts()), strict=True))


@functools.cache
def _texts() -> list[str]:
    chance = random.Random(_SEED)  # noqa: S311 - no secret
    return [_text(chance, number % _TOPICS, chance.randint(*_TEXT_WORDS)) for number in range(_TEXTS)]


@functools.cache
def _classifier() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    chance = random.Random(_SEED + 1)  # noqa: S311 - no secret
    topics = [number % _TOPICS for number in range(_FITTED_TEXTS)]
    written = [_text(chance, topic, _FITTED_WORDS) for topic in topics]
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    return make_pipeline(vectoriser, SGDClassifier(loss="log_loss", random_state=_SEED)).fit(written, topics)


def _text(chance: random.Random, topic: int, words: int) -> str:
    vocabulary, weights = _language()
    return " ".join(chance.choices(vocabulary, cum_weights=weights[topic], k=words))


@functools.cache
def _language() -> tuple[list[str], list[list[float]]]:
    """Words, and their cumulated weights in each topic: as in a language (Zipf's law), but that a topic has words it likes."""
    chance = random.Random(_SEED + 2)  # noqa: S311 - no secret
    words = list(dict.fromkeys("".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(4_000)))
    liked = [[chance.random() < 0.1 for _ in words] for _ in range(_TOPICS)]
    weights = [itertools.accumulate((5 if likes else 1) / rank for rank, likes in enumerate(row, 1)) for row in liked]
    return words, [list(row) for row in weights]


# Rows of numbers, scored by a random forest. An item is a row, its value how probable the first of two classes is.

_ROWS = 1_000
_COLUMNS = 24
_TREES = 100


def forest(_: dict[str, Any]) -> Job:
    """A random forest."""
    return Job(score, _cycle(_rows(_SEED)), lambda row: _score_of_each()[row])


def score(batch: list[tuple[float, ...]]) -> list[Any]:
    """The score of each row."""
    return _timed(_scores, batch)


def _scores(batch: list[tuple[float, ...]]) -> list[Any]:
    return [round(float(row[0]), 6) for row in _forest().predict_proba(batch)]


@functools.cache
def _score_of_each() -> dict[tuple[float, ...], Any]:
    rows = _rows(_SEED)
    return dict(zip(rows, _scores(rows), strict=True))


@functools.cache
def _rows(seed: int) -> list[tuple[float, ...]]:
    chance = random.Random(seed)  # noqa: S311 - no secret
    return [tuple(chance.gauss(0, 1) for _ in range(_COLUMNS)) for _ in range(_ROWS)]


@functools.cache
def _forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    rows = _rows(_SEED + 1)
    classes = [int(row[0] * row[1] + row[2] * row[3] > 0) for row in rows]
    return RandomForestClassifier(_TREES, n_jobs=1, random_state=_SEED).fit(rows, classes)
