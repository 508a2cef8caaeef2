"""The worker's protocol in one process, and the same over pipes, with each way in which a worker can fail."""

import io
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from slmdeploy.errors import InputError, ResourceError
from slmdeploy.profiling.process import WorkerProcess, baseline_command, build_command
from slmdeploy.profiling.worker import FakeSession, answer, serve_lines


def ask(session, op, **fields):
    return answer(session, {"op": op, **fields}, session.clock)


def test_generate_stamps_each_token():
    reply = ask(FakeSession(prefill_s=0.5, step_s=0.1), "generate", prompt_ids=[1, 2], new_tokens=3)
    assert reply["tokens"] == [0, 1, 2]
    assert reply["stamps_ms"] == pytest.approx([500, 600, 700])


def test_a_session_that_stops_early_is_our_bug():
    class Short(FakeSession):
        def generate_ids(self, prompt_ids, *, max_new_tokens, ignore_eos):
            yield 0

    with pytest.raises(RuntimeError, match="asked for 3 tokens, the session gave 1"):
        ask(Short(), "generate", prompt_ids=[1], new_tokens=3)


def test_score_gives_label_logits_and_the_time():
    session = FakeSession(item_s=0.01)
    reply = answer(session, {"op": "score", "prefix_ids": [1], "item_ids": [[1, 5], [2, 7]]}, session.clock)
    assert reply["ms"] == pytest.approx(20)
    assert reply["label_logits"] == [[0, 5], [0, 7]]


def test_drive_sends_requests_of_several_kinds_and_keeps_times_alone():
    score = {"op": "score", "prefix_ids": [1], "item_ids": [[1, 5], [2, 7]]}
    requests = [score, {"op": "generate", "prompt_ids": [1], "new_tokens": 2}]
    options = {"requests": requests, "concurrency": 1, "batch": 1, "limit_s": 10.0}
    session = FakeSession(item_s=0.01)
    closed = ask(session, "drive", arrivals=None, **options)["records"]
    assert [set(record) for record in closed] == [
        {"arrival_s", "begin_s", "end_s", "ms"},
        {"arrival_s", "begin_s", "end_s", "stamps_ms"},
    ]
    assert closed[1]["end_s"] == pytest.approx(0.031)
    opened = ask(session, "drive", arrivals=[0.0, 1.0], **options)["records"]
    assert [record["arrival_s"] for record in opened] == [0.0, 1.0]


def test_logits_go_to_a_file_from_the_first_wanted_row(tmp_path):
    path = tmp_path / "x.npy"
    reply = ask(FakeSession(vocab_size=8), "logits", input_ids=[1, 2, 3, 4], first=1, path=str(path))
    assert reply == {"rows": 3}
    assert np.load(path).shape == (3, 8)


def test_unknown_op_and_error_reply():
    with pytest.raises(ValueError, match="unknown op 'dance'"):
        ask(FakeSession(), "dance")

    class Refusing(FakeSession):
        def logits(self, input_ids):
            raise InputError("too long")

    lines = io.StringIO('{"op": "logits", "input_ids": [1], "first": 0, "path": "x"}\n{"op": "exit"}\n{"op": "rss"}\n')
    replies = io.StringIO()
    serve_lines(Refusing(), {"load_s": 1.5}, lines, replies)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [
        {"ready": True, "load_s": 1.5},
        {"error": "too long", "exit_code": 2},
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell peak memory this way")
def test_peak_memory_grows_with_what_was_touched():
    code = """
        import numpy as np
        from slmdeploy.profiling.worker import peak_rss_bytes
        before = peak_rss_bytes()
        block = np.ones(before + (32 << 20), np.uint8)
        print(before, peak_rss_bytes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < before <= after - (32 << 20)


def start(tmp_path, body, timeout_s=60.0):
    """A worker process whose session is `FakeSession` unless ``body`` says otherwise."""
    script = tmp_path / "worker.py"
    header = """
        import os, sys, time
        from slmdeploy.errors import CorruptArtifactError, InputError
        from slmdeploy.profiling.worker import FakeSession, serve
    """
    script.write_text(textwrap.dedent(header) + textwrap.dedent(body))
    return WorkerProcess("fake", [sys.executable, str(script)], threads=1, timeout_s=timeout_s)


def test_process_answers_whatever_libraries_print(tmp_path):
    body = """
        print("loading, please wait")
        class Chatty(FakeSession):
            def score_ids(self, prefix_ids, item_ids):
                print("scoring"); os.write(1, b"from C\\n")
                return super().score_ids(prefix_ids, item_ids)
        serve(Chatty(), {"load_s": 0.25})
    """
    with start(tmp_path, body) as worker:
        assert worker.hello == {"ready": True, "load_s": 0.25}
        assert worker.ask("score", prefix_ids=[1], item_ids=[[3]])["label_logits"] == [[0, 3]]
        assert worker.ask("rss")["peak_bytes"] > 0
    worker.close()


def test_process_that_dies_shows_the_end_of_its_stderr(tmp_path):
    body = """
        class Dying(FakeSession):
            def logits(self, input_ids):
                sys.stderr.write("first\\nthe driver fell over\\n"); sys.stderr.flush(); os._exit(7)
        serve(Dying(), {"load_s": 0})
    """
    with (
        start(tmp_path, body) as worker,
        pytest.raises(ResourceError, match=r"ended during 'logits' with status 7: .*the driver fell over"),
    ):
        worker.ask("logits", input_ids=[1], first=0, path="x")


def test_process_killed_by_the_system_suggests_memory(tmp_path):
    body = """
        class Greedy(FakeSession):
            def logits(self, input_ids):
                os.kill(os.getpid(), 9)
        serve(Greedy(), {"load_s": 0})
    """
    with start(tmp_path, body) as worker, pytest.raises(ResourceError, match="most likely memory ran out"):
        worker.ask("logits", input_ids=[1], first=0, path="x")


def test_process_that_hangs_is_ended(tmp_path):
    body = """
        class Slow(FakeSession):
            def logits(self, input_ids):
                time.sleep(60)
        serve(Slow(), {"load_s": 0})
    """
    with (
        start(tmp_path, body, timeout_s=0.2) as worker,
        pytest.raises(ResourceError, match=r"did not answer 'logits' within 0\.2 s"),
    ):
        worker.ask("logits", input_ids=[1], first=0, path="x")


def test_process_reports_the_users_error_as_what_it_is(tmp_path):
    body = """
        from slmdeploy.profiling.worker import _say, error_reply
        _say(sys.stdout, error_reply(InputError("no such build")))
    """
    with pytest.raises(InputError, match="fake: no such build"):
        start(tmp_path, body)


def test_process_that_never_gets_ready(tmp_path):
    with pytest.raises(ResourceError, match=r"ended during 'load' with status 1: .*ModuleNotFoundError"):
        start(tmp_path, "import no_such_module")


def test_a_build_takes_options_and_the_baseline_the_label_words(tmp_path):
    build = build_command(tmp_path, ["--threads", "3"])
    assert build == [sys.executable, "-m", "slmdeploy.profiling.worker", str(tmp_path), "--threads", "3"]
    baseline = baseline_command(tmp_path, threads=3, labels=(" b", " a"))
    assert baseline[2:6] == ["slmdeploy.exporting.eager", str(tmp_path), "--threads", "3"]
    assert baseline[6:] == ["--label= b", "--label= a"]
