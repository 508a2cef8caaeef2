"""What a million requests cost, which prices count, and that a missing one is refused instead of guessed."""

from dataclasses import replace

import pytest

from slmdeploy.errors import InputError
from slmdeploy.selection import Row, choose, parse_prices
from slmdeploy.selection.prices import COST, priced, prices_of
from slmdeploy.selection.rows import Load, Point
from slmdeploy.specs import parse_budget

SLOW = Row("a", {"requests_per_s": 10.0, "size_bytes": 1.0}, {"requests_per_s": (8.0, 12.5)}, target="cheap")
FAST = Row("a", {"requests_per_s": 90.0, "goodput_per_s": 40.0, "size_bytes": 1.0}, target="dear")


def test_cost_is_price_over_what_is_answered():
    (row,) = priced([SLOW], {"cheap": 0.36})
    assert row.metrics[COST] == pytest.approx(10.0)
    assert row.interval(COST) == pytest.approx((8.0, 12.5))


def test_goodput_counts_before_requests_and_each_workload_has_its_own():
    (row,) = priced([replace(FAST, metrics=FAST.metrics | {"chat:requests_per_s": 1.0})], {"dear": 3.6})
    assert row.metrics[COST] == pytest.approx(25.0)
    assert row.metrics[f"chat:{COST}"] == pytest.approx(1000.0)


def test_cheapest_compares_targets():
    budget = parse_budget(objective="cheapest")
    assert choose(priced([SLOW, FAST], {"cheap": 0.36, "dear": 3.6}), budget).chosen_target == "cheap"
    assert choose(priced([SLOW, FAST], {"cheap": 0.36, "dear": 0.36}), budget).chosen_target == "dear"


@pytest.mark.parametrize(
    ("rows", "prices", "budget", "why"),
    [
        (
            [SLOW, FAST],
            {"cheap": 1.0},
            parse_budget(objective="cheapest"),
            "target dear has no price: give it with --price dear=USD",
        ),
        ([SLOW], {}, parse_budget(f"{COST}<=5"), "target cheap has no price"),
        ([SLOW], {}, parse_budget(preferences=(f"{COST}<=5",)), "target cheap has no price"),
        ([replace(SLOW, target=None)], {}, parse_budget(objective="cheapest"), "a has no target"),
        ([Row("a", {"size_bytes": 1.0}, target="t")], {"t": 1.0}, parse_budget(objective="cheapest"), f"needs {COST}"),
        (
            [replace(SLOW, metrics={"requests_per_s": 0.0})],
            {"cheap": 1.0},
            parse_budget(objective="cheapest"),
            f"needs {COST}",
        ),
    ],
)
def test_what_cannot_be_priced_is_refused(rows, prices, budget, why):
    with pytest.raises(InputError, match=why):
        choose(priced(rows, prices), budget)


def test_no_price_is_needed_where_no_cost_is_asked():
    assert choose([SLOW, FAST], parse_budget(objective="smallest")).feasible
    only_dear = parse_budget(f"{COST}@dear<=30", objective="smallest")
    assert choose(priced([SLOW, FAST], {"dear": 3.6}), only_dear).feasible


def test_a_price_of_a_target_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="for 'cheep', of which nothing is known: did you mean 'cheap'"):
        prices_of([SLOW], {"cheep": 1.0})


def test_prices_are_read_from_text():
    assert parse_prices(["a=0.5", "b.toml=2"]) == {"a": 0.5, "b.toml": 2.0}
    for text in ("a", "a=", "=1", "a=free", "a=-1", "a=0", "a=nan", "a=1e99"):
        with pytest.raises(InputError, match="not of the form TARGET=USD"):
            parse_prices([text])


def test_cost_is_of_the_highest_rate_that_was_answered_well():
    curve = tuple(Point(rate, {"goodput_per_s": good}) for rate, good in ((10.0, 10.0), (40.0, 36.0), (80.0, 20.0)))
    load = Load("score", "server", curve=curve)
    metrics = {"goodput_per_s": 5.0, "s:goodput_per_s": 5.0}
    (row,) = priced([Row("b", metrics, target="t", loads={"s": load})], {"t": 3.6})
    assert row.metrics["cost_usd_per_million_requests"] == pytest.approx(1000 / 36)
    assert row.metrics["s:cost_usd_per_million_requests"] == pytest.approx(1000 / 36)
    (flat,) = priced([Row("b", metrics, target="t", loads={"s": Load("score", "server")})], {"t": 3.6})
    assert flat.metrics["cost_usd_per_million_requests"] == pytest.approx(200)
