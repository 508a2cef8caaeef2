"""Bars with their spread over seeds as SVG, written by hand: the same results give the same bytes."""

from collections.abc import Sequence
from html import escape

Bar = tuple[str, float, float]
"""Name, mean, and how far the seeds reach from it."""
_BAR, _GAP, _NAMES, _LENGTH, _NUMBERS, _TITLE, _PAD = 14, 4, 250, 260, 120, 28, 14


def panels(charts: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """One panel below the other, each with its own scale, shortest bar first."""
    width = _NAMES + _LENGTH + _NUMBERS
    height, body = 0, list[str]()
    for title, bars in charts:
        body += _panel(title, sorted(bars, key=lambda bar: bar[1]), height)
        height += _TITLE + len(bars) * (_BAR + _GAP) + _PAD
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([opening, *body, "</svg>", ""])


def _panel(title: str, bars: Sequence[Bar], top: int) -> list[str]:
    longest = max(mean + spread for _, mean, spread in bars)
    lines = [f'<text x="8" y="{top + 18}" font-weight="bold">{escape(title)}</text>']
    for row, (name, mean, spread) in enumerate(bars):
        y = top + _TITLE + row * (_BAR + _GAP)
        length, reach = (value / longest * _LENGTH for value in (mean, spread))
        middle = y + _BAR / 2
        lines += [
            f'<text x="{_NAMES - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_NAMES}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="#2266aa"/>',
            f'<line x1="{_NAMES + length - reach:.1f}" x2="{_NAMES + length + reach:.1f}" y1="{middle}" y2="{middle}" '
            'stroke="#111"/>',
            f'<text x="{_NAMES + length + reach + 5:.1f}" y="{y + 11}">{mean:.3f}</text>',
        ]
    return lines
