"""chat.py: equal to transformers on templates of the usual kinds, where templates come from, and hostile ones."""

import builtins
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slmdeploy.runtime.__main__ import main
from slmdeploy.runtime.chat import ChatTemplates, command_messages
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model, load
from tests.graphs import tiny_tokenizer, write_manifest

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + strftime_now("%d %b %Y") + "\\n\\n" + system_message + "<|eot|>" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}' }}
    {%- else %}
        {{- "<|start|>tool<|end|>\\n\\n" + message.content | tojson + "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% set content = message.content %}
        {% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ content }}{% endgeneration %}{{- '<|im_end|>\\n' }}
    {% else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TURNS = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<turn>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<turn>model\n'}}{% endif %}"
)
INSTRUCT = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "tool" %}{%- continue %}{%- endif %}
    {%- if message["role"] == "user" %}
        {%- if system_message is defined and message == user_messages[-1] %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
PLAIN = """
{% for message in messages %}
  {{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}"""
TEMPLATES = {"headers": HEADERS, "chatml": CHATML, "turns": TURNS, "instruct": INSTRUCT, "plain": PLAIN}

USER = {"role": "user", "content": " Is 3 < 4 & 'ä' a letter?\n"}
TURN = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes. "}, {"role": "user", "content": "Why?"}]
SYSTEM = [{"role": "system", "content": "Be brief.", "name": None}, *TURN]
CALL = {"name": "add", "arguments": {"a": 1, "b": "zwölf"}}
TOOL = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": {"sum": 13}},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def write_tokenizer(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (TURN, {}),
        (TURN, {"variables": {"enable_thinking": False}}),
        (SYSTEM, {}),
        (SYSTEM, {"tools": TOOLS}),
        ([USER], {"tools": TOOLS, "variables": {"bos_token": "<bos>"}}),
    ],
)
def test_equal_to_transformers(tmp_path: Path, name: str, messages: list[Any], options: dict[str, Any]) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": TEMPLATES[name]})
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    variables = options.get("variables", {})

    def expected() -> str:
        return theirs.apply_chat_template(
            messages, tools=options.get("tools"), add_generation_prompt=True, tokenize=False, **variables
        )

    if name == "turns" and messages is SYSTEM:
        with pytest.raises(Exception, match="System role not supported"):
            expected()
        with pytest.raises(InputError, match=r"cannot render these messages \(System role not supported\)"):
            ChatTemplates(folder).render(messages, **options)
        return
    rendered = ChatTemplates(folder).render(messages, **options)
    assert rendered == expected()
    assert "Why?" in rendered or messages == [USER]


def test_tool_calls_are_equal_to_transformers(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": HEADERS})
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(TOOL, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert ChatTemplates(folder).render(TOOL, tools=TOOLS) == expected
    assert '{"a": 1, "b": "zwölf"}' in expected


def test_where_templates_come_from(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", {})
    with pytest.raises(InputError, match="has no chat template"):
        ChatTemplates(folder)
    listed = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "tools"}]
    write_tokenizer(folder, {"chat_template": listed})
    assert ChatTemplates(folder).render([USER]) == "config"
    assert ChatTemplates(folder).render([USER], tools=TOOLS) == "tools"
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("further")
    assert ChatTemplates(folder).render([USER]) == "file"
    assert ChatTemplates(folder).render([USER], tools=TOOLS) == "further"
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.apply_chat_template([USER], tokenize=False) == "file"
    assert theirs.apply_chat_template([USER], tokenize=False, tools=TOOLS) == "further"
    write_tokenizer(folder, {"chat_template": [{"name": "rag", "template": "rag"}]})
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no default chat template, only rag, tool_use"):
        ChatTemplates(folder).render([USER])


def test_special_tokens_of_the_older_file(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": "{{ bos_token }}{{ pad_token }}{{ sep_token }}"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<old>", "pad_token": {"content": "<p>"}}))
    assert ChatTemplates(folder).render([USER]) == "<s><p>"


@pytest.mark.parametrize("messages", [[], "Hello", USER, ["Hello"], [USER, None]])
def test_messages_that_are_none(tmp_path: Path, messages: Any) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": PLAIN})
    with pytest.raises(InputError, match="messages must be a list of dicts"):
        ChatTemplates(folder).render(messages)


