"""Chat templates: from messages to the prompt that a model was trained on, rendered as transformers does it.

The templates are the checkpoint's own: chat_template.jinja, `chat_template` in tokenizer_config.json, and those in
additional_chat_templates/. They are programs by strangers and run in jinja2's sandbox, which lets them reach nothing
outside and change nothing; what they print is bounded, how long they take is not. jinja2 is imported here alone and
when a chat begins: a folder without chats needs no more than the rest of the runtime. Knows nothing of models.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import CorruptArtifactError, InputError
from .strictjson import read_object, read_regular

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes, parser

Message = Mapping[str, Any]
DEFAULT, TOOL_USE = "default", "tool_use"
_TEMPLATE, _FURTHER, _CONFIG, _TOKENS = (
    *("chat_template.jinja", "additional_chat_templates"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_SOURCE_BYTES = 1 << 20
_MAX_PROMPT = 1 << 24
_OLDEST_JINJA = (3, 1, 6)  # earlier sandboxes have known ways out


def command_messages(prompt: str | None, chat: str | None, system: str | None) -> list[Message] | None:
    """The messages that a command line asks for with --chat and --system, None when it asks for none of them."""
    if chat is None and system is None:
        return None
    if chat is None:
        raise InputError("--system goes with --chat: give the message of the user with --chat.")
    if prompt is not None:
        raise InputError("--chat takes the place of the prompt: give one of the two.")
    said = (("system", system), ("user", chat))
    return [{"role": role, "content": content} for role, content in said if content is not None]


class ChatTemplates:
    """The chat templates of a folder by name, compiled on first use.

    Raises InputError when there is none or jinja2 is missing, CorruptArtifactError for files that are not sound.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = read_object(folder / _CONFIG).value if (folder / _CONFIG).is_file() else {}
        self._sources = _sources(folder, config)
        if not self._sources:
            raise InputError(f"{folder} has no chat template: write the prompt as the model expects it and generate.")
        older = read_object(folder / _TOKENS).value if (folder / _TOKENS).is_file() else {}
        self._tokens = _named_tokens(older) | _named_tokens(config)
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the assistant's next message, to be encoded without further special tokens.

        messages: dicts with "role", "content" and whatever else the template reads. tools: JSON schemas of functions.
        variables: what else the template asks for, such as enable_thinking. Raises InputError for messages that the
        template refuses or cannot render.
        """
        if isinstance(messages, str | Mapping) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise InputError('messages must be a list of dicts such as {"role": "user", "content": "Hello"}.')
        # Keys without a value are left out, as templates print "None" for them or fail.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        context = {"messages": chat, "tools": tools, "documents": None, "add_generation_prompt": True}
        template = self._template(TOOL_USE if tools is not None and TOOL_USE in self._sources else DEFAULT)
        plain = _plain(self._tokens | dict(variables or {}) | context)
        try:
            return _bounded(template.generate(plain))
        except Exception as error:  # a template is a program and may raise anything
            self._refuse(error)

    def _template(self, name: str) -> "Template":
        if name not in self._sources:
            names = ", ".join(sorted(self._sources))
            raise InputError(f"{self._folder} has no {name} chat template, only {names}.")
        if name not in self._compiled:
            environment = self._environment
            try:
                self._compiled[name] = environment.from_string(self._sources[name])
            except Exception as error:  # the compiler raises more than its own kinds for hostile sources
                reason = _one_line(error)
                raise CorruptArtifactError(
                    f"The {name} chat template of {self._folder} is no template ({reason})."
                ) from None
        return self._compiled[name]

    @cached_property
    def _environment(self) -> "Environment":
        return _sandbox()

    def _refuse(self, error: Exception) -> NoReturn:
        raise InputError(
            f"The chat template of {self._folder} cannot render these messages ({_one_line(error)})."
        ) from None


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template text by name; a file goes before the config, as in transformers."""
    given = config.get("chat_template")
    pairs = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given or []
    if not isinstance(pairs, list) or not all(_is_named(pair) for pair in pairs):
        raise CorruptArtifactError(f"{folder / _CONFIG}: chat_template must be text, or a list of names and texts.")
    sources = {pair["name"]: pair["template"] for pair in pairs}
    files = {DEFAULT: folder / _TEMPLATE} if (folder / _TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / _FURTHER).glob("*.jinja"))}
    return sources | {name: _text(file) for name, file in files.items()}


def _is_named(pair: object) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(key), str) for key in ("name", "template"))


def _text(file: Path) -> str:
    try:
        return read_regular(file, _MAX_SOURCE_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptArtifactError(f"{file} is not UTF-8 text.") from None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each special token that has a name; configs write it as text or as an object with `content`."""
    values = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain(context: dict[str, Any]) -> dict[str, Any]:
    """A copy made of JSON values alone: an object of the caller's could have methods that the sandbox does not know."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(context))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Messages, tools and variables of a chat must be plain JSON values ({_one_line(error)})."
        ) from None
    return copy


def _bounded(pieces: Iterable[str]) -> str:
    parts, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > _MAX_PROMPT:
            raise ValueError(f"it prints more than {_MAX_PROMPT} characters")
        parts.append(piece)
    return "".join(parts)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _sandbox() -> "Environment":
    """jinja2 as transformers sets it up for chat templates: its whitespace, functions, filter and `generation` tag."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError:
        raise InputError("A chat needs jinja2, which is not installed: pip install 'jinja2>=3.1.6'.") from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < _OLDEST_JINJA:
        raise InputError(f"A chat needs a newer jinja2 than {jinja2.__version__}: pip install -U 'jinja2>=3.1.6'.")

    class Generation(Extension):
        """{% generation %} marks what the assistant said, for training; here its content is just text."""

        def __init__(self, environment: "Environment") -> None:
            self.tags = {"generation"}
            super().__init__(environment)

        def parse(self, parser: "parser.Parser") -> "nodes.Node":
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> Any:
            return caller()

    class PlainNamespace(Namespace):
        """A namespace() whose attributes cannot stand in for Python's own."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # without self, which may be an attribute
            for name in dict(*args[1:], **kwargs):
                PlainNamespace._check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: object) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")

    def refuse(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def as_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PlainNamespace,
    }
    return environment
