"""The nouns that users write or choose: Target, Profile, Workload, Budget, Recipe, and the strict TOML loader.

A target states facts about hardware and no intent; a profile says how to build and states no hardware fact; they meet
only in `build`. Unknown keys, wrong types and unknown names are errors that name the file, the key and the nearest
valid one. No inheritance and no interpolation: a file says everything it means. Knows nothing of graphs or torch.
"""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmdeploy.errors import InputError, SpecError

_PACKAGED = Path(__file__).parent / "_data"
_REPOSITORY = Path(__file__).parent.parent


class Spec(BaseModel):
    """Base of every noun here: immutable, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Spec)
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=False)]
Real = Annotated[float, Field(strict=False)]
AboveZero = Annotated[float, Field(gt=0.0, strict=False)]


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
    peak_ops: dict[str, Real] = {}
    engines: tuple[str, ...] = Field(strict=False)
    price_per_hour_usd: Real | None = None
    sources: dict[str, str] = {}

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


class Weights(Spec):
    """How the linear layers inside the blocks are stored and multiplied."""

    scheme: Literal["fp32", "w8a8", "w8a8-static", "weight-only"]
    bits: Literal[4, 8, 32] = 32
    block_size: Literal[16, 32, 64, 128, 256] = 128
    symmetric: bool = True

    @model_validator(mode="after")
    def _bits_fit_the_scheme(self) -> Self:
        allowed = {"fp32": (32,), "w8a8": (8,), "w8a8-static": (8,), "weight-only": (4, 8)}[self.scheme]
        if self.bits not in allowed:
            raise ValueError(f"bits = {self.bits} does not go with scheme = {self.scheme!r}: use {allowed}")
        return self


class Storage(Spec):
    """Bits of a table that is treated apart: the embedding or the head."""

    bits: Literal[4, 8, 32] = 32
    block_size: Literal[16, 32, 64, 128, 256] = 128
    symmetric: bool = True


class Requires(Spec):
    """What a profile needs of a target: all of ``isa`` to run at all, any of ``slow_without`` to be worth choosing."""

    isa: tuple[str, ...] = Field(default=(), strict=False)
    slow_without: tuple[str, ...] = Field(default=(), strict=False)


class SessionOptions(Spec):
    """Options of the engine's session; ``threads`` = 0 means all physical cores that the process may use."""

    threads: Annotated[int, Field(ge=0)] = 0
    spinning: bool = True


class Gate(Spec):
    """Quality limits against the build's own fp32 graph.

    Decoders: KL in nats per token, top-1 share, perplexity ratio. Encoders: the least cosine of a text's vectors, or
    the largest difference of a logit (relative where logits are above 1) and ``min_top1`` as the share of equal labels.
    """

    max_kl: Real = 0.02
    min_top1: Share = 0.9
    max_ppl_ratio: Real = 1.02
    min_cosine: Share = 0.98
    max_logit_difference: Real = 0.1


class Profile(Spec):
    """How to build: engine, precision, quantisation scheme, session options, and what it requires of a target.

    ``prefill`` and ``scoring`` are the forms of the linear layers in graphs of their own, for prompts and for scores,
    where those are others than ``weights``: phases have different bottlenecks.
    ``encoder`` is the form of an encoder's linear layers where it is another than a decoder's; of the engine openvino.
    ``prepacked`` stores weights in the engine's own layout too, so that processes share them (building/prepacking.py).
    """

    name: str
    summary: str
    engine: Literal["onnxruntime", "openvino"]
    weights: Weights
    prefill: Weights | None = None
    scoring: Weights | None = None
    encoder: Weights | None = None
    embedding: Storage = Storage()
    head: Storage = Storage()
    requires: Requires = Requires()
    prepacked: bool = False
    session: SessionOptions = SessionOptions()
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _keys_fit_the_engine(self) -> Self:
        others = ("prefill", "scoring", "embedding", "head", "prepacked")
        strange = {"onnxruntime": ("encoder",), "openvino": others}[self.engine]
        for name in strange:
            if name in self.model_fields_set:
                raise ValueError(f"engine = {self.engine!r} does not take {name}")
        if self.engine == "openvino" and self.weights.scheme == "w8a8-static":
            raise ValueError("engine = 'openvino' has no scheme w8a8-static: use w8a8, whose ranges it calibrates")
        per_channel = self.weights.scheme == "weight-only" and self.weights.bits == 8
        if self.engine == "openvino" and per_channel and "block_size" in self.weights.model_fields_set:
            raise ValueError("engine = 'openvino' has one scale per channel at 8 bits: leave block_size out")
        return self


