"""The one error tree.

    SlmdeployError           1  base; never raised itself
    ├── InputError           2  an argument, file or setting that cannot be used as given
    │   ├── SpecError             a TOML file with an unknown key or a wrong type
    │   ├── UnsupportedModelError a checkpoint whose config says something we do not implement
    │   ├── OutputExistsError     the output is there already and --force was not given
    │   ├── RequestCancelledError a request to an engine that was cancelled
    │   └── MissingExtraError     an optional dependency is not installed
    ├── InfeasibleError      3  no measured build meets the budget
    ├── GateError            4  parity or quality outside its limit
    ├── CorruptArtifactError 5  files missing, changed, truncated or hostile
    └── ResourceError        6  disk full, unwritable, out of memory
        ├── QueueFullError        as many requests wait for an engine as may
        ├── EngineStoppedError    an engine that drains, was closed or cannot compute
        └── DeadlineError         a request ran out of its time

The number is the exit code of the command line. A message is one sentence: file, value, remedy.
"""

from slmdeploy.runtime.errors import CorruptArtifactError, InputError, ResourceError, SlmdeployError

__all__ = [
    "CorruptArtifactError",
    "GateError",
    "InfeasibleError",
    "InputError",
    "MissingExtraError",
    "OutputExistsError",
    "ResourceError",
    "SlmdeployError",
    "SpecError",
    "UnsupportedModelError",
]


class SpecError(InputError):
    """A TOML file that does not say what its schema asks for."""


class UnsupportedModelError(InputError):
    """A checkpoint whose config holds a field or value that would change the maths and is not implemented."""


class OutputExistsError(InputError):
    """The output path exists and overwriting was not asked for."""


class MissingExtraError(InputError):
    """A part of slmdeploy whose optional dependencies are not installed."""


class InfeasibleError(SlmdeployError):
    """No build meets the budget; the message says which constraint binds and how far the nearest build is."""

    exit_code = 3


class GateError(SlmdeployError):
    """A parity or quality check outside its limit."""

    exit_code = 4
