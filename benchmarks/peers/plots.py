"""Bar charts as SVG, written by hand: a few rectangles need no library, and the same results give the same bytes."""

from collections.abc import Sequence
from html import escape

from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.summary import Results

_DECODER = ("ttft_512", "decode_1", "balanced")
_ENCODER = ("encode_1", "encode_8")
_BAR, _GAP, _NAMES, _LENGTH, _NUMBERS, _TITLE = 14, 4, 190, 220, 70, 26
_OURS, _PEER = "#2266aa", "#b0b0b0"


def plot(results: Results, model: str) -> str:
    """One panel per case, best first, our builds in blue."""
    names = _DECODER if SHAPES[model].is_decoder else _ENCODER
    panels = [(case, _bars(results, model, case)) for case in CASES if case.name in names]
    panels = [(case, bars) for case, bars in panels if bars]
    width = len(panels) * (_NAMES + _LENGTH + _NUMBERS)
    height = _TITLE + max((len(bars) for _, bars in panels), default=0) * (_BAR + _GAP) + _GAP
    body = [
        line
        for place, (case, bars) in enumerate(panels)
        for line in _panel(results, case, bars, place * (_NAMES + _LENGTH + _NUMBERS))
    ]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([opening, *body, "</svg>", ""])


def _bars(results: Results, model: str, case: Case) -> list[tuple[str, float]]:
    found = [
        (engine, value) for engine in results.engines if (value := results.value(engine, model, case.name)) is not None
    ]
    return sorted(found, key=lambda bar: bar[1], reverse=case.better == "higher")


def _panel(results: Results, case: Case, bars: Sequence[tuple[str, float]], left: int) -> list[str]:
    longest = max(value for _, value in bars)
    better = f"{case.better} is better"
    lines = [f'<text x="{left + 8}" y="16" font-weight="bold">{escape(case.title)} ({case.unit}, {better})</text>']
    for row, (engine, value) in enumerate(bars):
        top = _TITLE + row * (_BAR + _GAP)
        colour = _OURS if results.engines[engine]["ours"] else _PEER
        length, start = max(1.0, value / longest * _LENGTH), left + _NAMES
        figure = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        lines += [
            f'<text x="{start - 6}" y="{top + 11}" text-anchor="end">{escape(engine)}</text>',
            f'<rect x="{start}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{start + length + 4:.1f}" y="{top + 11}">{figure}</text>',
        ]
    return lines