class Workload(Spec):
    """One kind of request and how requests arrive. Lengths are in tokens; ``items`` are candidates per request.

    ``texts`` are texts per request of an encoder, each of ``text_tokens``, special tokens among them.
    """

    name: str
    task: Literal["generate", "score", "embed", "classify"]
    scenario: Literal["single-stream", "offline"] = "single-stream"
    prompt_tokens: Positive | None = None
    new_tokens: Positive | None = None
    prefix_tokens: Positive | None = None
    items: Positive | None = None
    item_tokens: Positive | None = None
    texts: Positive | None = None
    text_tokens: Positive | None = None
    requests: Positive = 20

    @model_validator(mode="after")
    def _lengths_fit_the_task(self) -> Self:
        encode = ("texts", "text_tokens")
        needed = {
            "generate": ("prompt_tokens", "new_tokens"),
            "score": ("prefix_tokens", "items", "item_tokens"),
            "embed": encode,
            "classify": encode,
        }
        for name in dict.fromkeys(name for names in needed.values() for name in names):
            if (getattr(self, name) is not None) != (name in needed[self.task]):
                verb = "needs" if name in needed[self.task] else "does not take"
                raise ValueError(f"task = {self.task!r} {verb} {name}")
        return self


def _generate(prompt: int, new: int, scenario: Literal["single-stream", "offline"]) -> Workload:
    name = f"generate-{prompt}-{new}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task="generate", scenario=scenario, prompt_tokens=prompt, new_tokens=new)


def _score(prefix: int, items: int, length: int, scenario: Literal["single-stream", "offline"]) -> Workload:
    name = f"score-{prefix}-{items}x{length}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task="score", scenario=scenario, prefix_tokens=prefix, items=items, item_tokens=length)


def _encode(
    task: Literal["embed", "classify"], texts: int, length: int, scenario: Literal["single-stream", "offline"]
) -> Workload:
    size = f"{length}" if texts == 1 else f"{texts}x{length}"
    name = f"{task}-{size}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task=task, scenario=scenario, texts=texts, text_tokens=length)


WORKLOADS = {
    workload.name: workload
    for scenario in ("single-stream", "offline")
    for workload in (
        _generate(32, 32, scenario),
        _generate(128, 64, scenario),
        _generate(512, 64, scenario),
        _score(32, 10, 24, scenario),
        _score(512, 10, 16, scenario),
        _score(512, 32, 16, scenario),
        *(
            _encode(task, texts, length, scenario)
            for task in ("embed", "classify")
            for texts, length in ((1, 128), (8, 128), (32, 128), (1, 512))
        ),
    )
}
"""The shipped workloads by name; the longer ones have the shapes of arXiv 2502.14305's service."""


