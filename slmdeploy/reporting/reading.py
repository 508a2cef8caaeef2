"""From a run folder or a measurement to plain data: rows, choice, stages, sensitivities, machine.

Everything that a page shows comes from here, checked: a wrong type, a NaN or another schema is one sentence. A run
holds manifests of large artifacts; these are read and their files are not hashed, because a report shows what was
found and `verify` proves that it is intact. A measurement alone has less to show, and `Run.left_out` says what. Knows
nothing of how anything is drawn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slmdeploy.artifacts import digest, open_artifact
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.metrics import known_names
from slmdeploy.reporting.records import Choice, Data, Measured, Measurement, Row, Run, Sensitivity, Stage
from slmdeploy.runtime.bundle import MANIFEST, read_manifest

SCHEMA = 2
MEASUREMENT = "measurement.json"
SUMMARY = "summary.json"


def read_run(path: Path) -> Run:
    """Read a folder made by `slmdeploy run`, a measurement folder, or a measurement's .json file.

    Raises InputError when it is none of these, or holds a measurement of an earlier schema; CorruptArtifactError when a
    file is not of its documented form.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        return Run(path.stem, _measurement(path), left_out=_ONLY_A_MEASUREMENT)
    if (path / SUMMARY).is_file():
        return _run(path)
    if (path / MANIFEST).is_file():
        artifact = open_artifact(path, "measurement")
        return Run(path.resolve().name, _measurement(artifact.path / MEASUREMENT), left_out=_ONLY_A_MEASUREMENT)
    raise InputError(
        f"{path} has neither {SUMMARY} nor {MANIFEST}: give a folder made by `slmdeploy run`, or a measurement"
    )


_ONLY_A_MEASUREMENT = (
    "Pipeline, selection and per-layer sensitivity are left out: this is a measurement alone, and they need the folder "
    "of a run.",
)


def _measurement(file: Path) -> Measurement:
    text = _text(file)
    try:
        schema = _object(text, file).get("schema", 1)
        if schema != SCHEMA:
            raise InputError(f"{file} has schema {schema!r}, but this version reads {SCHEMA}: measure again")
        found = Measurement.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifactError(f"{file} is no measurement: {_first(error)}; measure again") from error
    if not found.rows:
        raise InputError(f"{file} has no rows, so there is nothing to report: measure at least one build")
    unknown = sorted(_names(found.rows) - set(known_names()))
    if unknown:
        raise CorruptArtifactError(
            f"{file} has the metric {unknown[0]!r}, which this version does not know; measure again"
        )
    _refuse_twice(found.rows, file)
    return found


def _refuse_twice(rows: list[Row], place: Path) -> None:
    keys = [(row.target, row.build) for row in rows]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise CorruptArtifactError(f"{place} has two rows of build {twice[0][1]!r} on one target; measure again")


