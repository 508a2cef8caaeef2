"""What a machine with an NVIDIA GPU has to run once: parity and speed of every GPU profile, beside torch there.

    python benchmarks/gpu_acceptance.py --model examples/teacher --work /tmp/gpu --json gpu.json

For each profile: build, logits of the GPU against the build's own numbers on the CPU, then a measurement file that
`slmdeploy select` takes. Beside them torch in bfloat16, eager and compiled, and the model's products in FP8 through
torch, which is no TensorRT and is called "torch FP8". What a check needs is looked at before it: where that is missing
the check is left out with the reason, and any error of a check that was made is a failure. Without a GPU only names in
NVIDIA's bindings are checked. Exit code 1 where something was wrong, else 0. Not run on a GPU yet.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmdeploy.artifacts import open_artifact
from slmdeploy.building.build import build
from slmdeploy.building.ort_providers import THROUGH
from slmdeploy.corpus import prepare
from slmdeploy.errors import InputError, SlmdeployError
from slmdeploy.exporting.export import export
from slmdeploy.profiling.gpu import Gpu, nvidia_gpus
from slmdeploy.profiling.profile import profile_to_file
from slmdeploy.runtime import cuda_device, providers, tensorrt_api
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.decoding import Decoder
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.standard import StandardDecoder
from slmdeploy.runtime.text import load_tokenizer
from slmdeploy.specs import Compiler, Target, list_targets, load_profile, named_workload

PROFILES = {
    "tensorrt-fp16": "portable",
    "tensorrt-fp8": "portable",
    "tensorrt-rtx-fp8": "portable",
    "tensorrt-fp16-ort": "portable",
    "tensorrt-fp8-ort": "portable",
    "tensorrt-rtx-fp8-ort": "portable",
    "cuda-fp16": "ort",
    "cuda-int4": "ort",
}
"""GPU profiles and the dialect that each is built from; those that end in -ort go through ONNX Runtime's providers."""
BF16, COMPILED, FP8 = "torch bf16", "torch bf16, compiled", "torch FP8"
PARITY = {"fp8": 0.15, "other": 0.03}
"""How far the GPU's logits may be from the CPU's, of the largest: as the builds' own gates have it."""
ROUNDS, WARM_UP = 20, 5
TOKENS = 48
FIRST_FP8 = (8, 9)
LEAST_SIDE = 16


def main() -> None:
    """Check what can be checked here, print it, and write it as JSON where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/teacher"))
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs, builds and measurements")
    parser.add_argument("--workload", default="generate-128-64")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    report = accept(chosen.model, chosen.work, chosen.workload)
    print(report["summary"])
    for line in lines(report):
        print(f"  {line}")
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if report["failed"] else 0)


def accept(model: Path, work: Path, workload: str) -> dict[str, Any]:
    """The report: what was checked, what was left out and why, and what failed."""
    names, gpus = {"names": binding_names()}, nvidia_gpus()
    wrong = [name for name, found in names["names"].items() if isinstance(found, list) and found]
    if not gpus:
        summary = "This machine has no NVIDIA GPU, so only the names in NVIDIA's bindings were checked."
        return {"summary": summary, "gpu": None, **names, "failed": wrong, **origin()}
    checks: dict[str, Callable[[], Any]] = {
        name: lambda name=name: one_profile(name, model, work, workload, gpus[0]) for name in PROFILES
    }
    checks |= {BF16: lambda: torch_model(model, compiled=False), COMPILED: lambda: torch_model(model, compiled=True)}
    checks |= {FP8: lambda: torch_products(model)}
    found = {name: attempt(check, lacking(name, gpus[0])) for name, check in checks.items()}
    failed = wrong + [name for name, entry in found.items() if entry.get("passed") is False]
    done = [name for name, entry in found.items() if "left_out" not in entry]
    summary = f"{gpus[0].name}: {len(done)} of {len(found)} checks could be made, {len(failed)} failed."
    return {"summary": summary, "gpu": vars(gpus[0]), **names, "checks": found, "failed": failed, **origin()}


def attempt(check: Callable[[], dict[str, Any]], reason: str | None) -> dict[str, Any]:
    """What a check found, or the ``reason`` why it cannot be made; an error of one that can be made is a failure."""
    if reason is not None:
        return {"left_out": reason}
    try:
        return check()
    except Exception as error:  # libraries and GPUs raise many kinds; the other checks are still made
        return {"passed": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def lacking(name: str, gpu: Gpu) -> str | None:
    """What a check needs and this machine has not, looked at without making it; None where it can be made."""
    if name in (BF16, COMPILED, FP8):
        return no_torch() or (no_fp8(gpu) if name == FP8 else None)
    profile = load_profile(name)
    if profile.compiler is None:
        return providers.missing("cuda")
    return (no_fp8(gpu) if profile.weights.scheme == "fp8" else None) or no_compiler(profile.compiler, gpu)


def no_torch() -> str | None:
    """Why torch cannot run on the GPU."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return "torch and transformers are not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} does not reach the GPU"