class Constraint(Spec):
    """A hard limit on one metric, such as ``ttft_ms_p99 <= 300``."""

    metric: str
    operator: Literal["<=", ">="]
    limit: Real

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the limit, the limit itself included."""
        return value <= self.limit if self.operator == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.limit:g}"


_CONSTRAINT = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(<=|>=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


def parse_constraint(text: str) -> Constraint:
    """Read ``metric<=number`` or ``metric>=number``; anything else is an InputError that shows the form."""
    match = _CONSTRAINT.fullmatch(text)
    try:
        if match:
            metric, operator, limit = match.groups()
            return Constraint.model_validate({"metric": metric, "operator": operator, "limit": float(limit)})
    except ValueError:
        pass  # a number such as "1.2.3": told below together with every other wrong form
    raise InputError(f"budget {text!r} is not of the form metric<=number or metric>=number, e.g. 'tpot_ms_p50<=5'")


Objective = Literal["fastest", "throughput", "smallest", "quality"]


class Budget(Spec):
    """Constraints that a build must all meet, and what to prefer among those that do."""

    constraints: tuple[Constraint, ...] = ()
    objective: Objective = "fastest"


def parse_budget(*texts: str, objective: Objective = "fastest") -> Budget:
    """A Budget from ``metric<=number`` texts."""
    return Budget(constraints=tuple(parse_constraint(text) for text in texts), objective=objective)


class ModelSource(Spec):
    """Where the checkpoint comes from: a folder relative to the recipe, or a Hugging Face id."""

    teacher: str


class DataSource(Spec):
    """``stdlib`` (the embedded default), or a folder of JSON lines relative to the recipe (docs/data.md)."""

    source: str
    labels: Annotated[tuple[str, str], Field(strict=False)] = (" no", " yes")


class PrunePlan(Spec):
    """``ratio`` is the share of MLP neurons and GQA groups that is removed, ``layer_ratio`` that of whole layers."""

    ratio: Annotated[float, Field(ge=0.0, lt=1.0)]
    method: Literal["osscar", "magnitude", "random"] = "osscar"
    attention_ratio: Share | None = None
    layer_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    calibration_tokens: Positive = 16384
    seed: int = 0

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        if self.ratio == self.layer_ratio == 0:
            raise ValueError("ratio = 0 goes with a layer_ratio above 0: raise either")
        return self


class DistillStage(Spec):
    """One stage of distillation: supervised when ``on_policy`` is 0, otherwise partly on what the student writes.

    The loss of a counted token is ``ce_share``·CE + (1 - ``ce_share``)·KD, where KD is ``loss`` at ``temperature``,
    multiplied by its square. ``beta`` is generalised JSD's weight of the teacher (GKD, Agarwal et al. 2024): 0 is the
    forward KL, 1 the reverse. ``score_share`` is the share of rows that hold scoring records. ``on_policy`` is the
    probability that a batch's responses are sampled from the student. Lengths are in tokens, ``batch_rows`` is rows of
    ``length`` tokens per forward pass, and one optimiser step sees ``batch_rows · gradient_accumulation`` of them.
    ``optimizer`` = "muon" orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW at a fixed
    share of ``learning_rate`` (training.py).
    """

    steps: Positive
    batch_rows: Positive = 8
    length: Annotated[int, Field(ge=16)] = 512
    gradient_accumulation: Positive = 1
    learning_rate: AboveZero = 1e-3
    warmup_share: Share = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Share | None = None
    temperature: AboveZero = 1.0
    ce_share: Share = 0.0
    score_share: Share = 0.0
    on_policy: Share = 0.0
    response_tokens: Positive = 64
    sample_temperature: AboveZero = 0.9
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: Positive = 100
    eval_rows: Annotated[int, Field(ge=0)] = 16
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.beta is None) == (self.loss == "jsd"):
            raise ValueError(f"beta goes with loss = 'jsd' and with no other, and loss = {self.loss!r}")
        if self.on_policy > 0 and self.score_share == 1:
            raise ValueError("on_policy needs rows of text to sample: lower score_share below 1")
        if self.on_policy > 0 and self.response_tokens > self.length // 2:
            raise ValueError(f"response_tokens = {self.response_tokens} leaves too little of length = {self.length}")
        return self

    @property
    def rows(self) -> int:
        """Rows that the whole stage sees."""
        return self.steps * self.batch_rows * self.gradient_accumulation

    @property
    def tokens(self) -> int:
        """Tokens that the whole stage sees, padding included."""
        return self.rows * self.length


def distill_stage(**fields: Any) -> DistillStage:
    """A DistillStage from loose fields, as a command line gives them; raises SpecError with the first wrong one."""
    try:
        return DistillStage.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"distillation stage: {where + ': ' if where else ''}{reason}") from error


class Candidates(Spec):
    """The profiles to build and the target to build them for; ``auto`` is the target that this machine matches."""

    profiles: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    target: str = "auto"


class BudgetSection(Spec):
    """The budget as a recipe writes it: a list of ``metric<=number`` and an objective."""

    constraints: Annotated[tuple[str, ...], Field(strict=False)] = ()
    objective: Objective = "fastest"


class PackagePlan(Spec):
    """What to ship the chosen build as."""

    kind: Literal["edge"] = "edge"


class Recipe(Spec):
    """One project from the teacher to the package. A stage that is left out is not run."""

    name: str
    model: ModelSource
    data: DataSource
    tasks: Annotated[tuple[Literal["generate", "score"], ...], Field(min_length=1, strict=False)]
    prune: PrunePlan | None = None
    distill: Annotated[tuple[DistillStage, ...], Field(strict=False)] = ()
    candidates: Candidates
    workload: Annotated[tuple[Workload, ...], Field(min_length=1, strict=False)]
    budget: BudgetSection = BudgetSection()
    package: PackagePlan = PackagePlan()

    def parsed_budget(self) -> Budget:
        """The budget section with its constraints read."""
        return parse_budget(*self.budget.constraints, objective=self.budget.objective)


def load_toml(path: Path, spec: type[S]) -> S:
    """Read ``path`` as ``spec``; every way in which it can be wrong is one SpecError naming file, key and remedy."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from error
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