def test_objects_do_not_reach_the_template(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": PLAIN})
    with pytest.raises(InputError, match="must be plain JSON values"):
        ChatTemplates(folder).render([{"role": "user", "content": tmp_path}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute.again }}",
    ],
)
def test_a_hostile_template_is_one_sentence(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": template})
    with pytest.raises(InputError, match=r"The chat template of .* cannot render these messages \(") as caught:
        ChatTemplates(folder).render([USER])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ strftime_now.__globals__ }}", "{{ dict.__mro__ }}"])
def test_what_the_sandbox_hides_is_not_there(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": template})
    assert ChatTemplates(folder).render([USER]) == ""


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages", "{% for %}", "{% unknown %}", "(" * 9 + "{{" + "(" * 9]
)
def test_what_is_no_template(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": template})
    with pytest.raises(CorruptArtifactError, match=r"The default chat template of .* is no template"):
        ChatTemplates(folder).render([USER])


@pytest.mark.parametrize("value", [[{"name": "default", "template": 1}], [{"name": ["x"], "template": "x"}]])
def test_a_template_of_another_type(tmp_path: Path, value: object) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": value})
    with pytest.raises(CorruptArtifactError, match="chat_template must be text, or a list of names and texts"):
        ChatTemplates(folder)


def test_files_that_are_not_sound(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", {})
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CorruptArtifactError, match=r"chat_template\.jinja is not UTF-8"):
        ChatTemplates(folder)
    (folder / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(CorruptArtifactError, match="is larger than"):
        ChatTemplates(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CorruptArtifactError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplates(folder)


def test_without_jinja_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokenizer(tmp_path / "folder", {"chat_template": PLAIN})
    real = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name.startswith("jinja2"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(InputError, match=r"needs jinja2, which is not installed: pip install 'jinja2>=3\.1\.6'"):
        ChatTemplates(folder).render([USER])


def test_a_jinja_with_a_leaking_sandbox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinja2.__version__", "3.1.5")
    with pytest.raises(InputError, match=r"needs a newer jinja2 than 3\.1\.5"):
        ChatTemplates(write_tokenizer(tmp_path / "folder", {"chat_template": PLAIN})).render([USER])


def test_what_the_command_line_asks_for() -> None:
    assert command_messages("prompt", None, None) is None
    assert command_messages(None, None, None) is None
    assert command_messages(None, "Hi", None) == [{"role": "user", "content": "Hi"}]
    roles = [message["role"] for message in command_messages(None, "Hi", "Be brief") or []]
    assert roles == ["system", "user"]
    with pytest.raises(InputError, match="--system goes with --chat"):
        command_messages("prompt", None, "Be brief")
    with pytest.raises(InputError, match="takes the place of the prompt"):
        command_messages("prompt", "Hi", None)


@pytest.fixture
def chatty(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template that writes its own beginning."""
    folder = tmp_path / "chatty"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    write_manifest(folder)
    return folder


def test_a_chat_is_the_generation_behind_the_rendered_prompt(chatty: Path, model: Model) -> None:
    talking = load(chatty)
    messages = [{"role": "user", "content": "añb"}]
    assert talking.chat_prompt(messages) == "<s>añb"
    answer = talking.chat(messages, max_new_tokens=9)
    assert answer == model.generate("añb", max_new_tokens=9)  # the tokenizer puts <s> before a prompt: not twice
    assert "".join(talking.chat_stream(messages, max_new_tokens=9)) == answer.text
    with pytest.raises(InputError, match="has no chat template"):
        model.chat(messages)


def test_the_command_line_chats(
    chatty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"not read")))
    expected = load(chatty).generate("be añb", max_new_tokens=5).text
    options = ["--chat", "añb", "--system", "be ", "--max-new-tokens", "5"]
    assert main([str(chatty), "generate", *options]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([str(chatty), "generate", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert main([str(chatty), "generate", "prompt", *options]) == 2
    assert "--chat takes the place of the prompt" in capsys.readouterr().err
