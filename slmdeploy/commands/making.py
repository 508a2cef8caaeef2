"""From a checkpoint to builds: prune, distill, export, build."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmdeploy.commands.encoders import Pair, distill_texts
from slmdeploy.commands.options import Data, Force, Json, Out, done, progress
from slmdeploy.errors import GateError, InputError

if TYPE_CHECKING:
    from slmdeploy.compress.shapes import Goal


class Method(StrEnum):
    """Ways to choose what is pruned."""

    OSSCAR = "osscar"
    MINITRON = "minitron"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Allocation(StrEnum):
    """Ways to share out what is pruned over the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"


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


class Loss(StrEnum):
    """Divergences between teacher and student; the last four are of encoders."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"
    TVD = "tvd"
    SKEW_KL = "skew_kl"
    REVERSE_SKEW_KL = "reverse_skew_kl"
    KL = "kl"
    MSE = "mse"
    COSINE = "cosine"
    RELATION = "relation"


class ScoreLoss(StrEnum):
    """What is compared at the label words of scoring records."""

    TOKENS = "tokens"
    MARGIN = "margin"
    LISTWISE = "listwise"


class Optimizer(StrEnum):
    """Optimisers of a stage."""

    ADAMW = "adamw"
    MUON = "muon"


class Dtype(StrEnum):
    """Arithmetic of training."""

    BF16 = "bf16"
    FP32 = "fp32"


def prune(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face id.")],
    output: Out,
    data: Data,
    ratio: Annotated[
        float | None, typer.Option(help="Share of MLP neurons and GQA groups to remove.  [default: 0.5]")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Instead of shares, a limit to shape the model to: 'ttft_512_ms<=20'.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="With --latency: how the model will be built, name or .toml file.")
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="With --latency: JSON file of measured times.  [default: in the user's cache]")
    ] = None,
    attention_ratio: Annotated[float | None, typer.Option(help="Another share for GQA groups.")] = None,
    query_ratio: Annotated[
        float, typer.Option(help="Share of the query heads of each KV head to remove, where it has several.")
    ] = 0.0,
    layer_ratio: Annotated[float, typer.Option(help="Share of whole layers to remove, before the rest.")] = 0.0,
    hidden_ratio: Annotated[float, typer.Option(help="Share of hidden channels to remove.")] = 0.0,
    method: Annotated[Method, typer.Option(help="How the kept groups are chosen.")] = Method.OSSCAR,
    allocation: Annotated[
        Allocation, typer.Option(help="The same share of every layer, or what costs least over all: uneven layers.")
    ] = Allocation.UNIFORM,
    text: Annotated[
        str | None, typer.Option("--text", help="Of encoders: --data is a table, and this its column of texts.")
    ] = None,
    pair: Pair = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of data to calibrate on.")] = 16384,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of method random.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Remove layers, hidden channels, MLP neurons and GQA groups; writes an ordinary Hugging Face checkpoint."""
    from slmdeploy.checkpoint import resolve_checkpoint
    from slmdeploy.compress.prune import prune as verb
    from slmdeploy.specs import TextColumns

    if pair and text is None:
        raise InputError("--pair is of encoders: give --text too, or leave it out")
    goal = _goal(latency, profile, latency_table)
    artifact = verb(
        resolve_checkpoint(checkpoint),
        out=output,
        ratio=0.5 if ratio is None and goal is None else ratio,
        goal=goal,
        attention_ratio=attention_ratio,
        query_ratio=query_ratio,
        layer_ratio=layer_ratio,
        hidden_ratio=hidden_ratio,
        allocation=allocation.value,
        method=method.value,
        data=data,
        calibration_tokens=calibration_tokens,
        columns=None if text is None else TextColumns(text=text, pair=pair),
        seed=seed,
        force=force,
        progress=progress(as_json),
    )
    done(artifact, as_json)


def _goal(latency: str | None, profile: str | None, table: Path | None) -> "Goal | None":
    """What --latency and --profile come to."""
    if latency is None or profile is None:
        if latency or profile or table:
            raise InputError("--latency and --profile go together, and --latency-table with them: give both or neither")
        return None
    from slmdeploy.latency import goal_of
    from slmdeploy.specs import load_profile

    return goal_of(latency, load_profile(profile), table)


