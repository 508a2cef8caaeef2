"""Run what was built: generate, score, embed, classify."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slmdeploy.commands.options import Json, Threads


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
    draft: Annotated[
        Path | None, typer.Option(help="A smaller build of the same tokenizer that guesses ahead; same text, faster.")
    ] = None,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Guess ahead from the text itself; same text, faster.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    from slmdeploy import console
    from slmdeploy.runtime.chat import command_messages
    from slmdeploy.runtime.model import load

    messages = command_messages(prompt, chat, system)
    model = load(path, threads=threads, draft=draft, prompt_lookup=prompt_lookup)
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
        drafted = {} if model.draft_counts is None else {"drafting": model.draft_counts.to_dict()}
        console.print_json({"text": completion.text, "finish_reason": completion.finish_reason, **drafted})
        return
    pieces = model.stream(text, **options) if messages is None else model.chat_stream(messages, **options)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


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
