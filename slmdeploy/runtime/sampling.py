"""Chooses the next token from a row of logits: greedy, or sampling with the usual filters, on plain numpy.

Order and meaning follow transformers' generation: repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k
(ties with the k-th stay), top-p (Holtzman et al. 2020: the smallest set whose probability reaches p), min-p (Nguyen et
al. 2024: at least min_p times the probability of the best). The best token always stays. Knows nothing of models or
text. The same seed and logits give the same tokens on every machine.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import CorruptArtifactError, InputError

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How to choose; temperature 0 is greedy and ignores the filters; top_k 0, top_p 1 and min_p 0 filter nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (sound, must) in checks.items():
            if not sound:
                raise InputError(f"{name} must be {must}, not {getattr(self, name)}.")


class Odds(NamedTuple):
    """The tokens that may be drawn, int64 [n], and their probabilities, float64 [n], of sum 1."""

    tokens: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    def of(self, token: int) -> float:
        """The probability of a token."""
        return float(self.probabilities[self.tokens == token].sum())


class Sampler:
    """Chooses token after token of one sequence; holds the random state and the tokens seen for the penalty."""

    def __init__(self, sampling: Sampling, prompt_ids: Iterable[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = dict.fromkeys(prompt_ids) if sampling.repetition_penalty != 1.0 else None

    def pick(self, logits: Logits) -> int:
        """The next token for float32 [vocab] logits, which are left as they are."""
        logits, token = self._weighed(logits)
        if self._sampling.temperature > 0:
            token = self.draw(distribution(logits, self._sampling))
        return self._noted(token)

    def odds(self, logits: Logits) -> Odds:
        """What `pick` would draw from, where temperature is above 0."""
        return distribution(self._weighed(logits)[0], self._sampling)

    def draw(self, odds: Odds) -> int:
        """A token by its odds."""
        mass = np.cumsum(odds.probabilities)
        spot = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(odds.tokens[min(int(spot), odds.tokens.size - 1)])

    def judge(self, logits: Logits, drafted: int, drawn_from: Odds | None) -> int:
        """The next token, distributed as that of `pick`, and `drafted` as often as that allows.

        `drafted` was drawn from `drawn_from` by someone else's random numbers: it stays with probability p / q at most
        1, else the token is drawn from max(0, p - q) (Leviathan et al. 2023, section 2.3). A draft without odds is
        certain of its token, and by the same rule the token is then what `pick` says.
        """
        if drawn_from is None or self._sampling.temperature == 0:
            return self.pick(logits)
        odds = self.odds(logits)
        if self._random.random() * drawn_from.of(drafted) < odds.of(drafted):
            return self._noted(drafted)
        return self._noted(self.draw(_excess(odds, drawn_from, logits.size)))

    def _weighed(self, logits: Logits) -> tuple[Logits, int]:
        """The logits under the penalty, and the most likely token."""
        if self._seen is not None:
            logits = penalised(logits, list(self._seen), self._sampling.repetition_penalty)
        token = int(logits.argmax())
        # argmax finds a NaN if there is one, so this looks at the whole row at the price of one comparison.
        if not math.isfinite(logits[token]):
            raise CorruptArtifactError("The model computes NaN or infinity; its weights are damaged: build it again.")
        return logits, token

    def _noted(self, token: int) -> int:
        if self._seen is not None:
            self._seen[token] = None
        return token


def penalised(logits: Logits, seen: list[int], penalty: float) -> Logits:
    """A copy in which the logits of seen tokens are divided by the penalty if positive, else multiplied by it."""
    result = logits.copy()
    old = result[seen]
    result[seen] = np.where(old > 0, old / penalty, old * penalty)
    return result


def _excess(wanted: Odds, drawn_from: Odds, vocab_size: int) -> Odds:
    """max(0, p - q) of sum 1; p itself where they differ by no more than rounding."""
    dense = np.zeros(vocab_size)
    dense[wanted.tokens] = wanted.probabilities
    dense[drawn_from.tokens] -= drawn_from.probabilities
    tokens = np.flatnonzero(dense > 0)
    return Odds(tokens, dense[tokens] / dense[tokens].sum()) if tokens.size else wanted


def distribution(logits: Logits, sampling: Sampling) -> Odds:
    """The tokens that pass temperature and filters, in no meaningful order."""
    scaled = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # near temperature 0 every token but the best has the weight 0
        scaled = (scaled - scaled.max()) / sampling.temperature
    if 0 < sampling.top_k < logits.size:
        # By the logits themselves: scaling may round two different ones to one value.
        tokens = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    else:
        tokens = np.arange(scaled.size)
    probabilities = np.exp(scaled[tokens])
    probabilities /= probabilities.sum()
    keep = nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else np.arange(tokens.size)
    # What a constraint forbids has the probability 0, and rounding in `draw` must not find it.
    keep = keep[probabilities[keep] >= max(sampling.min_p * probabilities.max(), np.finfo(np.float64).tiny)]
    return Odds(tokens[keep], probabilities[keep] / probabilities[keep].sum())


def nucleus(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Places of the smallest set of most probable tokens whose probabilities reach top_p; of equals the first.

    Tokens below (1 - top_p) / n have less than 1 - top_p together, so the others reach top_p and only they are sorted:
    a few hundred instead of a whole vocabulary.
    """
    likely = np.flatnonzero(probabilities >= (1 - top_p) / probabilities.size)
    likely = likely[np.argsort(-probabilities[likely], kind="stable")]
    mass = np.cumsum(probabilities[likely])
    return likely[: int(np.searchsorted(mass, top_p)) + 1]