def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Argument(help="Teacher checkpoint: folder or Hugging Face id.")],
    student: Annotated[str, typer.Argument(help="Student checkpoint to train: folder or Hugging Face id.")],
    output: Out,
    data: Data,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")],
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows per forward pass of all processes.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens per row.")] = 512,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimiser of the block matrices.")] = Optimizer.ADAMW,
    loss: Annotated[Loss, typer.Option(help="Divergence.")] = Loss.FORWARD_KL,
    beta: Annotated[float | None, typer.Option(help="Weight of the teacher in jsd.")] = None,
    skew: Annotated[float | None, typer.Option(help="Share mixed in by the skew losses.  [default: 0.1]")] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the divergence.")] = 1.0,
    ce_share: Annotated[float, typer.Option(help="Share of cross-entropy in the loss.")] = 0.0,
    score_share: Annotated[float, typer.Option(help="Share of rows that hold scoring records.")] = 0.0,
    score_loss: Annotated[
        ScoreLoss, typer.Option(help="At label words: their tokens, the items' margins, or lists of items.")
    ] = ScoreLoss.TOKENS,
    score_items: Annotated[int, typer.Option(min=2, help="Items of a scoring record per visit.")] = 3,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the loss of layer outputs.")] = 0.0,
    attention_weight: Annotated[float, typer.Option(help="Weight of the loss of attention outputs.")] = 0.0,
    layer_map: Annotated[
        list[int] | None,
        typer.Option(help="Teacher's layer, from 0, for the student's next layer; repeated. Default: evenly spread."),
    ] = None,
    on_policy: Annotated[float, typer.Option(help="Share λ of batches whose responses the student samples.")] = 0.0,
    seq_kd_texts: Annotated[
        int, typer.Option(min=0, help="Prompts that the teacher answers beforehand; replaces the data's completions.")
    ] = 0,
    response_tokens: Annotated[int, typer.Option(min=1, help="Length of sampled responses.")] = 64,
    sample_temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 0.9,
    cached_rows: Annotated[
        int, typer.Option(min=0, help="Rows to go over again and again, seen by the teacher once.")
    ] = 0,
    cached_top: Annotated[int, typer.Option(min=1, help="Tokens of the teacher kept per position of those.")] = 64,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what the teacher does once, for further stages too.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Of encoders: --data is a table, and this its column of texts.")
    ] = None,
    pair: Pair = None,
    label: Annotated[str | None, typer.Option(help="Of encoders: column of the label, for --ce-share.")] = None,
    relation_weight: Annotated[float, typer.Option(help="Of embedders: weight of the loss of relations.")] = 0.0,
    dtype: Annotated[Dtype, typer.Option(help="Mixed precision, or full.")] = Dtype.BF16,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Trade time for memory.")] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to resume from.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of order and sampling.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a student on its teacher's distributions; a killed run goes on from its last saved step."""
    if text is not None:
        done(distill_texts(context), as_json)
        return
    if pair or label or relation_weight:
        raise InputError("--pair, --label and --relation-weight are of encoders: give --text too, or leave them out")
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
        score_loss=score_loss.value,
        score_items=score_items,
        hidden_weight=hidden_weight,
        attention_weight=attention_weight,
        layer_map=layer_map or None,
        on_policy=on_policy,
        seq_kd_texts=seq_kd_texts,
        response_tokens=response_tokens,
        sample_temperature=sample_temperature,
        cached_rows=cached_rows,
        cached_top=cached_top,
        dtype=dtype.value,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        seed=seed,
        beta=beta,
        skew=skew,
    )
    artifact = verb(
        resolve_checkpoint(teacher),
        resolve_checkpoint(student),
        out=output,
        data=data,
        stage=stage,
        cache=cache,
        force=force,
        progress=progress(as_json),
    )
    done(artifact, as_json)


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
        progress=progress(as_json),
    )
    done(artifact, as_json)


def build(
    graph: Annotated[Path, typer.Argument(help="Graph folder made by export.")],
    output: Out,
    profile: Annotated[str, typer.Option("--profile", help="Shipped name or a .toml file.")],
    target: Annotated[
        str | None, typer.Option("--target", help="Shipped name or .toml; default: this machine.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder for the quality gate.")] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", help="Lengths a GPU's compiler tunes for, e.g. generate-512-64.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 when a gate fails.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compile a graph under a profile; its gates are measured and recorded."""
    from slmdeploy.building.build import build as verb
    from slmdeploy.specs import load_profile, load_target, named_workload

    artifact = verb(
        graph,
        profile=load_profile(profile),
        target=load_target(target) if target else None,
        out=output,
        data=data,
        workload=named_workload(workload) if workload else None,
        force=force,
        progress=progress(as_json),
    )
    done(artifact, as_json)
    failed = [name for name, gate in artifact.result["gates"].items() if not gate["passed"]]
    if strict and failed:
        raise GateError(f"{output} is outside its gate: {', '.join(failed)} (manifest.json has the figures)")


def recompile(
    build: Annotated[Path, typer.Argument(help="Build for TensorRT, made by build.")],
    output: Out,
    target: Annotated[
        str | None, typer.Option("--target", help="What for, ahead of time; default: the GPU here, else as it was.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compile a build for TensorRT anew, for the version and GPU at hand, from the graph that it ships."""
    from slmdeploy.building.recompile import recompile as verb
    from slmdeploy.specs import load_target

    chosen = load_target(target) if target else None
    done(verb(build, out=output, target=chosen, force=force, progress=progress(as_json)), as_json)
