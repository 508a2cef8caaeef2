"""Opens model.plan on the GPU at hand: compares it with the machine first, then gives one call for each of its phases.

The plan is native code of the compiler's, and one that does not fit may crash; so nothing is deserialised before
plan.json says that it belongs here (tensorrt_plan.py) and the manifest's hashes that it is what was compiled. Names are
checked against the bindings by tensorrt_api.py. Written to the API; **not run on a GPU yet**. Knows nothing of tokens.
"""

from pathlib import Path
from typing import Any, Protocol

from .cuda_device import Stream, find_gpu
from .errors import CorruptArtifactError, InputError, ResourceError
from .tensorrt_api import PRODUCTS, load
from .tensorrt_plan import PLAN, Machine, Recipe, mismatch, read_recipe

_REMEDY = "make one for this machine with `slmdeploy recompile`"


class Context(Protocol):
    """What is used of TensorRT's IExecutionContext."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Call(Protocol):
    """One phase of a plan: inputs and outputs at addresses on the device, and a run that is queued behind others."""

    def set_input(self, name: str, shape: tuple[int, ...], address: int) -> None: ...
    def set_output(self, name: str, address: int) -> None: ...
    def run(self) -> None: ...


class PhaseCall:
    """A Call of TensorRT's: one execution context under one optimisation profile."""

    def __init__(self, context: Context, index: int, stream: Stream, path: Path) -> None:
        self._context, self._stream, self._path = context, stream, path
        self._must(context.set_optimization_profile_async(index, stream.number), f"has no phase {index}")
        stream.wait()

    def set_input(self, name: str, shape: tuple[int, ...], address: int) -> None:
        """Read ``name`` in this shape from this address in the runs to come."""
        self._must(self._context.set_input_shape(name, shape), f"does not take {name} in the shape {list(shape)}")
        self._must(self._context.set_tensor_address(name, address), f"has no input {name}")

    def set_output(self, name: str, address: int) -> None:
        """Write ``name`` to this address in the runs to come."""
        self._must(self._context.set_tensor_address(name, address), f"has no output {name}")

    def run(self) -> None:
        """Queue one run."""
        self._must(self._context.execute_async_v3(self._stream.number), "could not be run")

    def _must(self, done: bool, failure: str) -> None:
        if not done:
            raise CorruptArtifactError(f"{self._path} {failure}; {_REMEDY}.")


class PlanSession:
    """model.plan of a folder, opened; `phase` gives a call for each phase that its recipe names."""

    def __init__(self, folder: Path) -> None:
        recipe = read_recipe(folder)
        reason = unavailable(folder)
        if reason:
            raise InputError(f"{folder} cannot be run here: {reason}.")
        self._api: Any = load(recipe.module)
        self.stream = Stream()
        self._path, self._recipe = folder / PLAN, recipe
        self._runtime = self._api.Runtime(self._api.Logger(self._api.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if self._engine is None:
            raise CorruptArtifactError(f"{self._path} cannot be opened by {recipe.title}; {_REMEDY}.")

    @property
    def inputs(self) -> frozenset[str]:
        """The names of what the plan reads."""
        return frozenset(self._recipe.phases[0].shapes)

    @property
    def most_rows(self) -> int:
        """Rows in the largest batch that the plan takes."""
        return self._recipe.phases[0].shapes["input_ids"][2][0]

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of what the plan writes, by name; -1 for a size that depends on what it reads."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        written = [name for name in names if engine.get_tensor_mode(name) == self._api.TensorIOMode.OUTPUT]
        return {name: tuple(engine.get_tensor_shape(name)) for name in written}

    def phase(self, name: str) -> PhaseCall:
        """The call of a phase; ResourceError where the GPU has no memory for it."""
        index = [phase.name for phase in self._recipe.phases].index(name)
        context = self._engine.create_execution_context()
        if context is None:
            raise ResourceError(f"{self._path} does not fit into the GPU's memory: free some or use a smaller model.")
        return PhaseCall(context, index, self.stream, self._path)


def not_here(folder: Path) -> str | None:
    """Why a build for TensorRT cannot be run here, None if it can: it may have no plan, or one for elsewhere."""
    if not (folder / PLAN).is_file():
        return "it was not compiled, so build it where its compiler and its GPU are"
    return unavailable(folder)


def runs_here(folder: Path) -> bool:
    """Whether a build for TensorRT runs as a plan on this machine; without a GPU or a plan its numbers run on the CPU.

    Raises InputError where there is a GPU and the plan is not for it: the numbers would come in its place unasked.
    """
    if not (folder / PLAN).is_file():
        return False
    try:
        gpu = find_gpu()
    except InputError:  # no cuda-bindings, so nothing here has been set up for a GPU
        return False
    if gpu is None:
        return False
    if reason := unavailable(folder):
        raise InputError(f"{folder} cannot be run here: {reason}.")
    return True


def unavailable(folder: Path) -> str | None:
    """Why the plan of a folder does not run on this machine, None if it does; CorruptArtifactError for a bad recipe."""
    recipe: Recipe = read_recipe(folder)
    try:
        module = load(recipe.module)
        gpu = find_gpu()
    except InputError as error:
        return str(error)
    if gpu is None:
        return f"its plan is {PRODUCTS[recipe.module].title}'s, and this machine has no NVIDIA GPU or no driver for it"
    reason = mismatch(recipe, Machine(str(module.__version__), gpu.compute_capability, gpu.driver))
    return f"its plan {reason}: {_REMEDY}" if reason else None
