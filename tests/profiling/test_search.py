"""The fastest options are found at small cost, and the build's own are kept unless others are faster by a margin."""

from contextlib import contextmanager

from slmdeploy.profiling.search import Options, search
from slmdeploy.profiling.worker import FakeSession
from slmdeploy.specs import Workload
from tests.profiling.fakes import Local

GENERATE = Workload(name="g", task="generate", prompt_tokens=300, new_tokens=4)
SCORE = Workload(name="s", task="score", prefix_tokens=8, items=4, item_tokens=2)


class Machine:
    """Opens sessions whose pace depends on the options; counts what it opened and what it was asked."""

    def __init__(self, pace):
        self.pace, self.opened, self.asked = pace, [], []

    @contextmanager
    def open(self, options):
        self.opened.append(options)
        factor = self.pace(options)
        session = FakeSession(prefill_s=0.01 * factor, step_s=0.001 * factor, item_s=0.002 * factor)
        yield Local(session, self.asked, options)


def run(pace, workloads=(GENERATE,), **fields):
    machine = Machine(pace)
    options = {"cores": 4, "cuts_prompts": True, "takes_batches": True, "vocab_size": 64, "seed": 0} | fields
    return search(machine.open, workloads, **options), machine


def test_threads_then_pieces_of_prompts():
    def pace(options):
        return (0.5 if options.threads == 2 else 1.0) * (0.8 if options.prefill_chunk == 128 else 1.0)

    found, machine = run(pace)
    assert (found.options.threads, found.options.prefill_chunk) == (2, 128)
    assert {one.threads for one in machine.opened} == {None, 1, 2, 4}
    costs = [entry["cost"] for entry in found.compared if entry["threads"] == 2 and entry["prefill_chunk"] is None]
    assert all(abs(cost - 0.5) < 1e-6 for cost in costs)


def test_a_gain_within_the_margin_changes_nothing():
    found, _ = run(lambda options: 0.97 if options.threads == 1 else 1.0)
    assert found.options == Options()


def test_the_slower_half_is_asked_no_more():
    _, machine = run(lambda options: float(options.threads or 3), cuts_prompts=False)
    requests = dict.fromkeys(machine.opened, 0)
    for options, _, _ in machine.asked:
        requests[options] += 1
    assert requests[Options(1, True)] > 2 * requests[Options(4, True)]


def test_only_long_prompts_of_builds_that_can_are_cut():
    assert all(one.prefill_chunk is None for one in run(lambda options: 1.0, [SCORE])[1].opened)
    assert all(one.prefill_chunk is None for one in run(lambda options: 1.0, cuts_prompts=False)[1].opened)
    assert {one.prefill_chunk for one in run(lambda options: 1.0)[1].opened} == {None, 0, 64, 128, 256}


def test_options_are_arguments_of_a_worker():
    assert Options().arguments() == []
    assert Options(2, False, 0).arguments() == ["--threads", "2", "--spinning", "0", "--prefill-chunk", "0"]


class Batching(FakeSession):
    """A step of up to eight rows takes as long as one of one; beyond that it takes longer in proportion."""

    def stream_batch_ids(self, prompts, *, slots, max_new_tokens, ignore_eos):
        for token in range(max_new_tokens):
            self.now += 0.001 * max(1.0, len(prompts) / 8)
            for row in range(len(prompts)):
                yield row, token


def test_the_batch_is_the_smallest_that_none_beats():
    @contextmanager
    def opened(options):
        yield Local(Batching(prefill_s=0.001, step_s=0.001), [], options)

    offline = GENERATE.model_copy(update={"scenario": "offline", "prompt_tokens": 8})
    shared = {"cores": 1, "cuts_prompts": True, "vocab_size": 64, "seed": 0}
    assert search(opened, [offline], takes_batches=True, **shared).options.batch == 8
    assert search(opened, [offline], takes_batches=False, **shared).options.batch is None
    assert search(opened, [GENERATE], takes_batches=True, **shared).options.batch is None
