"""The goals of the CPU builds as data and arithmetic: what was asked, what our best build does, by how much it misses.

Each goal is judged on medians. A ratio is "times as good": a time of 0.6 times the peer's is 1.67 times as good.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.cases import CASES, ITEMS
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.summary import Results, times_as_good

_CASE = {case.name: case for case in CASES}
DECODERS = ("qwen2.5-0.5b", "smollm2-135m")
Which = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Verdict:
    """One row: the model, what was asked, our build and its figure, whom it is compared with, and whether it is met."""

    model: str
    goal: str
    ours: str
    against: str
    figure: float | None
    wanted: float
    percent: bool = False

    @property
    def met(self) -> bool | None:
        """None where it could not be judged."""
        return None if self.figure is None else self.figure >= self.wanted


def verdicts(results: Results) -> Iterator[Verdict]:
    """All goals for all models that were measured."""
    for model in results.models:
        if model in DECODERS:
            yield from _prompt(results, model)
            yield from _decode(results, model)
            yield from _scoring(results, model)
            yield from _memory(results, model)
        elif not SHAPES[model].is_decoder:
            for name in ("encode_1", "encode_8", "encode_32"):
                goal = f"encoder, {_CASE[name].title}: ≥ 1.0× the best peer"
                yield _against(results, model, name, goal, 1.0, _ours(), _peers())


def _ours(bits: int | None = None) -> Which:
    return lambda engine: engine["ours"] and bits in (None, engine["weight_bits"])


def _peers(bits: int | None = None, *names: str) -> Which:
    return lambda engine: (
        not engine["ours"] and bits in (None, engine["weight_bits"]) and (not names or engine["name"].startswith(names))
    )


def _against(results: Results, model: str, case: str, goal: str, wanted: float, ours: Which, peers: Which) -> Verdict:
    own, other = (results.best(model, _CASE[case], which) for which in (ours, peers))
    figure = times_as_good(own[1], other[1], _CASE[case]) if own and other else None
    return Verdict(model, goal, own[0] if own else "–", other[0] if other else "none was run", figure, wanted)


def _of_limit(results: Results, model: str, case: str, goal: str, wanted: float, ours: Which) -> Verdict:
    own = results.best(model, _CASE[case], ours)
    figure = results.share_of_limit(own[0], model, case) if own else None
    return Verdict(model, goal, own[0] if own else "–", "the measured limit", figure, wanted, percent=True)


def _prompt(results: Results, model: str) -> Iterator[Verdict]:
    goal = "TTFT 512: ≤ 0.6× the best peer's time (≥ 1.67× as fast)"
    yield _against(results, model, "ttft_512", goal, 1 / 0.6, _ours(), _peers())
    yield _of_limit(results, model, "ttft_512", "TTFT 512: ≥ 65 % of the int8 peak", 0.65, _ours())
    goal = "512 in + 64 out: ≤ 0.7× the best peer's time (≥ 1.43× as fast)"
    yield _against(results, model, "balanced", goal, 1 / 0.7, _ours(), _peers())


def _decode(results: Results, model: str) -> Iterator[Verdict]:
    four = (("ik_llama.cpp", 1.1, "ik-"), ("llama.cpp", 1.2, "llamacpp"), ("onnxruntime-genai", 1.2, "genai"))
    for title, wanted, name in four:
        goal = f"decode, batch 1, 4 bit: ≥ {wanted}× {title}"
        yield _against(results, model, "decode_1", goal, wanted, _ours(4), _peers(4, name))
    goal = "decode, batch 1, 4 bit: ≥ 85 % of read bandwidth"
    yield _of_limit(results, model, "decode_1", goal, 0.85, _ours(4))
    goal = "decode, batch 1, 8 bit: ≥ 1.1× the best peer"
    yield _against(results, model, "decode_1", goal, 1.1, _ours(8), _peers(8))
    yield _against(results, model, "decode_8", "decode, batch 8: ≥ 1.3× the best peer", 1.3, _ours(), _peers())


def _scoring(results: Results, model: str) -> Iterator[Verdict]:
    cold = results.best(model, _CASE["score_cold"], _ours())
    naive = results.value(cold[0], model, "score_naive") if cold else None
    figure = cold[1] / naive if cold and naive else None
    name = cold[0] if cold else "–"
    yield Verdict(model, "score 512 + 32×16, cold: ≥ 10× naive", name, "the same build, naive", figure, 10.0)
    loops: Which = lambda engine: not engine["ours"] and engine["scoring"].endswith("one by one")  # noqa: E731
    goal = "score 512 + 32×16, hot: ≥ 2× a loop that reuses the prefix"
    yield _against(results, model, "score_hot", goal, 2.0, _ours(), loops)
    hot = results.best(model, _CASE["score_hot"], _ours())
    one = results.value(hot[0], model, "score_hot_one") if hot else None
    # 32 items within three times the time of one: 32 / hot rate <= 3 · one.
    figure = 3 * one / (ITEMS / hot[1] * 1e3) if hot and one else None
    goal = "score hot: 32 items in ≤ 3× the time of one"
    yield Verdict(model, goal, hot[0] if hot else "–", "3× its own time of one", figure, 1.0)


def _memory(results: Results, model: str) -> Iterator[Verdict]:
    for bits in (4, 8):
        goal = f"peak memory, {bits} bit: ≤ 1.1× the smallest peer (≥ 0.91× as small)"
        yield _against(results, model, "rss", goal, 1 / 1.1, _ours(bits), _peers(bits))
