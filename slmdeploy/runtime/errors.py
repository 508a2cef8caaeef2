"""The errors that can happen on a device, each with the exit code that the command line ends with.

The rest of the tree is drawn in slmdeploy/errors.py; it starts here because the runtime ships alone in an edge package
and imports nothing else of slmdeploy. The message of an error is one sentence for the user: file, value, remedy.
"""


class SlmdeployError(Exception):
    """Base of every error that is the user's or the machine's doing rather than our bug."""

    exit_code = 1


class InputError(SlmdeployError):
    """An argument, file or setting that cannot be used as given."""

    exit_code = 2


class CorruptArtifactError(SlmdeployError):
    """An artifact whose files are missing, changed, truncated or hostile."""

    exit_code = 5


class ResourceError(SlmdeployError):
    """The machine ran out of something: disk, memory, or the right to write."""

    exit_code = 6


class QueueFullError(ResourceError):
    """As many requests are waiting as may: try again later."""


class EngineStoppedError(ResourceError):
    """The engine takes no requests any more: it drains, was closed, or cannot compute."""


class DeadlineError(ResourceError):
    """A request ran out of the time that it was given."""


class RequestCancelledError(InputError):
    """A request that was cancelled before its answer was complete."""
