"""Measuring over ssh, with a fake `ssh` that runs the script in a shell here, and once with a real sshd.

The fake is a program on the PATH, so quoting, the tar stream, the check, the run and the clean-up are the real ones.
"""

import getpass
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError
from slmdeploy.profiling.remote import DEPENDENCIES, Host, parse_host, profile_options, profile_remote
from tests.graphs import write_tiny_graph

REPOSITORY = Path(__file__).parents[2]
WORDS = ["--workload", "generate-8-4", "--limit", "0.2"]
FAKE_SSH = """#!/bin/sh
printf '%s\\n' "$@" > "{seen}"
while [ "$1" != -- ]; do shift; done
cd /
TMPDIR="{there}" exec sh -c "$3"
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The other machine's folder of temporary files; what ssh was called with is in `seen` beside it."""
    folder = tmp_path / "there"
    folder.mkdir()
    put_program(tmp_path / "bin" / "ssh", FAKE_SSH.format(seen=tmp_path / "seen", there=folder), monkeypatch)
    return folder


def put_program(path, text, monkeypatch):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return write_tiny_graph(tmp_path_factory.mktemp("builds") / "a build; touch spoiled", tasks=("generate",))


def test_a_measurement_comes_back_and_nothing_stays(there, build, tmp_path):
    out = profile_remote("someone@elsewhere:2222", [build], WORDS, tmp_path / "m.json", python=sys.executable)
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert (row["build"], row["path"], row["source"]) == (build.name, str(build), "measured")
    assert row["workloads"]["generate-8-4"]["metrics"]["ttft_ms_p50"] > 0
    assert list(there.iterdir()) == []
    words = (tmp_path / "seen").read_text().splitlines()
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("--") + 1] == "someone@elsewhere"
    assert not list(tmp_path.rglob("spoiled"))


def test_files_among_the_arguments_travel_too(there, build, tmp_path):
    file = tmp_path / "own.toml"
    sizes = 'task = "generate"\nprompt_tokens = 5\nnew_tokens = 3\nrequests = 5\n'
    file.write_text(f'[[workload]]\nname = "own"\n{sizes}')
    words = ["--workload", file, "--limit", "0.2"]
    out = profile_remote("elsewhere", [build], words, tmp_path / "m.json", python=sys.executable)
    assert list(json.loads(out.read_text())["rows"][0]["workloads"]) == ["own"]


@pytest.mark.parametrize(
    ("words", "python", "kind", "message"),
    [
        (["--workload", "generate-9-999"], sys.executable, InputError, "on elsewhere: workload 'generate-9-999' needs"),
        (WORDS, "/no/python", InputError, "elsewhere has no /no/python: name its Python with --remote-python"),
        (WORDS, "p; touch spoiled", InputError, "elsewhere has no p; touch spoiled"),
    ],
)
def test_what_fails_there_is_one_sentence_here(there, build, tmp_path, words, python, kind, message):
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        profile_remote("elsewhere", [build], words, tmp_path / "m.json", python=python)
    assert not (tmp_path / "m.json").exists()
    assert list(there.iterdir()) == []


def test_what_is_missing_there_is_named_with_the_command(there, build, tmp_path, monkeypatch):
    bare = tmp_path / "bin" / "python-bare"
    put_program(bare, f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', monkeypatch)
    with pytest.raises(InputError, match=r"python-bare on elsewhere lacks jinja2, numpy.*pip install jinja2 numpy"):
        profile_remote("elsewhere", [build], WORDS, tmp_path / "m.json", python="python-bare")


def test_a_connection_that_fails(build, tmp_path, monkeypatch):
    text = "#!/bin/sh\necho 'ssh: Could not resolve hostname elsewhere' >&2\nexit 255\n"
    put_program(tmp_path / "bin" / "ssh", text, monkeypatch)
    with pytest.raises(InputError, match="ssh to elsewhere failed: ssh: Could not resolve hostname elsewhere"):
        profile_remote("elsewhere", [build], WORDS, tmp_path / "m.json")


@pytest.mark.parametrize("reply", ["no json", '{"rows": [{"build": "another"}]}', '{"rows": 3}', "{}"])
def test_a_reply_that_is_no_measurement(build, tmp_path, monkeypatch, reply):
    put_program(tmp_path / "bin" / "ssh", f"#!/bin/sh\ncat >/dev/null &\necho '{reply}'\n", monkeypatch)
    with pytest.raises(ResourceError, match="elsewhere sent no measurement"):
        profile_remote("elsewhere", [build], WORDS, tmp_path / "m.json")


def test_what_is_wrong_here_is_found_before_anything_is_sent(there, build, tmp_path, monkeypatch):
    out = tmp_path / "m.json"
    with pytest.raises(InputError, match=r"m is no \.json file"):
        profile_remote("elsewhere", [build], WORDS, tmp_path / "m")
    with pytest.raises(CorruptArtifactError):
        profile_remote("elsewhere", [damaged(build, tmp_path / "damaged")], WORDS, out)
    out.write_text("kept")
    with pytest.raises(OutputExistsError, match="exists already"):
        profile_remote("elsewhere", [build], WORDS, out)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no ssh on the PATH"):
        profile_remote("elsewhere", [build], WORDS, out, force=True)
    assert out.read_text() == "kept"
    assert not (tmp_path / "seen").exists()


def damaged(build, copy):
    shutil.copytree(build, copy)
    (copy / "model.onnx").write_bytes(b"cut")
    return copy


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("box", Host("box")),
        ("me@box.example.org:22", Host("me@box.example.org", 22)),
        ("me@[::1]:2200", Host("me@::1", 2200)),
        ("10.0.0.7", Host("10.0.0.7")),
    ],
)
def test_hosts(text, host):
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "me@-box", "box:0", "box:70000", "box:", "a b", "box;ls", "me@you@box", "box\n"]
)
def test_what_is_no_host(text):
    with pytest.raises(InputError, match="is not of the form user@host"):
        parse_host(text)


