"""Server packages: each file holds to the schema or linter of its kind, and says the numbers of the package."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import openai
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from slmdeploy.artifacts import open_artifact
from slmdeploy.errors import MissingExtraError
from slmdeploy.packaging import server
from slmdeploy.packaging.package import package
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.runtime.requests import EngineSettings
from slmdeploy.verification import verify
from tests.packaging.packages import write_build
from tests.scaling import triton_stand_in

KUBERNETES = {
    "deployment": "Deployment",
    "service": "Service",
    "autoscaler": "HorizontalPodAutoscaler",
    "disruption": "PodDisruptionBudget",
}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    return package(write_build(folder / "b", {}), out=folder / "p", kind="server").path


def read(packaged: Path, name: str) -> Any:
    return yaml.safe_load((packaged / "server" / name).read_text())


@pytest.mark.parametrize(("name", "kind"), KUBERNETES.items())
def test_kubernetes_files_hold_to_the_schemas_of_kubernetes(packaged: Path, name: str, kind: str) -> None:
    value = read(packaged, f"kubernetes/{name}.yaml")
    assert value["kind"] == kind
    kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(value | {"spec": {"no": "such key"}}, "1.37", strict=True)


def test_a_pod_has_no_rights_probes_that_the_server_answers_and_the_measured_memory(packaged: Path) -> None:
    pod = read(packaged, "kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    result = open_artifact(packaged).result
    asked, config = container["resources"], read_runtime(packaged)
    cache = EngineSettings().prefix_cache_bytes
    assert int(asked["requests"]["memory"]) == int(result["start"]["peak_bytes"] * server.ALLOWANCE) + cache
    kv_bytes = 2 * sum(config.kv_heads) * config.head_dim * 4 * config.max_length * EngineSettings().slots
    assert int(asked["limits"]["memory"]) - int(asked["requests"]["memory"]) == kv_bytes
    assert asked["requests"]["cpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] > server.GRACE_S


def test_the_parts_of_a_deployment_name_each_other(packaged: Path) -> None:
    deployment, service, scaler, disruption = (read(packaged, f"kubernetes/{name}.yaml") for name in KUBERNETES)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        disruption["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"slm-server:{open_artifact(packaged).content_key[:12]}"
    assert read(packaged, "compose.yaml")["services"]["server"]["image"] == image


def test_the_autoscaler_asks_for_a_figure_that_the_server_exports(packaged: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from slmdeploy.serving.metrics import Figures, EngineStats  # noqa: I001 - after the check that it can be imported

    figures = Figures()
    figures.watch_engine(EngineStats)
    (metric,) = read(packaged, "kubernetes/autoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {one.name for one in figures.registry.collect()}


def test_compose_holds_to_the_compose_specification(packaged: Path) -> None:
    schema, value = get_builtin_schema("vendor.compose-spec"), read(packaged, "compose.yaml")
    jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value | {"no such key": 1}, schema)
    assert value["services"]["server"]["read_only"] is True


def test_the_dockerfile_passes_the_linter_and_ends_without_root(packaged: Path, tmp_path: Path) -> None:
    def lint(file: Path) -> list[dict[str, Any]]:
        hadolint = Path(sys.executable).parent / "hadolint"
        done = subprocess.run([hadolint, "-f", "json", file], capture_output=True, text=True, check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    dockerfile = packaged / "server" / "Dockerfile"
    assert lint(dockerfile) == []
    (tmp_path / "Dockerfile").write_text(dockerfile.read_text().replace("USER 10001:10001", "USER root"))
    assert "DL3002" in {problem["code"] for problem in lint(tmp_path / "Dockerfile")}
    text = dockerfile.read_text()
    assert "HEALTHCHECK" in text
    assert "FROM ${BASE}\n" in text
    for name in re.findall(r"^COPY (\S+)", text, re.MULTILINE):
        assert (packaged / name).exists()


def test_the_command_of_the_image_is_one_that_slmdeploy_parses(packaged: Path) -> None:
    import typer

    from slmdeploy.cli import app

    lines = (packaged / "server" / "Dockerfile").read_text().splitlines()
    words = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    assert words[0][:3] == ["python3", "-m", "slmdeploy"]
    verb, *rest = words[0][3:] + words[1]
    context = typer.main.get_command(app).commands[verb].make_context(verb, rest)  # type: ignore[attr-defined]
    assert (context.params["host"], context.params["port"], context.params["threads"]) == ("0.0.0.0", 8000, 1)


def test_the_servers_code_goes_along_whole_and_listed(packaged: Path) -> None:
    files = open_artifact(packaged).manifest["files"]
    assert {"server/slmdeploy/cli.py", "server/slmdeploy/runtime/model.py"} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    assert verify(packaged)["hashes"] == "all equal to the manifest"
    code = "import slmdeploy, sys; print(slmdeploy.__file__)"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(packaged / "server"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(packaged / "server" / "slmdeploy" / "__init__.py")


@pytest.mark.slow
def test_the_servers_own_code_serves_the_package_and_ends_when_told(packaged: Path) -> None:
    command = [sys.executable, "-m", "slmdeploy", "serve", str(packaged), "--port", "0"]
    environment = {"PYTHONPATH": str(packaged / "server"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    with subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=30) as client:
                reply = client.completions.create(model="p", prompt="a", max_tokens=4, temperature=0)
            assert reply.choices[0].text == load(packaged).generate("a", max_new_tokens=4).text
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 0
    assert verify(packaged)["hashes"] == "all equal to the manifest", "serving must leave the package as it is"


def test_requirements_are_pinned_as_they_are_installed(packaged: Path) -> None:
    lines = (packaged / "server" / "requirements.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines]
    assert {"numpy", "onnxruntime", "tokenizers", "typer", "fastapi", "uvicorn"} <= set(names)
    assert len(set(names)) == len(names)
    assert "torch" not in names


def test_ray_serve_reads_its_file(packaged: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about pydantic
        schema = pytest.importorskip("ray.serve.schema", reason="the extra scale is not installed")
    value = read(packaged, "ray/serve.yaml")
    deployed = schema.ServeDeploySchema.model_validate(value)
    assert deployed.applications[0].import_path == "slmdeploy.scaling.ray_serve:application"


def test_tritons_models_run_from_the_package_with_what_a_device_needs(packaged: Path, tmp_path: Path) -> None:
    """Triton's Python has the package's requirements, not a server's: nothing else may be imported."""
    (tmp_path / "triton_python_backend_utils.py").write_text(Path(triton_stand_in.__file__).read_text())
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import model, slmdeploy, triton_python_backend_utils as triton\n"
        "served = model.TritonPythonModel(); served.initialize({})\n"
        "asked = triton.request(text_input='a', max_tokens=4); served.execute([asked])\n"
        "print(repr(asked.responses()[0].values()['text_output'][0])); served.finalize()\n"
        "print(slmdeploy.__file__)\n"
        "print(sorted({'pydantic', 'fastapi', 'typer', 'rich', 'ray', 'torch'} & set(sys.modules)))\n"
    )
    folder = packaged / "server" / "triton" / "generate" / "1"
    command = [sys.executable, "-B", "-c", code, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = load(packaged).generate("a", max_new_tokens=4).text
    assert done.stdout.splitlines() == [repr(text), str(packaged / "server" / "slmdeploy" / "__init__.py"), "[]"]
    assert verify(packaged)["hashes"] == "all equal to the manifest", "Triton must leave the package as it is"


def test_the_readme_names_tritons_models_and_what_their_python_needs(packaged: Path) -> None:
    readme = (packaged / "server" / "README.md").read_text()
    assert "serves `generate` and `score` with the python backend" in readme
    assert "None of this was run in Triton" in readme
    assert "There is no model repository" not in readme


def test_a_server_without_its_requirements_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = write_build(tmp_path / "b", {})
    monkeypatch.setattr(server, "requires", lambda name: ['fastapi-that-is-not-there>=1; extra == "serve"'])
    with pytest.raises(MissingExtraError, match=r"needs fastapi-that-is-not-there.*slmdeploy\[serve\]"):
        package(build, out=tmp_path / "p", kind="server")
    monkeypatch.setattr(server, "requires", lambda name: ["numpy>=2"])
    with pytest.raises(MissingExtraError, match="names no requirements of a server"):
        package(build, out=tmp_path / "p", kind="server")
    assert not (tmp_path / "p").exists()
