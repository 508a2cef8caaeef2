"""Two replicas on a real Ray cluster of this machine, from the file that a package brings: one dies under load.

Needs the extra scale (`pip install -c constraints.txt 'slmdeploy[scale]'`), which `make install` leaves out; skipped
without. The cluster is a process of its own, told to end when the test has.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about pydantic
    pytest.importorskip("ray.serve", reason="pip install -c constraints.txt 'slmdeploy[scale]'")

import openai
import psutil
import yaml

from slmdeploy.errors import InputError
from slmdeploy.packaging.package import package
from slmdeploy.runtime.model import load
from slmdeploy.scaling.ray_serve import Arguments, Server, application
from slmdeploy.serving.auth import VARIABLE
from tests.packaging.packages import write_build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")
REQUESTS = 120
CLIENTS = 4
TOKENS = 6
START_S = 240.0
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return package(write_build(folder / "b", {}), out=folder / "p", kind="server").path


def test_a_replica_that_others_could_reach_wants_a_key(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match="There is no API key: set SLMDEPLOY_API_KEYS"):
        Server(Arguments(package=str(packaged)))
    assert (
        Server(Arguments(package=str(packaged), insecure=True)).__serve_build_asgi_app__().title.startswith("slmdeploy")
    )


def test_the_application_is_one_deployment_of_the_name_in_the_file(packaged: Path) -> None:
    value = yaml.safe_load((packaged / "server" / "ray" / "serve.yaml").read_text())
    (app,) = value["applications"]
    assert application(Arguments(**app["args"]))._bound_deployment.name == app["deployments"][0]["name"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process, Path]]:
    """The URL of two replicas, the process that holds the cluster, and its log."""
    value = yaml.safe_load((packaged / "server" / "ray" / "serve.yaml").read_text())
    place, port = tmp_path_factory.mktemp("cluster"), free_port()
    value["http_options"]["port"] = port
    (app,) = value["applications"]
    app["args"]["package"] = str(packaged)
    app["runtime_env"]["env_vars"]["PYTHONPATH"] = str(packaged / "server")
    (deployment,) = app["deployments"]
    deployment["autoscaling_config"]["max_replicas"] = 2
    deployment["ray_actor_options"] = {"num_cpus": 0.4}
    (place / "serve.yaml").write_text(yaml.safe_dump(value))
    own = {
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # else it kills workers when others on this machine take its memory
        "HOME": str(place),  # where Ray writes the token of its cluster
        VARIABLE: KEY,
    }
    command = [str(Path(sys.executable).parent / "serve"), "run", str(place / "serve.yaml")]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=place, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
        try:
            holder = psutil.Process(process.pid)
            wait_for(lambda: process.poll() is not None or (len(replicas(holder)) == 2 and ready(port)), place / "log")
            assert process.poll() is None, (place / "log").read_text(errors="replace")[-3000:]
            yield f"http://127.0.0.1:{port}", holder, place / "log"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def wait_for(condition: Any, log: Path) -> None:
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.5)


def ready(port: int) -> bool:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=5)
    try:
        return len(client.models.list().data) == 1
    except openai.OpenAIError:
        return False


def replicas(holder: psutil.Process) -> list[psutil.Process]:
    """The processes of the replicas that have been started, below the one that holds the cluster."""
    found = []
    for process in holder.children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::ServeReplica:slm:Server"]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_under_load_and_every_request_is_answered_once_and_right(
    cluster: tuple[str, psutil.Process, Path], packaged: Path
) -> None:
    url, holder, log = cluster
    model = load(packaged)
    prompts = [f"prompt {number}" for number in range(REQUESTS)]
    expected = {prompt: model.generate(prompt, max_new_tokens=TOKENS).text for prompt in prompts}
    answers: list[tuple[str, str]] = []

    def ask(prompt: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=20, timeout=120) as client:
            served = client.models.list().data[0].id
            reply = client.completions.create(model=served, prompt=prompt, max_tokens=TOKENS, temperature=0)
        answers.append((prompt, reply.choices[0].text))

    before = replicas(holder)
    with ThreadPoolExecutor(CLIENTS) as pool:
        waiting = [pool.submit(ask, prompt) for prompt in prompts]
        while len(answers) < REQUESTS // 4:
            time.sleep(0.01)
        killed, answered = before[0], len(answers)
        killed.send_signal(signal.SIGKILL)
        for one in waiting:
            one.result()
    assert answered < REQUESTS, "the load had ended before the replica was killed"
    assert sorted(prompt for prompt, _ in answers) == sorted(prompts), "an answer was lost or came twice"
    assert dict(answers) == expected
    pids = {one.pid for one in before} - {killed.pid}
    wait_for(lambda: len(replicas(holder)) == 2 and pids < {one.pid for one in replicas(holder)}, log)
    ask("one more")
    assert len(answers) == REQUESTS + 1