def test_options_are_given_on_with_files_as_paths(tmp_path):
    words = profile_options(["generate-8-4", "t.jsonl"], None, tmp_path, None, ["ttft_ms_p99"], 0.05, 6.0, 2, True)
    assert words == [
        *(
            "--precision",
            "0.05",
            "--limit",
            "6.0",
            "--search",
            "--workload",
            "generate-8-4",
            "--workload",
            Path("t.jsonl"),
        ),
        *("--watch", "ttft_ms_p99", "--data", tmp_path, "--threads", "2"),
    ]
    with pytest.raises(InputError, match=r"--recipe r\.toml does not go with --remote"):
        profile_options([], Path("r.toml"), None, None, [], 0.05, 6.0, None, False)


def test_the_dependencies_are_those_of_the_package():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(text.partition(">")[0] for text in declared) == list(DEPENDENCIES)


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    """A server on a free port of this machine that lets this test's own key in; yields user@host:port."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here: install openssh-server")
    home = tmp_path / "sshd"
    home.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)
    shutil.copy(home / "user.pub", home / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = (
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {home / 'host'}",
        f"AuthorizedKeysFile {home / 'authorized_keys'}",
        f"PidFile {home / 'pid'}",
        "StrictModes no",
        "UsePAM no",
    )
    (home / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it puts away its privileges; its package's service makes it
    known = (home / "host.pub").read_text().rsplit(" ", 1)[0]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {known}\n")
    options = f"-F /dev/null -i {home / 'user'} -o UserKnownHostsFile={home / 'known_hosts'} -o IdentitiesOnly=yes"
    put_program(tmp_path / "bin" / "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n', monkeypatch)
    process = subprocess.Popen([server, "-D", "-e", "-f", home / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port))
        yield f"{getpass.getuser()}@127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, seconds=60.0):
    """Poll; a machine under load takes long, so the limit is far above what is normal."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "gave up waiting"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_real_server(sshd, build, tmp_path):
    out = profile_remote(sshd, [build], WORDS, tmp_path / "m.json", python=sys.executable)
    assert json.loads(out.read_text())["rows"][0]["path"] == str(build)
    with pytest.raises(InputError, match=r"has no /no/python"):
        profile_remote(sshd, [build], WORDS, tmp_path / "n.json", python="/no/python")


@pytest.mark.slow
def test_ctrl_c_here_ends_the_run_there_and_removes_its_folder(sshd, build, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    # The run there reports its folder through TMPDIR, which sshd does not hand on; so the Python there is a wrapper
    # that leaves a note of where it works.
    note, wrapper = tmp_path / "note", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ntest "$2" = slmdeploy && pwd > {note}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    call = (
        "import sys; from pathlib import Path; from slmdeploy.profiling.remote import profile_remote as run\n"
        "run(sys.argv[1], [Path(sys.argv[2])], ['--workload', 'generate-32-32', '--limit', '500'], "
        "Path(sys.argv[3]), python=sys.argv[4])"
    )
    words = [sys.executable, "-c", call, sshd, str(build), str(tmp_path / "m.json"), str(wrapper)]
    process = subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
    there = Path(note.read_text().strip())
    assert there.is_dir()
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    wait_until(lambda: not there.exists())
    assert not (tmp_path / "m.json").exists()
