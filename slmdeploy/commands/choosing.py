"""What comes of measurements: select, plan, report, package."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slmdeploy.commands.options import Force, Json, Out, done
from slmdeploy.errors import GateError, InfeasibleError, InputError

Measurements = Annotated[list[Path], typer.Argument(help="Measurements that profile wrote: folders or .json files.")]
Prices = Annotated[
    list[str] | None, typer.Option("--price", help="TARGET=USD per hour of one machine; may be repeated.")
]


class Objective(StrEnum):
    """What to prefer among the builds that meet the budget."""

    FASTEST = "fastest"
    THROUGHPUT = "throughput"
    CHEAPEST = "cheapest"
    SMALLEST = "smallest"
    QUALITY = "quality"


class Kind(StrEnum):
    """Kinds of package."""

    EDGE = "edge"
    SERVER = "server"


def select(
    measurements: Measurements,
    budget: Annotated[
        list[str] | None, typer.Option(help="[workload:]metric[@target]<=number, or >=; may be repeated.")
    ] = None,
    prefer: Annotated[
        list[str] | None, typer.Option(help="A limit that is preferred, not required; may be repeated.")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="What to prefer within the budget.")] = Objective.FASTEST,
    price: Prices = None,
    what_if: Annotated[
        list[str] | None, typer.Option("--what-if", help="metric=number: choose with that limit too; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write the selection to.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose the build and target that meet the budget, or explain why none does (exit 3)."""
    from slmdeploy import console, console_selection, selection
    from slmdeploy.specs import parse_budget, parse_change

    limits = parse_budget(*(budget or []), objective=objective.value, preferences=tuple(prefer or []))
    changes = [parse_change(text) for text in what_if or []]
    prices = selection.parse_prices(price or [])
    asked = selection.select(measurements, budget=limits, prices=prices, out=output, force=force)
    changed = selection.what_if(measurements, budget=limits, changes=changes, prices=prices) if changes else None
    if as_json:
        console.print_json(asked.to_dict() | ({"what_if": changed.to_dict()} if changed else {}))
    elif changed:
        console.out_console().print(console_selection.what_if_table(asked, changed))
    else:
        console_selection.print_selection(asked)
    if not asked.feasible:
        raise InfeasibleError(asked.reason)


def plan(
    measurements: Measurements,
    rate: Annotated[str, typer.Option(help="Mean rate of requests: 1200/s, 72000/min, 4e6/h, 100e6/day.")],
    budget: Annotated[list[str], typer.Option(help="Limit under the load, e.g. e2e_ms_p99<=200; may be repeated.")],
    peak: Annotated[float, typer.Option(help="The highest rate over the mean rate.")] = 1.0,
    headroom: Annotated[float, typer.Option(help="Share by which the peak may still grow.")] = 0.2,
    target: Annotated[str | None, typer.Option(help="Plan with this target alone.")] = None,
    build: Annotated[str | None, typer.Option(help="Plan with this build alone.")] = None,
    workload: Annotated[str | None, typer.Option(help="What requests are like, where several were measured.")] = None,
    price: Prices = None,
    as_json: Json = False,
) -> None:
    """Say how many machines a load needs, with what headroom and at what cost (exit 3 where no number is enough)."""
    from slmdeploy import console, console_selection
    from slmdeploy.selection import parse_prices
    from slmdeploy.selection.capacity import Demand, parse_rate
    from slmdeploy.selection.capacity import plan as verb
    from slmdeploy.specs import parse_constraint

    capacity = verb(
        measurements,
        demand=Demand(parse_rate(rate), peak, headroom),
        limits=[parse_constraint(text) for text in budget],
        target=target,
        build=build,
        workload=workload,
        prices=parse_prices(price or []),
    )
    if as_json:
        console.print_json(capacity.to_dict())
    else:
        console_selection.print_capacity(capacity)
    if not capacity.feasible:
        raise InfeasibleError(f"no number of replicas holds {', '.join(capacity.budget)}")


def report(
    run: Annotated[Path | None, typer.Argument(help="Folder made by run, or a measurement (folder or .json).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; default: RUN/report.html.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown for a pull request to this file too.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="BEFORE AFTER", help="Compare two runs instead.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, help="Of --compare: relative change that counts.  [default: 0.05]")
    ] = None,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Of --compare: exit with 4 when something got worse.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a run as one HTML page, or compare two runs (exit 4 on a regression, where asked for)."""
    from slmdeploy import console, console_report
    from slmdeploy.reporting import compare as comparing
    from slmdeploy.reporting import report as verb

    if (run is None) == (compare is None):
        raise InputError("report takes one of the two: the folder of a run, or --compare BEFORE AFTER")
    if compare is None:
        assert run is not None, "one of the two is given"
        if threshold is not None or fail_on_regression:
            raise InputError("--threshold and --fail-on-regression go with --compare BEFORE AFTER")
        page = verb.report(run, out=output, markdown=markdown, force=force)
        if as_json:
            console.print_json({"path": str(page), "markdown": str(markdown) if markdown else None})
        else:
            print(page)
        return
    found = comparing.compare(*compare, threshold=comparing.THRESHOLD if threshold is None else threshold)
    verb.write_comparison(found, out=output, markdown=markdown, force=force)
    if as_json:
        console.print_json(found.to_dict())
    else:
        console_report.print_comparison(found)
    if fail_on_regression and found.of("regression"):
        raise GateError(found.complaint)


def package(
    build: Annotated[Path, typer.Argument(help="Build folder.")],
    output: Out,
    kind: Annotated[Kind, typer.Option(help="What to ship it as.")] = Kind.EDGE,
    measurement: Annotated[
        Path | None, typer.Option(help="Take figures, and session options that profile --search found, from this one.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Also write the package as this .tar.gz, .tar.zst or .zip.")
    ] = None,
    trial: Annotated[
        bool,
        typer.Option("--try", help="Start it in fresh processes and record seconds and memory; servers always do."),
    ] = False,
    lock: Annotated[bool, typer.Option("--lock", help="Ask pip for the hash of every requirement.")] = False,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Refuse a package with more bytes.")] = None,
    sign: Annotated[Path | None, typer.Option(help="Private key (PEM, ed25519) to sign the package with.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a folder that runs with numpy, onnxruntime and tokenizers alone, or that and what a server needs."""
    from slmdeploy.packaging.archive import check_name, pack
    from slmdeploy.packaging.package import package as verb

    if archive:
        check_name(archive)
    artifact = verb(
        build,
        out=output,
        kind=kind.value,
        measurement=measurement,
        trial=trial,
        lock=lock,
        max_bytes=max_bytes,
        key=sign,
        force=force,
    )
    if archive:
        pack(artifact.path, archive)
    done(artifact, as_json)


def unpack(
    archive: Annotated[Path, typer.Argument(help="Archive of a package: .tar.gz, .tar.zst or .zip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to unpack to.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM): the package has to be signed by it.")] = None,
) -> None:
    """Unpack the archive of a package, which may be hostile, and check every hash of it."""
    from slmdeploy.packaging.unpacking import unpack as verb

    print(verb(archive, output, key=key))