def no_fp8(gpu: Gpu) -> str | None:
    """Whether the GPU is older than FP8."""
    old = tuple(map(int, gpu.compute_capability.split("."))) < FIRST_FP8
    return f"compute capability {gpu.compute_capability} has no FP8" if old else None


def no_compiler(compiler: Compiler, gpu: Gpu) -> str | None:
    """Why a profile's compiler cannot be used: it is not installed, or not for this GPU."""
    if compiler.through == THROUGH:
        return providers.missing(compiler.module)
    product = tensorrt_api.PRODUCTS[compiler.module]
    try:
        module = tensorrt_api.load(compiler.module)
        cuda_device.runtime()
        if product.ahead_of_time:
            tensorrt_api.capability(module, product, gpu.compute_capability)
    except InputError as error:
        return str(error)
    return None


def origin() -> dict[str, str]:
    """When, where and of which commit a report is."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        commit = ""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"made": made, "commit": commit or "unknown", "system": platform.platform()}


def binding_names() -> dict[str, list[str] | str]:
    """By package the names that are used of it and that it lacks, or why it was not looked at."""
    found: dict[str, list[str] | str] = {}
    for module, product in tensorrt_api.PRODUCTS.items():
        try:
            found[module] = tensorrt_api.missing_names(tensorrt_api.load(module), product)
        except SlmdeployError as error:
            found[module] = str(error)
    try:
        api = cuda_device.runtime()
        found["cuda.bindings"] = [name for name in cuda_device.NAMES if not hasattr(api, name)]
    except SlmdeployError as error:
        found["cuda.bindings"] = str(error)
    return found


def one_profile(name: str, model: Path, work: Path, workload: str, gpu: Gpu) -> dict[str, Any]:
    """Build, parity and a measurement file of one profile."""
    data, out = work / "data", work / name
    if not data.exists():
        prepare(data)
    if not out.exists():
        build(graph(model, work, PROFILES[name]), profile=load_profile(name), target=target_of(gpu), data=data, out=out)
    ladder = open_artifact(out).result["verification"]
    difference = parity(out)
    limit = PARITY["fp8" if "fp8" in name else "other"]
    file = work / f"{name}.json"
    profile_to_file([out], workloads=[named_workload(workload)], out=file, force=True)
    row = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
    return {
        "passed": difference <= limit,
        "parity": difference,
        "limit": limit,
        "verification": ladder,
        "measurement": str(file),
        "metrics": row["metrics"],
    }


def graph(model: Path, work: Path, dialect: str) -> Path:
    """The exported graph in that dialect; portable ones with attention as one operator, which TensorRT fuses."""
    out = work / f"graph-{dialect}"
    if not out.exists():
        export(model, out=out, tasks=("generate",), dialect=dialect, opset=23 if dialect == "portable" else None)
    return out


def target_of(gpu: Gpu) -> Target | None:
    """A shipped target of the GPU's compute capability."""
    return next((target for target in list_targets() if target.compute_capability == gpu.compute_capability), None)


