"""The server as a Ray Serve application: each replica holds the model and is one server of serving/app.py.

`application` is what a Serve configuration names (packages of the kind server have one, docs/packages.md). A replica
counts as started when its model has been opened, and a rolling update goes on to the next only then; one whose engine
has died says so and is replaced. Routing, scaling and draining are Ray's. Knows no endpoint.
"""

import asyncio
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from slmdeploy.errors import InputError
from slmdeploy.runtime.opening import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.auth import VARIABLE, read_keys
from slmdeploy.serving.settings import ServerSettings

NAME = "Server"
_POLL_S = 0.05


class Arguments(BaseModel):
    """What a Serve configuration gives as `args`.

    package: folder of a graph, build or package on every node. version: of its content; another one replaces the
    replicas. threads: None for what the package says. insecure: serve without API keys, where something else guards it;
    keys are in SLMDEPLOY_API_KEYS of every node.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str = ""
    threads: int | None = None
    insecure: bool = False


class Server:
    """One replica."""

    def __init__(self, arguments: Arguments) -> None:
        keys = read_keys(None)
        if not keys and not arguments.insecure:
            raise InputError(f"There is no API key: set {VARIABLE} on every node, or insecure where others guard it.")
        model = load(Path(arguments.package), threads=arguments.threads)
        self._app = create_app(model, ServerSettings(api_keys=keys))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application behind this replica."""
        return self._app

    async def check_health(self) -> None:
        """Wait while the model is being opened; raise when it cannot compute, so that Ray starts another replica."""
        lifecycle = self._app.state.lifecycle
        while lifecycle.state == "loading":
            await asyncio.sleep(_POLL_S)
        if lifecycle.state == "broken":
            raise RuntimeError("the model cannot compute; the replica's log says why")


def application(arguments: Arguments) -> serve.Application:
    """The application that a configuration's `import_path` names."""
    replica = serve.ingress()(Server)
    return serve.deployment(replica, name=NAME).bind(arguments)
