"""The choice: which (target, build) pair meets a budget and why not the others; and how many machines a load needs."""

from slmdeploy.selection.choosing import choose
from slmdeploy.selection.comparing import OBJECTIVES, Cost, cost, differ, pareto_front
from slmdeploy.selection.outcome import Candidate, Pair, Rejection, Relaxation, Selection, Verdict
from slmdeploy.selection.prices import parse_prices
from slmdeploy.selection.reading import read_rows
from slmdeploy.selection.rows import Row
from slmdeploy.selection.selecting import select, what_if

__all__ = [
    "OBJECTIVES",
    "Candidate",
    "Cost",
    "Pair",
    "Rejection",
    "Relaxation",
    "Row",
    "Selection",
    "Verdict",
    "choose",
    "cost",
    "differ",
    "pareto_front",
    "parse_prices",
    "read_rows",
    "select",
    "what_if",
]