def _names(rows: list[Row]) -> set[str]:
    """Every metric of the rows and of their workloads."""
    parts: list[Row | Measured] = list(rows)
    parts += [workload for row in rows for workload in row.workloads.values()]
    return {name for part in parts for name in (*part.metrics, *part.intervals)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist") from error
    except UnicodeDecodeError as error:
        raise CorruptArtifactError(f"{file} is no JSON file: it is not UTF-8") from error


def _object(text: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{file} is no JSON file: {error}; make it again") from error
    if not isinstance(found, dict):
        raise CorruptArtifactError(f"{file} is not a JSON object; make it again")
    return found


class _Step(Data):
    name: str
    path: str
    reused: bool
    seconds: float


class _Trial(Data):
    summary: str


class _Summary(Data):
    recipe: str
    out: str
    steps: list[_Step]
    package: str | None = None
    trial: _Trial | None = None


def _run(folder: Path) -> Run:
    file = folder / SUMMARY
    try:
        summary = _Summary.model_validate_json(_text(file))
    except ValidationError as error:
        raise CorruptArtifactError(f"{file} is no summary of a run: {_first(error)}; run again") from error
    steps = [(step, _inside(folder, summary.out, step.path)) for step in summary.steps if step.name != _OWN]
    measured = [place for step, place in steps if step.name == "profile"]
    if not measured:
        raise InputError(f"{file} has no step 'profile', so there is nothing to report: let `slmdeploy run` finish")
    measurement = _measurement(open_artifact(measured[0], "measurement").path / MEASUREMENT)
    estimates = [_measurement(place) for step, place in steps if step.name.startswith(_ESTIMATE)]
    selected = next((place for step, place in steps if step.name == "select"), None)
    selection = _selection(selected) if selected else None
    rows = [row for found in (measurement, *estimates) for row in found.rows]
    _refuse_twice(rows, folder)
    sensitivities = tuple(found for _, place in steps for found in _sensitivities(place))
    return Run(
        summary.recipe,
        measurement.model_copy(update={"rows": rows}),
        selection=selection,
        stages=tuple(_stages(folder, steps)),
        sensitivities=sensitivities,
        package=summary.package,
        trial=summary.trial.summary if summary.trial else None,
        left_out=tuple(_left_out(rows, selection, sensitivities)),
    )


_OWN = "report"
"""The step that wrote the report of an earlier run."""
_ESTIMATE = "estimate "


def _left_out(rows: list[Row], selection: Choice | None, sensitivities: tuple[Sensitivity, ...]) -> Iterator[str]:
    here = {(row.target, row.build) for row in rows}
    elsewhere = [f"{one.build}@{one.target}" for one in (selection.candidates if selection else [])
                 if (one.target, one.build) not in here]  # fmt: skip
    if elsewhere:
        yield f"The figures of {', '.join(elsewhere)} are left out: they were imported and are not in the run's folder."
    if not sensitivities:
        yield _NO_SENSITIVITY


_NO_SENSITIVITY = (
    "Per-layer sensitivity is left out: no build kept a part in higher precision than its profile asks for."
)


def _inside(folder: Path, out: str, path: str) -> Path:
    """Where a step's artifact lies now: the run's folder may have moved since, its layout has not."""
    try:
        place = folder / Path(path).relative_to(out)
        place.resolve().relative_to(folder.resolve())
    except ValueError as error:
        raise CorruptArtifactError(
            f"{folder / SUMMARY} names {path!r}, which is not in the folder of the run; run again"
        ) from error
    return place


def _stages(folder: Path, steps: list[tuple[_Step, Path]]) -> Iterator[Stage]:
    """The steps with what each was made of; an estimate is one file, whose key is its hash."""
    made = {digest(place): step.name for step, place in steps}
    for step, place in steps:
        manifest = read_manifest(place) if place.is_dir() else None
        yield Stage(
            name=step.name,
            folder=place.relative_to(folder).as_posix(),
            key=manifest.content_key if manifest else digest(place),
            seconds=step.seconds,
            reused=step.reused,
            plan=manifest.plan if manifest else {},
            inputs={name: made.get(entry["digest"], name) for name, entry in manifest.inputs.items()}
            if manifest
            else {},
        )


def _selection(folder: Path) -> Choice:
    file = open_artifact(folder, "selection").path / "selection.json"
    try:
        return Choice.model_validate_json(_text(file))
    except ValidationError as error:
        raise CorruptArtifactError(f"{file} is no selection: {_first(error)}; select again") from error


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    return f"{where}: {found['msg']}" if where else str(found["msg"])


class _Kept(Data):
    part: str
    wanted: str
    form: str
    kl_alone: float | None = None
    loss_alone: float | None = None

    @property
    def loss(self) -> float:
        """What the part costs alone: KL of a decoder, the loss of an encoder's gate."""
        return self.kl_alone if self.kl_alone is not None else self.loss_alone or 0.0


class _Form(Data):
    parts: Mapping[str, str] = {}
    kept: Sequence[_Kept] = ()


class _Built(_Form):
    forms: dict[str, _Form] | None = None


def _sensitivities(folder: Path) -> Iterator[Sensitivity]:
    """What a build's manifest says of parts kept in higher precision; forms that say the same are named together."""
    if not folder.is_dir() or (manifest := read_manifest(folder)).kind != "build":
        return
    try:
        built = _Built.model_validate(manifest.result)
    except ValidationError as error:
        raise CorruptArtifactError(f"{folder / MANIFEST}: {_first(error)}; build again") from error
    found: dict[str, list[str]] = {}
    forms = built.forms or {"": built}
    for name, form in forms.items():
        found.setdefault(form.model_dump_json(), []).append(name)
    for names in found.values():
        form = forms[names[0]]
        if form.kept:
            kept = sorted(((k.part, k.wanted, k.form, k.loss) for k in form.kept), key=lambda k: -k[3])
            counts = {name: list(form.parts.values()).count(name) for name in sorted(set(form.parts.values()))}
            measure = "KL in nats per token" if form.kept[0].kl_alone is not None else "loss of the gate"
            yield Sensitivity(folder.name, " and ".join(n for n in names if n), measure, tuple(kept), counts)
