"""What people see of a choice: the selection with its reasons, two side by side, and how many machines a load takes.

Knows how things look and nothing of how they come about. rich is imported when something is drawn, because `--help`
must not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from slmdeploy.profiling.live import LiveReport
    from slmdeploy.selection import Selection
    from slmdeploy.selection.capacity import Capacity, Fleet


def print_selection(selection: Selection) -> None:
    """The choice and its reason, each rejected build with its own, what would admit one, and the Pareto front."""
    print(f"selected: {_chosen(selection)}\n  {selection.reason}")
    for rejection in selection.rejections:
        print(f"rejected: {_name(selection, rejection.build, rejection.target)}\n  {rejection.reason}")
    together = selection.relaxation if len(selection.relaxation) > 1 else ()
    for title, moves in (("all of these", together), ("one of these alone", selection.alone)):
        if moves:
            limits = "; ".join(
                f"{move.constraint} → {move.value:.10g} ({_name(selection, move.build, move.target)})" for move in moves
            )
            print(f"feasible with {title} moved: {limits}")
    front = [one for one in selection.candidates if one.on_front]
    if len(front) > 1:
        names = (_name(selection, one.build, one.target) + ("" if one.feasible else " (not feasible)") for one in front)
        print(f"Pareto front of {', '.join(front[0].figures)}: {', '.join(names)}")


def _chosen(selection: Selection) -> str:
    if selection.chosen is None:
        return "none"
    where = f" on {selection.chosen_target}" if selection.chosen_target else ""
    return f"{selection.chosen}{where}" + (" (estimated)" if selection.chosen_source == "estimated" else "")


def _name(selection: Selection, build: str, target: str | None) -> str:
    """A build's name, with the target's where the candidates are of several."""
    several = len({one.target for one in selection.candidates}) > 1
    return f"{build} on {target}" if several and target else build


def what_if_table(asked: Selection, changed: Selection) -> Table:
    """Two selections side by side: the limits of each, what it chose and why, and why not each other build."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False, header_style="bold", show_lines=True)
    for title in ("", "as asked", "what if"):
        table.add_column(title, overflow="fold")
    pair = (asked, changed)
    lines = [("limits", *("\n".join(one.budget) or "none" for one in pair))]
    if asked.preferences:
        lines.append(("preferences", *("\n".join(one.preferences) for one in pair)))
    lines += [("selected", *map(_chosen, pair)), ("because", *(one.reason for one in pair))]
    for row in asked.candidates:
        lines.append((_name(asked, row.build, row.target), *(_why(one, row.build, row.target) for one in pair)))
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _why(selection: Selection, build: str, target: str | None) -> str:
    found = (one.reason for one in selection.rejections if (one.build, one.target) == (build, target))
    return next(found, "selected")


def print_live(report: LiveReport) -> None:
    """What a live server made of a budget: pass or fail, each limit with its figure, and what was not checked."""
    print(f"{'passed' if report.passed else 'failed'}: {report.model} at {report.url}, {report.requests} requests")
    for title, verdicts in (("", report.verdicts), ("preferred, ", report.preferences)):
        for one in verdicts:
            figure = "" if one.value is None else f": {one.value:.4g}, its 95 % interval reaches {one.end:.4g}"
            print(f"  {title}{one.result}: {one.constraint}{figure}")
    for limit in report.unchecked:
        print(f"  not checked: {limit.constraint}: {limit.reason}")
    for reason in report.failures:
        print(f"  no answer: {reason}")


def print_capacity(capacity: Capacity) -> None:
    """The load that is planned for, then each fleet: its size, what requests see, what is left over, what it costs."""
    demand = capacity.demand
    print(
        f"{capacity.workload}: {demand.rate_per_s:,.4g} requests/s, {demand.peak_per_s:,.4g} at the peak, planned for "
        f"{demand.planned_per_s:,.4g}; {', '.join(capacity.budget)}"
    )
    for fleet in capacity.fleets:
        print(_fleet(fleet))
    for row in capacity.left_out:
        print(f"left out: {row.build}{f' on {row.target}' if row.target else ''}\n  {row.reason}")


def _fleet(fleet: Fleet) -> str:
    where = f"{fleet.build} on {fleet.target}" if fleet.target else fleet.build
    if fleet.replicas is None:
        return f"none: {where}\n  {fleet.reason}"
    seen = ", ".join(f"{one.constraint}: {one.value:.4g} ({one.low:.4g} to {one.high:.4g})" for one in fleet.simulated)
    lines = [
        f"{fleet.replicas} replicas: {where}",
        f"  {fleet.reason}" + (f", in {fleet.groups} groups" if fleet.groups and fleet.groups > 1 else ""),
        f"  {fleet.service_ms_mean:.4g} ms to serve one, in the mean of {fleet.requests_measured}; at the peak {seen}",
        f"  busy {fleet.busy:.0%} at the peak; holds up to {fleet.holds_up_to_per_s:,.4g} requests/s, "
        f"{fleet.headroom:.0%} above the peak",
    ]
    if fleet.usd_per_hour is not None:
        lines.append(
            f"  {fleet.usd_per_hour:.4g} USD/hour, {fleet.usd_per_million_requests:.4g} USD per million requests"
        )
    for one in fleet.check:
        lines.append(
            f"  check at {one.rate_per_s:,.4g}/s on one: {one.metric} {one.measured:.4g} measured, "
            f"{one.simulated:.4g} simulated ({one.error:+.1%})"
        )
    return "\n".join(lines)
