"""What a batch costs by its size: a fixed part, and one for each item (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MODEL_ERROR = 0.25  # relative; a model that is off by more is not relied on


class BatchCost(NamedTuple):
    """What the function takes for a batch, alone in one worker, without the trip.

    The mean over batches that hold the same items at every size; of several rounds the median.
    """

    batch_size: int
    seconds: float

    @property
    def per_item(self) -> float:
        return self.seconds / self.batch_size


class CostModel(NamedTuple):
    """A batch of n items costs ``fixed + per_item * n`` seconds; ``error`` is relative, at most."""

    fixed: float
    per_item: float
    error: float

    @property
    def holds(self) -> bool:
        return self.error <= MAX_MODEL_ERROR

    def seconds(self, batch_size: float) -> float:
        return self.fixed + self.per_item * batch_size


def fit_cost_model(costs: Sequence[BatchCost]) -> CostModel:
    """Fit by least squares of the relative errors, with no coefficient below 0.

    Relative, since a batch of 1024 costs a thousand times what a batch of 1 does, and would count a
    million times as much. This minimises the sum of (fixed * u + per_item * v - 1) ** 2, where
    u = 1 / cost and v = n / cost.
    """
    if not costs:
        msg = "there is nothing to fit"
        raise ValueError(msg)
    pairs = [(1 / cost.seconds, cost.batch_size / cost.seconds) for cost in costs]
    su, sv = (sum(column) for column in zip(*pairs, strict=True))
    uu, uv, vv = (
        sum(u * u for u, _ in pairs),
        sum(u * v for u, v in pairs),
        sum(v * v for _, v in pairs),
    )
    choices = [(0.0, sv / vv), (su / uu, 0.0)]  # the best ones with either coefficient 0
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:  # several sizes
        both = ((vv * su - uv * sv) / determinant, (uu * sv - uv * su) / determinant)
        choices = [both] if min(both) >= 0 else choices

    def errors(choice: tuple[float, float]) -> list[float]:
        return [choice[0] * u + choice[1] * v - 1 for u, v in pairs]

    best = min(choices, key=lambda choice: sum(error * error for error in errors(choice)))
    return CostModel(*best, error=max(map(abs, errors(best))))
