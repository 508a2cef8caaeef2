"""The command line: parse, call one function, print. No logic lives here, and nothing heavy is imported at the top.

Results go to stdout (with --json as one JSON object on the last line), everything else to stderr. Exit codes: 0 ok,
1 our bug, 2 bad input, 3 budget infeasible, 4 parity or quality gate failed, 5 corrupt artifact, 6 out of disk, memory
or permission, 130 interrupted.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from slmdeploy.errors import GateError, InfeasibleError, SlmdeployError

app = typer.Typer(
    name="slmdeploy",
    help="Efficient small language models: from a teacher checkpoint to a verified package that meets a budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; refused when it exists, unless --force.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is at the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of stdout.")]
Data = Annotated[
    str, typer.Option("--data", help="Folder of JSON lines, a .jsonl/.parquet/.txt file, a hub id, or 'stdlib'.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: what the build says.")]


class Method(StrEnum):
    """Ways to choose what is pruned."""

    OSSCAR = "osscar"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Task(StrEnum):
    """What a graph is for."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"
    CLASSIFY = "classify"


class Pooling(StrEnum):
    """Ways to make one vector of a text's tokens."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


class Dialect(StrEnum):
    """Operator sets that export can emit."""

    ORT = "ort"
    PORTABLE = "portable"


class Objective(StrEnum):
    """What to prefer among the builds that meet the budget."""

    FASTEST = "fastest"
    THROUGHPUT = "throughput"
    SMALLEST = "smallest"
    QUALITY = "quality"


class Kind(StrEnum):
    """Kinds of package."""

    EDGE = "edge"


def _progress(quiet: bool = False) -> Any:
    from slmdeploy.console import BarProgress
    from slmdeploy.progress import SILENT

    return SILENT if quiet or not sys.stderr.isatty() else BarProgress()


def _done(artifact: Any, as_json: bool) -> None:
    """Print what a verb made: the path for people, the manifest's result for machines."""
    from slmdeploy.console import print_json

    if as_json:
        summary = {"path": str(artifact.path), "kind": artifact.kind, "content_key": artifact.content_key}
        print_json({**summary, "result": artifact.result})
    else:
        print(artifact.path)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), e.g. examples/quickstart.toml.")],
    output: Out,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Use this checkpoint as the teacher.")] = None,
    as_json: Json = False,
) -> None:
    """Do every step of a recipe in order; a second run does only what has changed."""
    from slmdeploy import console, pipeline

    outcome = pipeline.run(recipe, output, model=model, progress=_progress(), say=console.say)
    if as_json:
        console.print_json(outcome.to_dict())
    else:
        console.print_outcome(outcome)
    if not outcome.feasible:
        raise InfeasibleError(outcome.reason)


