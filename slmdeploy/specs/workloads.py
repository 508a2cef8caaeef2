"""Workload: one kind of request and how requests arrive, and the shipped ones by name."""

from typing import Literal, Self

from pydantic import model_validator

from slmdeploy.specs.base import Positive, Spec


class Workload(Spec):
    """One kind of request and how requests arrive. Lengths are in tokens; ``items`` are candidates per request.

    ``texts`` are texts per request of an encoder, each of ``text_tokens``, special tokens among them.
    """

    name: str
    task: Literal["generate", "score", "embed", "classify"]
    scenario: Literal["single-stream", "offline"] = "single-stream"
    prompt_tokens: Positive | None = None
    new_tokens: Positive | None = None
    prefix_tokens: Positive | None = None
    items: Positive | None = None
    item_tokens: Positive | None = None
    texts: Positive | None = None
    text_tokens: Positive | None = None
    requests: Positive = 20

    @model_validator(mode="after")
    def _lengths_fit_the_task(self) -> Self:
        encode = ("texts", "text_tokens")
        needed = {
            "generate": ("prompt_tokens", "new_tokens"),
            "score": ("prefix_tokens", "items", "item_tokens"),
            "embed": encode,
            "classify": encode,
        }
        for name in dict.fromkeys(name for names in needed.values() for name in names):
            if (getattr(self, name) is not None) != (name in needed[self.task]):
                verb = "needs" if name in needed[self.task] else "does not take"
                raise ValueError(f"task = {self.task!r} {verb} {name}")
        return self


def _generate(prompt: int, new: int, scenario: Literal["single-stream", "offline"]) -> Workload:
    name = f"generate-{prompt}-{new}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task="generate", scenario=scenario, prompt_tokens=prompt, new_tokens=new)


def _score(prefix: int, items: int, length: int, scenario: Literal["single-stream", "offline"]) -> Workload:
    name = f"score-{prefix}-{items}x{length}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task="score", scenario=scenario, prefix_tokens=prefix, items=items, item_tokens=length)


def _encode(
    task: Literal["embed", "classify"], texts: int, length: int, scenario: Literal["single-stream", "offline"]
) -> Workload:
    size = f"{length}" if texts == 1 else f"{texts}x{length}"
    name = f"{task}-{size}" + ("-offline" if scenario == "offline" else "")
    return Workload(name=name, task=task, scenario=scenario, texts=texts, text_tokens=length)


WORKLOADS = {
    workload.name: workload
    for scenario in ("single-stream", "offline")
    for workload in (
        _generate(32, 32, scenario),
        _generate(128, 64, scenario),
        _generate(512, 64, scenario),
        _score(32, 10, 24, scenario),
        _score(512, 10, 16, scenario),
        _score(512, 32, 16, scenario),
        *(
            _encode(task, texts, length, scenario)
            for task in ("embed", "classify")
            for texts, length in ((1, 128), (8, 128), (32, 128), (1, 512))
        ),
    )
}
"""The shipped workloads by name; the longer ones have the shapes of arXiv 2502.14305's service."""
