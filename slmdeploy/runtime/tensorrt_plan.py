"""What a compiled plan was made of and where it runs: plan.json beside model.plan.

A plan belongs to one version of one product and to the compute capabilities that it was compiled for; nothing in the
file itself is trusted to say so, because opening a plan that does not fit may crash. So the recipe is compared with the
machine before the plan is touched, and what does not fit is one sentence. The graph that was compiled is beside it, and
the recipe says how, so it can be compiled again. Knows nothing of how a plan is made or run.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .strictjson import Fields, read_object
from .tensorrt_api import PRODUCTS

PLAN, RECIPE = "model.plan", "plan.json"
FORMAT = 1
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""By input the least, the most likely and the largest shape."""


@dataclass(frozen=True)
class Phase:
    """One optimisation profile: what it is for, and the shapes of the inputs that it takes."""

    name: str
    shapes: Shapes


@dataclass(frozen=True)
class Recipe:
    """plan.json, checked. ``capacity`` is that of a static cache, whose length a plan fixes; None for others.

    ``driver`` is the newest CUDA version of the driver that compiled, None where it was compiled without a GPU.
    """

    module: str
    version: str
    compute_capabilities: tuple[str, ...]
    driver: int | None
    graph_sha256: str
    phases: tuple[Phase, ...]
    capacity: int | None
    workspace_bytes: int
    level: int | None
    options: tuple[str, ...]

    @property
    def title(self) -> str:
        """The product and its version, as people name it."""
        return f"{PRODUCTS[self.module].title} {self.version}"

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {"format": FORMAT} | asdict(self)


@dataclass(frozen=True)
class Machine:
    """What a plan is opened with: the version of the product, and the GPU's compute capability and driver."""

    version: str
    compute_capability: str
    driver: int


def mismatch(recipe: Recipe, here: Machine) -> str | None:
    """Why the plan does not run on this machine, as the end of a sentence; None if it does."""
    title = PRODUCTS[recipe.module].title
    if recipe.version != here.version and "version-compatible" not in recipe.options:
        return f"was compiled by {recipe.title}, and {title} {here.version} is installed"
    if not _runs_on(recipe, here.compute_capability):
        wanted = " or ".join(recipe.compute_capabilities)
        return f"was compiled for compute capability {wanted}, and the GPU here has {here.compute_capability}"
    if recipe.driver is not None and here.driver < recipe.driver:
        return f"was compiled with a driver of CUDA {_cuda(recipe.driver)}, and the one here is of {_cuda(here.driver)}"
    return None


def _runs_on(recipe: Recipe, capability: str) -> bool:
    if capability in recipe.compute_capabilities:
        return True
    forward = "hardware-compatible" in recipe.options  # from Ampere on, whichever it was compiled on
    return forward and float(capability) >= 8.0 and all(float(one) >= 8.0 for one in recipe.compute_capabilities)


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def read_recipe(folder: Path) -> Recipe:
    """Parse ``folder``/plan.json; anything that is not as it should be is a CorruptArtifactError."""
    fields = read_object(folder / RECIPE)
    fields.integer("format", FORMAT, FORMAT)
    module = fields.string("module", 32)
    if module not in PRODUCTS:
        fields.refuse("module", f"one of {', '.join(PRODUCTS)}")
    recipe = Recipe(
        module=module,
        version=fields.string("version", 64),
        compute_capabilities=tuple(fields.items("compute_capabilities", "numbers such as 8.9", _is_capability, low=1)),
        driver=optional_integer(fields, "driver", 1 << 20),
        graph_sha256=fields.string("graph_sha256", 64),
        phases=read_phases(fields),
        capacity=optional_integer(fields, "capacity", 1 << 24),
        workspace_bytes=fields.integer("workspace_bytes", 1, 1 << 44),
        level=optional_integer(fields, "level", 5),
        options=tuple(fields.items("options", "strings", lambda value: isinstance(value, str))),
    )
    fields.finish()
    return recipe


def optional_integer(fields: Fields, key: str, high: int) -> int | None:
    """An integer from 0 to ``high``, or null."""
    return None if fields.get(key) is None else fields.integer(key, 0, high)


def _is_capability(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 8:
        return False
    parts = value.split(".")
    return len(parts) == 2 and all(part.isdigit() for part in parts)


def read_phases(fields: Fields) -> tuple[Phase, ...]:
    """The key ``phases``: objects with a name and, by input, three shapes."""
    found = fields.items("phases", "objects", lambda value: isinstance(value, dict), low=1, high=16)
    return tuple(_phase(fields, index, value) for index, value in enumerate(found))


def _phase(fields: Fields, index: int, value: dict[str, Any]) -> Phase:
    phase = Fields(fields.path, f"phases.{index}.", value)
    name, shapes = phase.string("name", 64), phase.object("shapes")
    found = {key: tuple(tuple(shape) for shape in shapes.items(key, "three shapes", _is_shape, 3, 3)) for key in
             shapes.value}  # fmt: skip
    phase.finish()
    return Phase(name, {key: (least, likely, most) for key, (least, likely, most) in found.items()})


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n <= 1 << 32 for n in value)