def parity(folder: Path) -> float:
    """The largest difference between logits of the GPU and of the same graph on the CPU, of the largest logit."""
    config = read_runtime(folder)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, min(TOKENS, config.max_length // 2)).tolist()
    device = Model(folder, config, load_tokenizer(folder), config.threads)
    as_written = config.numerics_only or providers.PROVIDERS[config.provider].compiles
    here = replace(config, provider="cpu", numerics_only=as_written)
    decoder: Any = (Decoder if config.interface == "shared" else StandardDecoder)(folder, here, config.threads)
    exact = decoder.logits(np.array(ids))
    found = device.logits(ids)
    steps = [device.prefill(ids[:8]), *(device.decode(token) for token in ids[8:])]
    worst = max(np.abs(found - exact).max(), np.abs(np.stack(steps) - exact[7:]).max())
    return float(worst / np.abs(exact).max())


def torch_model(path: Path, *, compiled: bool) -> dict[str, Any]:
    """Milliseconds to the first token behind a prompt of 128 and of each later one, in bfloat16 by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda().eval()
    run: Any = torch.compile(model) if compiled else model
    ids = torch.randint(0, model.config.vocab_size, (1, 128), device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=min(256, model.config.max_position_embeddings))
    place = torch.tensor([128], device="cuda")

    @torch.inference_mode()
    def prompt() -> None:
        cache.reset()
        run(ids, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def step() -> None:
        run(ids[:, :1], past_key_values=cache, use_cache=True, cache_position=place)

    return {"ttft_ms": timed(torch, prompt), "tpot_ms": timed(torch, step), "prompt_tokens": 128}


def torch_products(path: Path) -> dict[str, Any]:
    """Milliseconds of the model's linear layers at 128 rows in FP8 and in bfloat16: "torch FP8", no TensorRT."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not any(side % LEAST_SIDE for side in layer.weight.shape):
            found.append({"layer": name, **one_product(torch, layer.weight.detach().cuda())})
    total = {key: sum(entry[key] for entry in found) for key in ("fp8_ms", "bf16_ms")}
    worst = max(entry["difference"] for entry in found)
    return {"passed": worst < PARITY["fp8"], "difference": worst, **total, "products": len(found)}


def one_product(torch: Any, weight: Any) -> dict[str, float]:
    """One weight [out, in] times 128 random rows with our scales: amax onto 448."""
    rows = torch.randn(128, weight.shape[1], device="cuda")
    scales = [(tensor.abs().max() / 448).float() for tensor in (rows, weight)]
    codes = [(tensor / scale).to(torch.float8_e4m3fn) for tensor, scale in zip((rows, weight), scales, strict=True)]
    halves = rows.bfloat16(), weight.bfloat16()

    def fp8() -> Any:
        return torch._scaled_mm(codes[0], codes[1].t(), *scales, out_dtype=torch.bfloat16)

    exact = rows @ weight.t()
    difference = float((fp8().float() - exact).abs().max() / exact.abs().max())
    return {
        "fp8_ms": timed(torch, fp8),
        "bf16_ms": timed(torch, lambda: halves[0] @ halves[1].t()),
        "difference": difference,
    }


def timed(torch: Any, work: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the GPU, after warming up."""
    times = []
    for turn in range(WARM_UP + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= WARM_UP:
            times.append(start.elapsed_time(end))
    return float(median(times))


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    found = []
    for name, missing in report["names"].items():
        state = (
            missing if isinstance(missing, str) else f"lacks {', '.join(missing)}" if missing else "every name is there"
        )
        found.append(f"{name}: {state}")
    for name, entry in report.get("checks", {}).items():
        if "left_out" in entry:
            found.append(f"{name}: left out, {entry['left_out']}")
        elif "error" in entry:
            found.append(f"{name}: failed, {entry['error']}")
        else:
            figures = {key: round(value, 4) for key, value in entry.items() if isinstance(value, float)}
            found.append(f"{name}: {'failed' if entry.get('passed') is False else 'done'} {figures}")
    return found


if __name__ == "__main__":
    main()
