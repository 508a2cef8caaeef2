"""Reads measurements: folders that `profile` wrote, or single .json files that travelled from another machine.

A file is hostile until it has passed: types, finite numbers, sizes and intervals are checked before anything counts,
and a build that lies here must still be the one that was measured. Knows nothing of budgets.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from slmdeploy.artifacts import open_artifact
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.bundle import MANIFEST, read_manifest
from slmdeploy.selection.rows import Load, Point, Row, Source

MEASUREMENT = "measurement.json"
SCHEMA = 2
LARGEST_BYTES = 64 * 2**20
"""Of a measurement: several times what a long one of many builds takes."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
"""Names are printed on terminals, so they hold no control characters."""

Figures = dict[str, float]


class _Entry(BaseModel):
    """Base of the parts of the file: strict about types, open to keys that other readers need."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class _Gate(_Entry):
    passed: bool


class _Planned(_Entry):
    name: Name
    batch: Annotated[int, Field(ge=1)] = 1


class _Plan(_Entry):
    workloads: tuple[_Planned, ...] = ()


class _Point(_Entry):
    rate_per_s: Annotated[float, Field(gt=0)]
    metrics: Figures


class _Workload(_Entry):
    task: str
    scenario: str
    metrics: Figures = {}
    intervals: dict[str, tuple[float, float]] = {}
    samples: dict[str, tuple[Annotated[float, Field(ge=0)], ...]] = {}
    curve: tuple[_Point, ...] = ()


class _Options(_Entry):
    threads: Annotated[int, Field(ge=0, le=4096)] | None = None
    spinning: bool | None = None
    prefill_chunk: Annotated[int, Field(ge=0, le=1 << 20)] | None = None


class _Search(_Entry):
    options: _Options


class _Row(_Entry):
    build: Name
    path: str
    role: Literal["candidate", "baseline"]
    content_key: str | None = None
    graph: str | None = None
    precision: str | None = None
    target: Name | None = None
    source: Source = "measured"
    search: _Search | None = None
    gates: dict[str, _Gate] = {}
    passed: bool
    metrics: Figures
    intervals: dict[str, tuple[float, float]] = {}
    workloads: dict[Name, _Workload] = {}


class _Measurement(_Entry):
    version: Literal[2] = Field(alias="schema")
    plan: _Plan = _Plan()
    rows: tuple[_Row, ...]


def read_rows(path: Path) -> list[Row]:
    """The rows of the measurement at ``path``: a folder that `profile` wrote, or one .json file.

    Raises InputError when nothing is there or another version wrote it, CorruptArtifactError when it is not of the
    documented form (docs/measurement.md).
    """
    file = open_artifact(path, "measurement").path / MEASUREMENT if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST_BYTES:
            raise CorruptArtifactError(f"{file} is larger than any measurement: give the file that profile wrote")
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{file} does not exist: give a folder or .json file that `slmdeploy profile` wrote"
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    try:
        measured = _Measurement.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(file, error) from error
    batches = {planned.name: planned.batch for planned in measured.plan.workloads}
    return [_row(entry, batches, file) for entry in measured.rows]


def _refusal(file: Path, error: ValidationError) -> Exception:
    found = error.errors()
    other = next((one for one in found if one["loc"] == ("schema",)), None)
    if other:
        version = other["input"] if other["type"] == "literal_error" else 1
        return InputError(f"{file} is a measurement of schema {str(version)[:20]}, not {SCHEMA}: measure again")
    where = ".".join(str(part) for part in found[0]["loc"])[:200]
    what = found[0]["msg"][:1].lower() + found[0]["msg"][1:200]
    return CorruptArtifactError(f"{file} is no measurement: {where + ': ' if where else ''}{what}; measure again")


def _row(entry: _Row, batches: Mapping[str, int], file: Path) -> Row:
    metrics, intervals = dict(entry.metrics), dict(entry.intervals)
    for name, workload in entry.workloads.items():
        metrics |= {f"{name}:{metric}": value for metric, value in workload.metrics.items()}
        intervals |= {f"{name}:{metric}": ends for metric, ends in workload.intervals.items()}
    turned = next((name for name, (low, high) in intervals.items() if low > high), None)
    if turned:
        raise CorruptArtifactError(f"{file}: the interval of {turned} of {entry.build} ends below where it begins")
    failed = tuple(name for name, gate in entry.gates.items() if not gate.passed)
    return Row(
        build=entry.build,
        metrics=metrics,
        intervals=intervals,
        path=entry.path,
        precision=entry.precision or "",
        graph=entry.graph,
        gates_failed=failed if failed or entry.passed else ("passed",),
        baseline=entry.role == "baseline",
        target=entry.target,
        source=entry.source,
        content_key=entry.content_key,
        searched=entry.search.options.model_dump() if entry.search else None,
        loads={name: _load(workload, batches.get(name, 1)) for name, workload in entry.workloads.items()},
    )


def _load(workload: _Workload, batch: int) -> Load:
    curve = tuple(Point(point.rate_per_s, point.metrics) for point in workload.curve)
    return Load(workload.task, workload.scenario, workload.samples, curve, batch)


def read_measurements(paths: Sequence[Path]) -> list[Row]:
    """The rows of all measurements together, each of whose builds, where it lies here, is the one that was measured.

    Raises InputError when a build has changed since, besides what `read_rows` raises.
    """
    rows = [row for path in paths for row in read_rows(path)]
    for row in rows:
        _refuse_changed(row)
    return rows


def _refuse_changed(row: Row) -> None:
    # os.path, because a path out of a file may be one that pathlib raises on.
    if row.content_key is None or not row.path or not os.path.isfile(os.path.join(row.path, MANIFEST)):
        return
    here = read_manifest(row.path).content_key
    if here != row.content_key:
        raise InputError(
            f"{row.path} is not the build that was measured as {row.build} (content key {here[:12]} here, "
            f"{row.content_key[:12]} measured): measure it again"
        )
