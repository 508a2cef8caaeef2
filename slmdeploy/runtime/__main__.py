"""The command line of a folder that can be run: its tasks and verify. The same on a workstation and in a package.

Parses, calls one method, prints; argparse, because a device has no more than the runtime needs. Exit codes: 0 ok, 2 bad
input, 5 corrupt artifact, 6 out of memory, disk or rights, 130 interrupted. An error is one sentence on stderr.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .bundle import read_manifest, verify_files
from .chat import command_messages
from .encoder_model import load_encoder
from .errors import InputError, SlmdeployError
from .model import load
from .opening import load as open_any


def parser(program: str, *, with_folder: bool) -> argparse.ArgumentParser:
    """The argument parser; without a folder argument for a package's own `run`, which knows its folder."""
    root = argparse.ArgumentParser(prog=program, description="Runs a model: its tasks, and verify.")
    if with_folder:
        root.add_argument("folder", type=Path, help="a graph, a build or a package")
    root.add_argument("--threads", type=int, help="threads to use; 0 for all cores (default: as packaged)")
    verbs = root.add_subparsers(dest="verb", required=True)
    generate = verbs.add_parser("generate", help="continue a prompt; streams to stdout")
    generate.add_argument("prompt", nargs="?", help="the text to continue (default: stdin)")
    generate.add_argument("--chat", help="a message to answer through the model's chat template, instead of a prompt")
    generate.add_argument("--system", help="what the model is told before the message of --chat")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--min-p", type=float, default=0.0)
    generate.add_argument("--repetition-penalty", type=float, default=1.0)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", default=[], help="text that ends the output; may be repeated")
    generate.add_argument("--draft", type=Path, help="a smaller build of the same tokenizer that guesses ahead")
    generate.add_argument("--prompt-lookup", action="store_true", help="guess ahead from the text itself")
    score = verbs.add_parser("score", help="score items behind a prefix, one line each")
    score.add_argument("--prefix", required=True, help="the text that all items share")
    score.add_argument("items", nargs="*", help="the items (default: the lines of stdin)")
    embed = verbs.add_parser("embed", help="the vector of each text, a line of numbers each")
    embed.add_argument("texts", nargs="*", help="the texts (default: the lines of stdin)")
    embed.add_argument("--prompt", help="the name of the model's prompt to put in front of each")
    classify = verbs.add_parser("classify", help="the label of each text, or of each of its tokens")
    classify.add_argument("texts", nargs="*", help="the texts (default: the lines of stdin)")
    verbs.add_parser("verify", help="check every file against the manifest")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="print one JSON object")
    return root


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Do what the arguments say and print it; raises the errors of the runtime."""
    verbs = {"generate": _generate, "score": _score, "embed": _embed, "classify": _classify, "verify": _verify}
    verbs[arguments.verb](folder, arguments)


def _generate(folder: Path, arguments: argparse.Namespace) -> None:
    messages = command_messages(arguments.prompt, arguments.chat, arguments.system)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    options = {name: getattr(arguments, name) for name in names}
    guesses = {"draft": arguments.draft, "prompt_lookup": arguments.prompt_lookup}
    model = load(folder, threads=arguments.threads, **guesses)
    if messages is None:
        prompt = _stdin() if arguments.prompt is None else arguments.prompt
    if arguments.json:
        completion = model.generate(prompt, **options) if messages is None else model.chat(messages, **options)
        drafted = {} if model.draft_counts is None else {"drafting": model.draft_counts.to_dict()}
        _print_json(vars(completion) | {"token_ids": list(completion.token_ids)} | drafted)
        return
    pieces = model.stream(prompt, **options) if messages is None else model.chat_stream(messages, **options)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _score(folder: Path, arguments: argparse.Namespace) -> None:
    items = arguments.items or _lines()
    scores = open_any(folder, threads=arguments.threads).score(arguments.prefix, items)
    if arguments.json:
        _print_json({"scores": scores})
        return
    for item, score in zip(items, scores, strict=True):
        print(f"{score:+.4f}\t{item}")


def _embed(folder: Path, arguments: argparse.Namespace) -> None:
    model = load_encoder(folder, threads=arguments.threads)
    vectors = model.embed(arguments.texts or _lines(), prompt=arguments.prompt).tolist()
    if arguments.json:
        _print_json({"embeddings": vectors})
        return
    for vector in vectors:
        print(" ".join(f"{value:.6g}" for value in vector))


def _classify(folder: Path, arguments: argparse.Namespace) -> None:
    model, texts = load_encoder(folder, threads=arguments.threads), arguments.texts or _lines()
    if model.labels_tokens:
        tokens = model.classify_tokens(texts)
        if arguments.json:
            _print_json({"labels": [[vars(label) for label in row] for row in tokens]})
            return
        for text, row in zip(texts, tokens, strict=True):
            for token in row:
                print(f"{token.score:.4f}\t{token.label}\t{text[token.start : token.end]}")
            print()
        return
    labels = model.classify(texts)
    if arguments.json:
        _print_json({"labels": [vars(label) for label in labels]})
        return
    for text, label in zip(texts, labels, strict=True):
        print(f"{label.score:.4f}\t{label.label}\t{text}")


def _verify(folder: Path, arguments: argparse.Namespace) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    if arguments.json:
        _print_json({"kind": manifest.kind, "files": len(manifest.files), "bytes": manifest.total_bytes, "ok": True})
        return
    print(f"{folder}: {manifest.kind}, {len(manifest.files)} files, {manifest.total_bytes} bytes, all as listed")


def _lines() -> list[str]:
    return _stdin().removesuffix("\n").split("\n")


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise InputError("The standard input is not UTF-8 text.") from None


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def main(argv: Sequence[str] | None = None, *, folder: Path | None = None, program: str = "slmdeploy.runtime") -> int:
    """Run a command line and return its exit code; `folder` is given by a package's `run`."""
    arguments = parser(program, with_folder=folder is None).parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        # Text is UTF-8 whatever the locale of the device says.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    try:
        run(arguments.folder if folder is None else folder, arguments)
    except SlmdeployError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the flush at exit must not raise the same again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
