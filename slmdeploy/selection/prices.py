"""What requests cost on a target: its price per hour over what it answers, for the objective `cheapest`.

Prices are facts of targets/*.toml, or what the user says. A price that is needed and not known is refused: a guess
would decide which hardware is bought. Knows nothing of how a price came about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from slmdeploy.errors import InputError
from slmdeploy.selection.judging import concerns
from slmdeploy.selection.rows import Interval, Row
from slmdeploy.specs import Budget, list_targets, nearest

COST = "cost_usd_per_million_requests"
ANSWERED = ("goodput_per_s", "requests_per_s")
"""What is paid for, per second: the first of these that was measured."""


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Read ``TARGET=USD`` texts, USD per hour of one machine. InputError shows the form."""
    prices = {}
    for text in texts:
        target, _, number = text.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if not target or not 0 < price < 1e9:
            raise InputError(f"price {text!r} is not of the form TARGET=USD per hour, e.g. 'x86-64-avx2=0.17'")
        prices[target] = price
    return prices


def prices_of(rows: Sequence[Row], given: Mapping[str, float]) -> dict[str, float]:
    """Price per hour in USD by target: what the user gave, else what the target's file says.

    Raises InputError for a price of a target that no row is of.
    """
    targets = {row.target for row in rows if row.target}
    strange = next((name for name in given if name not in targets), None)
    if strange is not None:
        raise InputError(
            f"a price is given for {strange!r}, of which nothing is known{nearest(strange, sorted(targets))}"
        )
    shipped = {one.name: one.price_per_hour_usd for one in list_targets() if one.name in targets}
    return {**{name: price for name, price in shipped.items() if price is not None}, **given}


def priced(rows: Sequence[Row], prices: Mapping[str, float]) -> list[Row]:
    """``rows`` with the price of their target and, where they have a throughput too, the cost of a million requests."""
    return [_priced(row, prices.get(row.target or "")) for row in rows]


def _priced(row: Row, price: float | None) -> Row:
    if price is None:
        return row
    metrics, intervals = dict(row.metrics), dict(row.intervals)
    for place in ("", *(f"{name}:" for name in row.workloads())):
        answered = next((name for name in ANSWERED if row.metrics.get(place + name, 0) > 0), None)
        if answered is None:
            continue
        rate, ends = _highest(row, place, answered)
        low, high = (_cost(price, per_s) for per_s in reversed(ends))
        metrics[place + COST] = _cost(price, rate)
        intervals[place + COST] = (low, high)
    return replace(row, metrics=metrics, intervals=intervals, price_per_hour_usd=price)


def _highest(row: Row, place: str, answered: str) -> tuple[float, Interval]:
    """The most that was answered per second, with its interval: as offered, or at some point of the load curve.

    A rate below what the target can do is what was offered, and says nothing about what a request has to cost.
    """
    value = row.metrics[place + answered]
    owners = [place[:-1]] if place else [name for name in row.loads if row.metrics.get(f"{name}:{answered}") == value]
    curves = [row.loads[name].curve for name in owners if name in row.loads]
    points = [point.metrics.get(answered, 0.0) for curve in curves for point in curve]
    highest = max(points, default=0.0)
    return (highest, (highest, highest)) if highest > value else (value, row.interval(place + answered))


def _cost(price_per_hour: float, per_s: float) -> float:
    """USD per million requests; an interval that ends at nothing answered ends at a very high cost, not at infinity."""
    return price_per_hour / 3600 / max(per_s, 1e-9) * 1e6


def refuse_unpriced(rows: Sequence[Row], budget: Budget) -> None:
    """Raise InputError where ``budget`` asks for costs and a row's target has no price."""
    limits = [limit for limit in (*budget.constraints, *budget.preferences) if limit.metric == COST]
    for row in rows:
        if row.price_per_hour_usd is not None:
            continue
        if budget.objective == "cheapest" or any(concerns(limit, row) for limit in limits):
            if row.target is None:
                raise InputError(
                    f"{row.name} has no target, so its requests have no price: measure it again on a machine that "
                    "matches a target, or write one for it (targets/*.toml)"
                )
            raise InputError(f"target {row.target} has no price: give it with --price {row.target}=USD per hour")