@app.command()
def prune(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face id.")],
    output: Out,
    data: Data,
    ratio: Annotated[float, typer.Option(help="Share of MLP neurons and GQA groups to remove.")] = 0.5,
    attention_ratio: Annotated[float | None, typer.Option(help="Another share for GQA groups.")] = None,
    layer_ratio: Annotated[float, typer.Option(help="Share of whole layers to remove, before the rest.")] = 0.0,
    method: Annotated[Method, typer.Option(help="How the kept groups are chosen.")] = Method.OSSCAR,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of data to calibrate on.")] = 16384,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of method random.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Remove layers, MLP neurons and GQA groups; writes an ordinary Hugging Face checkpoint."""
    from slmdeploy.checkpoint import resolve_checkpoint
    from slmdeploy.compress.prune import prune as verb

    artifact = verb(
        resolve_checkpoint(checkpoint),
        out=output,
        ratio=ratio,
        attention_ratio=attention_ratio,
        layer_ratio=layer_ratio,
        method=method.value,
        data=data,
        calibration_tokens=calibration_tokens,
        seed=seed,
        force=force,
        progress=_progress(as_json),
    )
    _done(artifact, as_json)


class Loss(StrEnum):
    """Divergences between teacher and student."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"


class Optimizer(StrEnum):
    """Optimisers of a stage."""

    ADAMW = "adamw"
    MUON = "muon"


class Dtype(StrEnum):
    """Arithmetic of training."""

    BF16 = "bf16"
    FP32 = "fp32"


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Teacher checkpoint: folder or Hugging Face id.")],
    student: Annotated[str, typer.Argument(help="Student checkpoint to train: folder or Hugging Face id.")],
    output: Out,
    data: Data,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")],
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens per row.")] = 512,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimiser of the block matrices.")] = Optimizer.ADAMW,
    loss: Annotated[Loss, typer.Option(help="Divergence.")] = Loss.FORWARD_KL,
    beta: Annotated[float | None, typer.Option(help="Weight of the teacher in jsd.")] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the divergence.")] = 1.0,
    ce_share: Annotated[float, typer.Option(help="Share of cross-entropy in the loss.")] = 0.0,
    score_share: Annotated[float, typer.Option(help="Share of rows that hold scoring records.")] = 0.0,
    on_policy: Annotated[float, typer.Option(help="Share λ of batches whose responses the student samples.")] = 0.0,
    response_tokens: Annotated[int, typer.Option(min=1, help="Length of sampled responses.")] = 64,
    sample_temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 0.9,
    dtype: Annotated[Dtype, typer.Option(help="Mixed precision, or full.")] = Dtype.BF16,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Trade time for memory.")] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to resume from.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of order and sampling.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a student on its teacher's distributions; a killed run goes on from its last saved step."""
    from slmdeploy.checkpoint import resolve_checkpoint
    from slmdeploy.compress.distill import distill as verb
    from slmdeploy.specs import distill_stage

    stage = distill_stage(
        steps=steps,
        batch_rows=batch_rows,
        length=length,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        optimizer=optimizer.value,
        loss=loss.value,
        temperature=temperature,
        ce_share=ce_share,
        score_share=score_share,
        on_policy=on_policy,
        response_tokens=response_tokens,
        sample_temperature=sample_temperature,
        dtype=dtype.value,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        seed=seed,
        **({} if beta is None else {"beta": beta}),
    )
    artifact = verb(
        resolve_checkpoint(teacher),
        resolve_checkpoint(student),
        out=output,
        data=data,
        stage=stage,
        force=force,
        progress=_progress(as_json),
    )
    _done(artifact, as_json)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face id.")],
    output: Out,
    task: Annotated[list[Task] | None, typer.Option(help="May be repeated; default: what the class is for.")] = None,
    dialect: Annotated[
        Dialect, typer.Option(help="ort: fastest in ONNX Runtime. portable: standard ONNX operators alone.")
    ] = Dialect.ORT,
    opset: Annotated[int | None, typer.Option(help="Of the portable dialect: 21, 23 or 24.  [default: 21]")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Context in tokens; default: the checkpoint's.")
    ] = None,
    labels: Annotated[tuple[str, str], typer.Option(help="Label words of a scorer: for 0, for 1.")] = (" no", " yes"),
    pooling: Annotated[Pooling | None, typer.Option(help="Of embed; default: the checkpoint's, else mean.")] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Of embed: vectors of length one.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a LoRA adapter: the checkpoint it was trained on.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads go instead of the usual cache.")] = None,
    fallback: Annotated[bool, typer.Option("--fallback", help="Trace a decoder whose maths is not built in.")] = False,
    no_parity: Annotated[
        bool, typer.Option("--no-parity", help="Leave out the comparison with torch; the manifest says so.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build the ONNX graph of a decoder from its weights, or trace an encoder's, and prove it equal to torch."""
    from slmdeploy.exporting.export import export as verb

    artifact = verb(
        checkpoint,
        out=output,
        tasks=tuple(t.value for t in task) if task else None,
        labels=labels,
        dialect=dialect.value,
        opset=opset,
        max_length=max_length,
        pooling=pooling.value if pooling else None,
        normalize=normalize,
        base=base,
        revision=revision,
        cache_dir=cache_dir,
        fallback=fallback,
        parity=not no_parity,
        force=force,
        progress=_progress(as_json),
    )
    _done(artifact, as_json)


@app.command()
def build(
    graph: Annotated[Path, typer.Argument(help="Graph folder made by export.")],
    output: Out,
    profile: Annotated[str, typer.Option("--profile", help="Shipped name or a .toml file.")],
    target: Annotated[
        str | None, typer.Option("--target", help="Shipped name or .toml; default: this machine.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder for the quality gate.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 when a gate fails.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compile a graph under a profile; its gates are measured and recorded."""
    from slmdeploy.building.build import build as verb
    from slmdeploy.specs import load_profile, load_target

    artifact = verb(
        graph,
        profile=load_profile(profile),
        target=load_target(target) if target else None,
        out=output,
        data=data,
        force=force,
        progress=_progress(as_json),
    )
    _done(artifact, as_json)
    failed = [name for name, gate in artifact.result["gates"].items() if not gate["passed"]]
    if strict and failed:
        raise GateError(f"{output} is outside its gate: {', '.join(failed)} (manifest.json has the figures)")


@app.command()
def profile(
    builds: Annotated[list[Path], typer.Argument(help="Build, graph or package folders.")],
    output: Out,
    workload: Annotated[list[str] | None, typer.Option(help="Shipped workload name; may be repeated.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Take the workloads of this recipe.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder for quality.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Checkpoint to run beside them in torch eager.")] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure speed and quality of builds on this machine, interleaved."""
    from slmdeploy import console
    from slmdeploy.checkpoint import resolve_checkpoint
    from slmdeploy.profiling.profile import measured_rows
    from slmdeploy.profiling.profile import profile as verb
    from slmdeploy.specs import choose_workloads

    artifact = verb(
        builds,
        workloads=choose_workloads(workload or [], recipe),
        out=output,
        data=data,
        baseline=resolve_checkpoint(baseline) if baseline else None,
        threads=threads,
        force=force,
        progress=_progress(as_json),
    )
    rows = measured_rows(artifact.path)
    if as_json:
        console.print_json({"path": str(artifact.path), "rows": rows})
    else:
        console.out_console().print(console.measurement_table(rows))


@app.command()
def select(
    measurements: Annotated[list[Path], typer.Argument(help="Measurement folders made by profile.")],
    budget: Annotated[list[str] | None, typer.Option(help="metric<=number or metric>=number; may be repeated.")] = None,
    objective: Annotated[Objective, typer.Option(help="What to prefer within the budget.")] = Objective.FASTEST,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write the selection to.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose the build that meets the budget, or explain why none does (exit 3)."""
    from slmdeploy import console
    from slmdeploy.selection import select as verb
    from slmdeploy.specs import parse_budget

    limits = parse_budget(*(budget or []), objective=objective.value)
    selection = verb(measurements, budget=limits, out=output, force=force)
    if as_json:
        console.print_json(selection.to_dict())
    else:
        console.print_selection(selection)
    if not selection.feasible:
        raise InfeasibleError(selection.reason)


@app.command()
def package(
    build: Annotated[Path, typer.Argument(help="Build folder.")],
    output: Out,
    kind: Annotated[Kind, typer.Option(help="What to ship it as.")] = Kind.EDGE,
    archive: Annotated[Path | None, typer.Option(help="Also write the package as this .tar.gz.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a folder that runs with numpy, onnxruntime and tokenizers alone."""
    from slmdeploy.packaging.archive import pack
    from slmdeploy.packaging.edge import package as verb

    artifact = verb(build, out=output, kind=kind.value, force=force)
    if archive:
        pack(artifact.path, archive)
    _done(artifact, as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Any artifact: folder, or a package's .tar.gz.")],
    as_json: Json = False,
) -> None:
    """Check every hash of an artifact and print how far it was proved."""
    from slmdeploy import console
    from slmdeploy.verification import verify as verb

    found = verb(path)
    if as_json:
        console.print_json(found)
    else:
        console.print_facts(found)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="Graph, build or package folder.")],
    prompt: Annotated[str | None, typer.Argument(help="Prompt; from stdin when left out.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer through the chat template.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the message of --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    from slmdeploy import console
    from slmdeploy.runtime.chat import command_messages
    from slmdeploy.runtime.model import load

    messages = command_messages(prompt, chat, system)
    model = load(path, threads=threads)
    text = sys.stdin.read() if prompt is None and messages is None else prompt or ""
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    if as_json:
        completion = model.generate(text, **options) if messages is None else model.chat(messages, **options)
        console.print_json({"text": completion.text, "finish_reason": completion.finish_reason})
        return
    pieces = model.stream(text, **options) if messages is None else model.chat_stream(messages, **options)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def score(
    path: Annotated[Path, typer.Argument(help="Graph, build or package folder.")],
    prefix: Annotated[str, typer.Option(help="Text that all items share.")],
    items: Annotated[list[str] | None, typer.Argument(help="Items; lines of stdin when left out.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score items behind one shared prefix (of a cross-encoder: against a query), best first."""
    from slmdeploy import console
    from slmdeploy.runtime.opening import load

    texts = items if items else sys.stdin.read().splitlines()
    scores = load(path, threads=threads).score(prefix, texts)
    if as_json:
        console.print_json({"scores": scores})
        return
    for value, text in sorted(zip(scores, texts, strict=True), reverse=True):
        print(f"{value:8.3f}  {text}")


@app.command()
def embed(
    path: Annotated[Path, typer.Argument(help="Graph folder of an embedder.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; lines of stdin when left out.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Name of the model's prompt to put in front.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Turn each text into a vector: one line of numbers a text."""
    from slmdeploy import console
    from slmdeploy.runtime.encoder_model import load_encoder

    vectors = load_encoder(path, threads=threads).embed(texts or sys.stdin.read().splitlines(), prompt=prompt)
    if as_json:
        console.print_json({"embeddings": vectors.tolist()})
        return
    for vector in vectors:
        print(" ".join(f"{value:.6g}" for value in vector))


@app.command()
def classify(
    path: Annotated[Path, typer.Argument(help="Graph folder of a classifier.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; lines of stdin when left out.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Label each text, or each token of it where the model labels tokens."""
    from slmdeploy import console
    from slmdeploy.runtime.encoder_model import load_encoder

    model, given = load_encoder(path, threads=threads), texts or sys.stdin.read().splitlines()
    if model.labels_tokens:
        console.print_token_labels(given, model.classify_tokens(given), as_json)
    else:
        console.print_labels(given, model.classify(given), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine is, which target it matches, and which profiles can be built here."""
    from slmdeploy import console
    from slmdeploy.profiling.hardware import doctor as verb
    from slmdeploy.specs import list_profiles, list_targets

    report = verb(list_targets(), list_profiles())
    if as_json:
        console.print_json(report)
    else:
        console.print_facts(report)


@app.command()
def targets(as_json: Json = False) -> None:
    """List the shipped targets."""
    from slmdeploy import console
    from slmdeploy.specs import list_targets

    console.print_specs(list_targets(), as_json)


@app.command()
def profiles(as_json: Json = False) -> None:
    """List the shipped profiles."""
    from slmdeploy import console
    from slmdeploy.specs import list_profiles

    console.print_specs(list_profiles(), as_json)


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        from slmdeploy.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Efficient small language models: from a teacher checkpoint to a verified package that meets a budget."""


def main() -> None:
    """The console script: every error of ours is one sentence on stderr and the exit code of its class."""
    try:
        app()
    except SlmdeployError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
