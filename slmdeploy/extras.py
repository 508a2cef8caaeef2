"""Checks that an optional dependency is there before a verb starts, so that its absence is one sentence."""

from importlib.util import find_spec

from slmdeploy.errors import MissingExtraError


def require(extra: str, *modules: str) -> None:
    """Raise MissingExtraError with the pip command unless every module of ``modules`` can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"this step needs {', '.join(missing)}, which is not installed here: pip install 'slmdeploy[{extra}]'"
        )
