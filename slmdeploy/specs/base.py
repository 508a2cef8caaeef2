"""What all nouns share: immutable models that are strict about keys and types, and the loader of TOML files.

Unknown keys, wrong types and unknown names are errors that name the file, the key and the nearest valid one. No
inheritance and no interpolation: a file says everything it means.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmdeploy.errors import InputError, SpecError

_PACKAGED = Path(__file__).parents[1] / "_data"
_REPOSITORY = Path(__file__).parents[2]


class Spec(BaseModel):
    """Base of every noun here: immutable, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Spec)
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=False)]
Real = Annotated[float, Field(strict=False)]
AboveZero = Annotated[float, Field(gt=0.0, strict=False)]


def load_toml(path: Path, spec: type[S]) -> S:
    """Read ``path`` as ``spec``; every way in which it can be wrong is one SpecError naming file, key and remedy."""
    return checked(read_toml(path), spec, path)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file, whatever they mean. Raises InputError or SpecError where it cannot be read as TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from error


def checked(content: dict[str, Any], spec: type[S], path: Path) -> S:
    """``content`` of the file ``path`` as ``spec``, or the SpecError that `load_toml` promises."""
    try:
        return spec.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{path}: {_explain(error, spec)}") from error


def _explain(error: ValidationError, spec: type[Spec]) -> str:
    # An unknown key comes first: a misspelt one also leaves the right one missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(str(first['loc'][-1]), _keys_at(spec, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    where = (
        f"{key} = {first['input']!r}: " if key and not isinstance(first["input"], dict) else f"{key}: " if key else ""
    )
    return f"{where}{reason[:1].lower()}{reason[1:]}"


def _keys_at(spec: type[Spec], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the table at ``location``, by a walk over the schema."""
    schema = spec.model_json_schema()
    here = schema
    for part in location:
        here = here.get("items", here) if isinstance(part, int) else here.get("properties", {}).get(part, {})
        options = [here, *here.get("anyOf", [])]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        if reference is None and "$ref" in here.get("items", {}):
            reference = here["items"]["$ref"]
        if reference:
            here = schema["$defs"][reference.rsplit("/", 1)[1]]
    return list(here.get("properties", {}))


def nearest(name: str, valid: list[str]) -> str:
    """The end of a sentence that offers what was probably meant: the nearest valid name, else all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": valid are {', '.join(sorted(valid))}" if valid else ""


def shipped(kind: str) -> Path:
    """The folder of the files of a kind that come with slmdeploy: in the wheel, else in the repository."""
    packaged = _PACKAGED / kind
    return packaged if packaged.is_dir() else _REPOSITORY / kind


def load_named(name: str, kind: str, spec: type[S]) -> S:
    """The shipped file of that name, or the file when ``name`` has a separator or ends in .toml."""
    if "/" in name or "\\" in name or name.endswith(".toml"):
        return load_toml(Path(name), spec)
    names = sorted(path.stem for path in shipped(kind).glob("*.toml"))
    if name not in names:
        raise SpecError(f"there is no {kind.removesuffix('s')} {name!r}{nearest(name, names)}")
    return load_toml(shipped(kind) / f"{name}.toml", spec)
