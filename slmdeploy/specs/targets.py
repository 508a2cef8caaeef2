"""Target: facts about hardware, each with the place it comes from, and no intent."""

from typing import Literal, Self

from pydantic import Field, model_validator

from slmdeploy.specs.base import Positive, Real, Spec, load_named, shipped


class Target(Spec):
    """A piece of hardware. Every figure has a source, and ``peak_ops`` is in operations per second by dtype."""

    name: str
    summary: str
    kind: Literal["cpu", "gpu"]
    arch: Literal["x86_64", "aarch64"] | None = None
    isa: tuple[str, ...] = Field(default=(), strict=False)
    compute_capability: str | None = None
    memory_bytes: Positive | None = None
    read_bandwidth_bytes_per_s: Real | None = None
    peak_ops: dict[str, Real] = Field(default={})
    engines: tuple[str, ...] = Field(strict=False)
    price_per_hour_usd: Real | None = None
    sources: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Self:
        figures = {
            "memory_bytes": self.memory_bytes,
            "read_bandwidth_bytes_per_s": self.read_bandwidth_bytes_per_s,
            "peak_ops": self.peak_ops or None,
            "price_per_hour_usd": self.price_per_hour_usd,
        }
        unsourced = [name for name, value in figures.items() if value is not None and name not in self.sources]
        if unsourced:
            raise ValueError(f"sources.{unsourced[0]} is missing: a figure needs the place it comes from")
        return self


def load_target(name: str) -> Target:
    """The shipped target of that name, or the file when ``name`` has a separator or ends in .toml."""
    return load_named(name, "targets", Target)


def list_targets() -> list[Target]:
    """Every shipped target by name."""
    return [load_target(path.stem) for path in sorted(shipped("targets").glob("*.toml"))]
