"""Serve what was built, over HTTP: parse, load, listen, and say where."""

from pathlib import Path
from typing import Annotated

import typer

from slmdeploy.commands.options import Threads


def serve(
    path: Annotated[Path, typer.Argument(help="Graph, build or package folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; without it SLMDEPLOY_API_KEYS, by commas.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others reach it without an API key.")] = False,
    model_name: Annotated[str | None, typer.Option(help="The model's id; default: the folder's name.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 8,
    max_queued: Annotated[int, typer.Option(min=1, help="Requests that may wait; then 429.")] = 64,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the model's context.")] = None,
    max_output_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of one choice.")] = 1024,
    deadline_seconds: Annotated[float, typer.Option(help="Longest that a request is worked on; then 504.")] = 300.0,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="Longest that a stop waits for running requests.")] = 30,
    budget: Annotated[
        list[str] | None, typer.Option(help="Limit that the page shows latencies against, e.g. ttft_ms_p99<=300.")
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option(help="A smaller build of the same tokenizer that guesses ahead while one sequence runs."),
    ] = None,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Guess ahead from the text itself while one sequence runs.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP with OpenAI's endpoints; hashes are verified first. Ctrl-C or SIGTERM drains."""
    from slmdeploy.extras import require

    require("serve", "fastapi", "uvicorn", "prometheus_client", "llguidance")
    from slmdeploy.runtime.opening import load
    from slmdeploy.runtime.requests import EngineSettings
    from slmdeploy.serving import auth, logs, server
    from slmdeploy.serving.app import create_app
    from slmdeploy.serving.settings import ServerSettings

    keys = auth.read_keys(api_key_file)
    server.check_exposure(host, keys, insecure=insecure)
    settings = ServerSettings(
        model_name=model_name,
        api_keys=keys,
        engine=EngineSettings(slots=slots, max_waiting=max_queued),
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        deadline_s=deadline_seconds,
        drain_s=drain_seconds,
        budget=tuple(budget or ()),
    )
    app = create_app(load(path, threads=threads, draft=draft, prompt_lookup=prompt_lookup), settings)
    bound = server.listen(host, port, settings.stall_s)
    logs.configure()
    print(server.address_of(bound), flush=True)
    server.run(app, bound, settings)
