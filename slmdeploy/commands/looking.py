"""Look, and change nothing: verify, doctor, targets, profiles."""

from pathlib import Path
from typing import Annotated

import typer

from slmdeploy.commands.options import Json


def verify(
    path: Annotated[Path, typer.Argument(help="Any artifact: folder, or the archive of a package.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM): the artifact has to be signed by it.")] = None,
    as_json: Json = False,
) -> None:
    """Check every hash of an artifact, who signed it, and print how far it was proved."""
    from slmdeploy import console
    from slmdeploy.verification import verify as verb

    found = verb(path, key=key)
    if as_json:
        console.print_json(found)
    else:
        console.print_facts(found)


def doctor(
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure bandwidth and peaks, which takes two seconds.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what this machine is, which target it matches, and which profiles can be built here."""
    from slmdeploy import console
    from slmdeploy.profiling.doctor import doctor as verb
    from slmdeploy.specs import list_profiles, list_targets

    report = verb(list_targets(), list_profiles(), bench=bench)
    if as_json:
        console.print_json(report)
    else:
        console.print_facts(report)


def targets(as_json: Json = False) -> None:
    """List the shipped targets."""
    from slmdeploy import console
    from slmdeploy.specs import list_targets

    console.print_specs(list_targets(), as_json)


def profiles(as_json: Json = False) -> None:
    """List the shipped profiles."""
    from slmdeploy import console
    from slmdeploy.specs import list_profiles

    console.print_specs(list_profiles(), as_json)
