"""README.md of a package: what it is, how to run and check it, and what was measured of it, with where and how.

Every figure is one that the build's manifest, a measurement or the trial holds; where none was measured there is no
table. Knows nothing of how the package was written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from slmdeploy.packaging.figures import table
from slmdeploy.packaging.lock import LOCK
from slmdeploy.packaging.sbom import SBOM
from slmdeploy.packaging.trial import Start
from slmdeploy.runtime.bundle import RuntimeConfig
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.selection import Row


def readme(
    config: RuntimeConfig | EncoderConfig,
    build: Mapping[str, Any],
    pins: Mapping[str, str],
    *,
    start: Start | None,
    rows: Sequence[Row],
    locked: bool,
    server: bool,
) -> str:
    """The text of README.md for a package of the build with the manifest ``build``."""
    kind = "An encoder" if isinstance(config, EncoderConfig) else f"A decoder of {config.layers} layers"
    install = f"--require-hashes -r {LOCK}" if locked else "-r requirements.txt"
    lines = [
        "# A language model, ready to run",
        "",
        f"{kind} with {config.vocab_size} tokens and a context of {config.max_length}, "
        f"in {config.precision}, for {' and '.join(config.tasks)}. Packaged by slmdeploy {build['slmdeploy']}.",
        "",
        "```",
        f"python3 -m pip install {install}",
        *_examples(config.tasks),
        "./run verify",
        "```",
        "",
        f"Tested with {', '.join(f'{name} {pin}' for name, pin in pins.items())}.",
        f"`{LOCK}` has the sha256 of every wheel." if locked else "Hashes of the requirements were not asked for.",
        "`./run VERB --help` lists the options; with `--json` it prints one JSON object.",
        "`manifest.json` has the size and sha256 of every file, and what the model was made of; "
        f"`{SBOM}` says the same as a CycloneDX bill of materials; `runtime/` is the code that runs it (Apache-2.0).",
        *(["`server/README.md` says how to serve it."] if server else []),
        "",
    ]
    return "\n".join([*lines, *_started(start), *table(rows), *_measured(build)])


def _examples(tasks: tuple[str, ...]) -> list[str]:
    lines = []
    if "generate" in tasks:
        lines.append('./run generate "Once upon a time"')
    if "score" in tasks:
        lines.append('./run score --prefix "what all items share" "item one" "item two"')
    return lines + [f'./run {task} "a text" "another text"' for task in ("embed", "classify") if task in tasks]


def _started(start: Start | None) -> list[str]:
    if start is None:
        return []
    return [
        "## Measured when it was packaged",
        "",
        f"Medians of {start.starts} fresh processes on the machine that packaged it, hashes verified, "
        f"task {start.task}.",
        "",
        "| figure | value | |",
        "|---|---|---|",
        f"| first_answer_s | {start.first_answer_s:.3g} | from the first import to the first answer |",
        f"| peak_bytes | {start.peak_bytes} | most resident memory until then |",
        "",
    ]


def _measured(build: Mapping[str, Any]) -> list[str]:
    """A table of the figures in the build's result, none if it has none."""
    result, rows = build["result"], []
    meanings = {"quality": "against its own fp32 graph", "speed": "time over the fp32 graph's, below 1 is faster"}
    for group, meaning in meanings.items():
        for name, value in (result.get(group) or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rows.append(f"| {name} | {value:.4g} | {meaning} |")
    if not rows:
        return []
    where = ", ".join(f"{name} {value}" for name, value in build["machine"].items())
    head = ["## Measured when it was built", "", f"On this machine and no other: {where}.", ""]
    return [*head, "| figure | value | |", "|---|---|---|", *rows, ""]
