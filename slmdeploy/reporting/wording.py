"""How metrics and their values are written: a short title, a unit that suits the eye, few digits, intervals, ratios.

The exact number stands beside what is shown (an attribute of the page, a file), so rounding here loses nothing. Knows
names by their parts (`ttft_ms` and `_p99`) and nothing of where a value comes from.
"""

import re

from slmdeploy.metrics import RATIO

_TITLES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "End to end",
    "score_ms": "Score",
    "encode_ms": "Encode",
    "queue_ms": "Queue",
    "tokens_per_s": "Tokens",
    "items_per_s": "Items",
    "texts_per_s": "Texts",
    "requests_per_s": "Requests",
    "goodput_per_s": "Goodput",
    "rss_peak_bytes": "Peak memory",
    "kv_bytes": "KV cache",
    "load_s": "Load",
    "first_request_s": "First request",
    "size_bytes": "Size on disk",
    "energy_j_per_request": "Energy per request",
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity",
    "auc": "AUC",
    "auc_per_query": "AUC per query",
    "mrr_at_10": "MRR@10",
    "ndcg_at_10": "NDCG@10",
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "kl_to_baseline": "KL to baseline",
    "top1_agreement": "Top-1 agreement",
    "kl_to_fp32": "KL to fp32",
    "top1_to_fp32": "Top-1 to fp32",
    "cost_usd_per_million_requests": "Cost per million requests",
}
_PERCENTILE = re.compile(r"(.+)_p(50|90|95|99|999)")
_UNITS = (("_bytes", "MB"), ("_ms", "ms"), ("_per_s", "/s"), ("_s", "s"), ("_j_per_request", "J"))
GROUPS = ("Latency", "Throughput", "Memory, size and start", "Quality and the rest")


def base_of(metric: str) -> tuple[str, float | None]:
    """A metric without its percentile, and the percentile: ``ttft_ms_p999`` is (``ttft_ms``, 99.9)."""
    found = _PERCENTILE.fullmatch(metric)
    if not found:
        return metric, None
    return found[1], 99.9 if found[2] == "999" else float(found[2])


def title(metric: str) -> str:
    """``ttft_ms_p99`` is "TTFT p99"; a name that has no title is its own."""
    if metric.endswith(RATIO):
        return f"{title(metric.removesuffix(RATIO))} to baseline"
    base, percent = base_of(metric)
    name = _TITLES.get(base, base)
    return name if percent is None else f"{name} p{percent:g}"


def unit(metric: str) -> str:
    """The unit in which `amount` writes a value."""
    if metric.endswith(RATIO):
        return "×"
    base = base_of(metric)[0]
    return next((sign for ending, sign in _UNITS if base.endswith(ending)), "")


def in_unit(metric: str, value: float) -> float:
    """A value in the unit that it is shown in."""
    return value / 1e6 if unit(metric) == "MB" else value


def number(value: float, digits: int = 3) -> str:
    """Significant digits, whole numbers where those would be cut, a power of ten where zeros would have to be counted.

    >>> number(10.02), number(1234.5), number(0.00012)
    ('10.0', '1,234', '1.20e-04')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if size >= 10**digits - 0.5 * (digits > 2) else f"{value:#.{digits}g}".rstrip(".")


def figure(metric: str, value: float) -> str:
    """A value in its unit, without it: quality in four digits, because builds differ in the fourth."""
    return number(in_unit(metric, value), 4 if group(metric) == GROUPS[3] and not metric.endswith(RATIO) else 3)


def amount(metric: str, value: float) -> str:
    """A value with its unit."""
    shown, sign = figure(metric, value), unit(metric)
    if sign in ("", "×", "/s"):
        return shown + sign if sign != "×" else f"×{shown}"
    return f"{shown} {sign}"


def span(metric: str, interval: tuple[float, float] | None) -> str:
    """An interval without its unit; nothing where there is none."""
    if interval is None:
        return ""
    return " – ".join(figure(metric, end) for end in interval)


def seconds(value: float) -> str:
    """A duration as people say it: 0.4 s, 23 s, 7 min 15 s, 2 h 5 min."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def share(value: float) -> str:
    """A share in percent, with decimals only where it has them: 5 %, 0.5 %."""
    return f"{100 * value:g} %"


def group(metric: str) -> str:
    """Which part of the table a metric stands in, one of `GROUPS`."""
    base, percent = base_of(metric)
    if percent is not None:
        return GROUPS[0]
    if base.endswith("_per_s"):
        return GROUPS[1]
    return GROUPS[2] if base.endswith(("_bytes", "_s")) else GROUPS[3]
