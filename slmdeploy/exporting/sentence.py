"""What makes one vector of a text's tokens: the modules of a sentence-transformers folder, read from its JSON files.

    modules.json -> Transformer, Pooling, then Dense and Normalize in any number -> `Head`

A checkpoint that is no such folder is pooled by the mean, as sentence-transformers would. Whatever a caller sets
otherwise is written back, so that an exported folder means the same there. A module, mode or setting that would change
the vector and is not implemented is refused by name. Knows nothing of torch and of graphs.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from slmdeploy.checkpoint import read_json
from slmdeploy.errors import CorruptArtifactError, UnsupportedModelError
from slmdeploy.exporting.tasks import SENTENCE_MODULES

POOLINGS = ("mean", "cls", "last")
"""The mean of all tokens, the first, or the last; padding never counts."""
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU")
"""What a Dense module may apply, by the name of its torch.nn class."""
NORMALIZE = "normalize"
_SETTINGS = "config_sentence_transformers.json"
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling; its weights are in `folder`."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class Head:
    """From token vectors to the vector of the text: the pooling, then `steps` in order (Dense or NORMALIZE).

    max_length: the tokens that sentence-transformers lets through, where the folder says so. prompts: texts by name
    that go in front of a text, the one named `default_prompt` where no other is asked for. files: relative names.
    """

    pooling: str = "mean"
    steps: tuple[Dense | str, ...] = ()
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    files: tuple[str, ...] = ()

    @property
    def normalized(self) -> bool:
        """Whether vectors come out with length one."""
        return bool(self.steps) and self.steps[-1] == NORMALIZE

    def changed(self, pooling: str | None, normalize: bool | None) -> "Head":
        """The head as a caller wants it; None leaves a setting as it is."""
        steps = self.steps
        if normalize is not None and normalize != self.normalized:
            steps = (*steps, NORMALIZE) if normalize else steps[:-1]
        return replace(self, pooling=pooling or self.pooling, steps=steps)


def read_head(checkpoint: Path) -> Head:
    """The head of a sentence-transformers folder, of any other checkpoint the mean of its tokens.

    Raises UnsupportedModelError for a module or setting that is not implemented, InputError for a missing file and
    CorruptArtifactError for a damaged one.
    """
    if not (checkpoint / SENTENCE_MODULES).is_file():
        return Head()
    modules = _modules(checkpoint / SENTENCE_MODULES)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "Normalize"} or modules[0][1]:
        _refuse(checkpoint / SENTENCE_MODULES, "modules", kinds, "Transformer at the top, Pooling, Dense, Normalize")
    max_length, transformer_files = _transformer(checkpoint)
    steps = [_dense(checkpoint / path) if kind == "Dense" else NORMALIZE for kind, path in modules[2:]]
    prompts, default, settings_files = _prompts(checkpoint / _SETTINGS)
    parts = [f"{path}/{name}" for _, path in modules[1:] for name in ("config.json", "model.safetensors")]
    files = [SENTENCE_MODULES, *transformer_files, *settings_files, *(p for p in parts if (checkpoint / p).is_file())]
    pooling = _pooling(checkpoint / modules[1][1] / "config.json")
    return Head(pooling, tuple(steps), max_length, prompts, default, tuple(files))


def write_head(checkpoint: Path, head: Head, hidden: int, folder: Path) -> None:
    """The head's files in a graph folder: copies, and modules.json and 1_Pooling as they are now."""
    for name in head.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / name, folder / name)
    if head == read_head(checkpoint) and head.files:
        return
    types = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for step in head.steps:
        dense = step.folder.name if isinstance(step, Dense) else None
        types.append(("Dense", dense) if dense else ("Normalize", f"{len(types)}_Normalize"))
    base = "sentence_transformers.models"
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"{base}.{kind}"} for i, (kind, p) in enumerate(types)]
    _write(folder / SENTENCE_MODULES, modules)
    modes = {key: mode == head.pooling for key, mode in _LEGACY_MODES.items()}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, **modes})


def _modules(file: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtifactError(f"{file} is no list of modules ({error}); download the checkpoint again") from error
    for kind, path in found:
        if not kind.startswith("sentence_transformers."):
            _refuse(file, "type", kind, "a module of sentence-transformers itself: code that comes along is never run")
        if "/" in path or "\\" in path or path.startswith("."):
            raise CorruptArtifactError(f"{file}: path = {path!r} is no folder right below the checkpoint")
    return [(kind.rsplit(".", 1)[1], path) for kind, path in found]


def _transformer(checkpoint: Path) -> tuple[int | None, list[str]]:
    """The longest input in tokens and the name of the file that says it, none where there is none."""
    file = next(iter(sorted(checkpoint.glob("sentence_*_config.json"))), None)
    if file is None:
        return None, []
    settings = read_json(file)
    if settings.get("do_lower_case"):
        _refuse(file, "do_lower_case", settings["do_lower_case"], "false, or lower-casing in tokenizer.json")
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        _refuse(file, "transformer_task", settings["transformer_task"], "feature-extraction")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        _refuse(file, "max_seq_length", length, "a number of tokens")
    return length, [file.name]


def _pooling(file: Path) -> str:
    config = read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        if any(config.get(key) for key in _LEGACY_MODES) and "pooling_mode_mean_tokens" not in config:
            # Versions of sentence-transformers do not agree on what a missing one means.
            _refuse(file, "pooling_mode_mean_tokens", None, "true or false where another mode is given")
        mode = [name for key, name in _LEGACY_MODES.items() if config.get(key)] or ["mean"]
    modes = [mode] if isinstance(mode, str) else mode
    known = {"lasttoken": "last", **{name: name for name in POOLINGS}}
    if len(modes) != 1 or modes[0] not in known:
        _refuse(file, "pooling_mode", mode, "mean, cls or lasttoken, one of them")
    if config.get("include_prompt", True) is not True:
        _refuse(file, "include_prompt", config["include_prompt"], "true: prompts are pooled with the text")
    return known[modes[0]]


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = read_json(file)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        _refuse(file, "activation_function", activation, f"torch's {', '.join(ACTIVATIONS)}")
    for key in ("use_residual", "module_output_name"):
        if config.get(key) not in (None, False, "sentence_embedding"):
            _refuse(file, key, config[key], "left out")
    inputs, outputs = config.get("in_features"), config.get("out_features")
    if type(inputs) is not int or type(outputs) is not int or min(inputs, outputs) < 1:
        _refuse(file, "in_features, out_features", (inputs, outputs), "two sizes")
    return Dense(folder, inputs, outputs, bool(config.get("bias", True)), name)


def _prompts(file: Path) -> tuple[dict[str, str], str | None, list[str]]:
    if not file.is_file():
        return {}, None, []
    config = read_json(file)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        _refuse(file, "prompts", prompts, "texts by name")
    if default is not None and default not in prompts:
        _refuse(file, "default_prompt_name", default, f"one of {', '.join(prompts) or 'no names'}")
    return prompts, default, [file.name]


def _refuse(file: Path, key: str, value: Any, must: str) -> NoReturn:
    raise UnsupportedModelError(f"{file}: {key} = {value!r} is not supported; it has to be {must}")


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