def _shipped(kind: str) -> Path:
    packaged = _PACKAGED / kind
    return packaged if packaged.is_dir() else _REPOSITORY / kind


def _load_named(name: str, kind: str, spec: type[S]) -> S:
    if "/" in name or "\\" in name or name.endswith(".toml"):
        return load_toml(Path(name), spec)
    names = sorted(path.stem for path in _shipped(kind).glob("*.toml"))
    if name not in names:
        raise SpecError(f"there is no {kind.removesuffix('s')} {name!r}{nearest(name, names)}")
    return load_toml(_shipped(kind) / f"{name}.toml", spec)


def load_target(name: str) -> Target:
    """The shipped target of that name, or the file when ``name`` has a separator or ends in .toml."""
    return _load_named(name, "targets", Target)


def load_profile(name: str) -> Profile:
    """The shipped profile of that name, or the file when ``name`` has a separator or ends in .toml."""
    return _load_named(name, "profiles", Profile)


def load_recipe(path: Path) -> Recipe:
    """The recipe at ``path``, its budget checked for form."""
    recipe = load_toml(path, Recipe)
    try:
        recipe.parsed_budget()
    except InputError as error:
        raise SpecError(f"{path}: {error}") from error
    return recipe


def list_targets() -> list[Target]:
    """Every shipped target by name."""
    return [load_target(path.stem) for path in sorted(_shipped("targets").glob("*.toml"))]


def list_profiles() -> list[Profile]:
    """Every shipped profile by name."""
    return [load_profile(path.stem) for path in sorted(_shipped("profiles").glob("*.toml"))]


def choose_workloads(names: Sequence[str], recipe: Path | None = None) -> tuple[Workload, ...]:
    """The shipped workloads called ``names``, or those of a recipe; exactly one of the two must be given."""
    if bool(names) == (recipe is not None):
        raise InputError(f"name workloads or a recipe, one of the two; shipped workloads: {', '.join(WORKLOADS)}")
    if recipe is not None:
        return load_recipe(recipe).workload
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise InputError(f"there is no workload {unknown[0]!r}{nearest(unknown[0], list(WORKLOADS))}")
    return tuple(WORKLOADS[name] for name in names)
