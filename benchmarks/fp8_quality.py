"""What FP8 costs a decoder in quality, beside INT8 and INT4: one table of builds, one of FP8's rules for scales.

    python benchmarks/fp8_quality.py --model examples/teacher --work /tmp/fp8 [--json out.json]

Builds come from the same checkpoint and are judged by `slmdeploy build` on the same validation tokens against their
own fp32 graph. The second table has every linear layer and the head in FP8, whatever the gate says, so that rules are
compared and not what was left out. Nothing here is timed: FP8 has no fast path on a CPU.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import open_artifact
from slmdeploy.building.build import build
from slmdeploy.corpus import prepare
from slmdeploy.exporting.export import export
from slmdeploy.specs import Fp8, Gate, Profile, load_profile

CPU_PROFILES = ("cpu-int8", "cpu-int8-weight", "cpu-int4")
FP8_PROFILE = "tensorrt-fp8"
GPU_PROFILES = ("tensorrt-fp16", FP8_PROFILE)
OPTIONS = ("smooth", "attention")
ACTIVATIONS = ("max", "percentile", "mse")
OPEN = Gate(max_kl=1e9, min_top1=0.0, max_ppl_ratio=1e9)
"""A gate that nothing fails, so that no layer is left out."""


@dataclass(frozen=True)
class Row:
    """One build: quality against its fp32 graph, bytes of graph and weights, and the parts that stayed more precise."""

    name: str
    kl: float
    top1_agreement: float
    ppl_ratio: float
    model_bytes: int
    kept: tuple[str, ...]


def main() -> None:
    """Build, print the tables, and write them as JSON where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/teacher"))
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs and builds; kept between runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = parser.parse_args()
    tables = {"builds": list(builds(chosen.model, chosen.work)), "rules": list(rules(chosen.model, chosen.work))}
    for rows in tables.values():
        show(rows)
    if chosen.json:
        content = {"model": str(chosen.model), **{name: [asdict(row) for row in rows] for name, rows in tables.items()}}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def builds(checkpoint: Path, work: Path) -> Iterator[Row]:
    """INT8, INT4 and FP8 as their profiles build them."""
    ort = graph(checkpoint, work, "ort")
    for name in CPU_PROFILES:
        yield row(load_profile(name), ort, work, name)
    portable = graph(checkpoint, work, "portable")
    for name in GPU_PROFILES:
        yield row(load_profile(name), portable, work, name)


def rules(checkpoint: Path, work: Path) -> Iterator[Row]:
    """Every rule for scales of activations with every one for weights per channel, and options beside the plainest."""
    shipped, portable = load_profile(FP8_PROFILE), graph(checkpoint, work, "portable")
    for channels, weights, activations in (*product((True,), ("amax", "mse"), ACTIVATIONS), (False, "amax", "max")):
        form = Fp8.model_validate({"activation_scale": activations, "weight_scale": weights, "per_channel": channels})
        name = f"{activations}-{weights}-{'channel' if channels else 'tensor'}"
        yield row(shipped.model_copy(update={"fp8": form, "gate": OPEN}), portable, work, name)
    for option in OPTIONS:
        form = Fp8.model_validate({option: True})
        yield row(shipped.model_copy(update={"fp8": form, "gate": OPEN}), portable, work, f"max-amax-channel-{option}")


def graph(checkpoint: Path, work: Path, dialect: str) -> Path:
    """The exported graph in that dialect."""
    out = work / f"graph-{dialect}"
    if not out.exists():
        export(checkpoint, out=out, tasks=("generate",), dialect=dialect)
    return out


def row(profile: Profile, source: Path, work: Path, name: str) -> Row:
    """The build of that name, made where it is not there yet."""
    data, out = work / "data", work / name
    if not data.exists():
        prepare(data)
    made = open_artifact(out) if out.exists() else build(source, profile=profile, out=out, data=data)
    result: dict[str, Any] = made.result
    return Row(
        name,
        kl=result["quality"]["kl"],
        top1_agreement=result["quality"]["top1_agreement"],
        ppl_ratio=result["quality"]["ppl_ratio"],
        model_bytes=sum(file.stat().st_size for file in out.glob("model.onnx*")),
        kept=tuple(kept["part"] for kept in result["kept"]),
    )


def show(rows: list[Row]) -> None:
    """The rows as a Markdown table."""
    print("| build | KL, nats | top-1 | perplexity ratio | MB | more precise |\n|---|---|---|---|---|---|")
    for found in rows:
        figures = f"{found.kl:.4f} | {found.top1_agreement:.4f} | {found.ppl_ratio:.4f} | {found.model_bytes / 1e6:.1f}"
        print(f"| {found.name} | {figures} | {', '.join(found.kept) or 'none'} |")
    print()


if __name__ == "__main__":
    main()
