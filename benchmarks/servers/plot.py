"""A chart for each model and workload: the 99th percentile of a request's time against what a server got through.

A line per server, through its rates in order; to the right and low is better. Drawn by the report's own charts
(slmdeploy/reporting/svg.py). Pure functions of the results.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.servers.report import RATE, TITLES, WHOLE, family
from slmdeploy.reporting import svg
from slmdeploy.specs import named_workload

Cell = Mapping[str, Any]
_OURS = ("#1b5e9c", "#4a90d9", "#0b3a66", "#7fb2e5")
_PEERS = ("#c44e52", "#dd8452", "#55803f", "#8172b3", "#937860", "#8c8c8c")
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.middle{text-anchor:middle}.end{text-anchor:end}.rule{stroke:#ddd}"
    ".line{fill:none;stroke-width:2}.hit{fill:none}"
)


def charts(results: Mapping[str, Any], stem: str) -> dict[tuple[str, str], tuple[str, str]]:
    """By model and workload without its rate: the name of a file beside the page, and its SVG."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in results["cells"]:
        if f"{WHOLE[named_workload(cell['case']).task]}_p99" in cell.get("metrics", ()):
            groups.setdefault((cell["model"], family(cell["case"])), []).append(cell)
    ours = {name for name, one in results["servers"].items() if one["ours"]}
    return {key: (f"{stem}-{key[0]}-{key[1]}.svg", _chart(*key, cells, ours)) for key, cells in groups.items()}


def _chart(model: str, name: str, cells: Sequence[Cell], ours: set[str]) -> str:
    task = named_workload(cells[0]["case"]).task
    across, up = RATE[task], f"{WHOLE[task]}_p99"
    points = {
        engine: sorted((cell["metrics"][across], cell["metrics"][up]) for cell in cells if cell["engine"] == engine)
        for engine in dict.fromkeys(cell["engine"] for cell in cells)
    }
    everything = [point for found in points.values() for point in found]
    axes = (
        svg.axis(TITLES[across], [x for x, _ in everything]),
        svg.axis("p99 of a request (ms)", [y for _, y in everything], "log"),
    )
    drawn = svg.Plot(f"p99 of a request against {TITLES[across]}, {model}, {name}", *axes)
    rules = [_STYLE]
    for series, (engine, colour) in enumerate(_coloured(points, ours).items(), start=1):
        drawn.line(points[engine], series)
        for x, y in points[engine]:
            drawn.mark(x, y, series, f"{engine}: {x:,.0f} {TITLES[across]} at a p99 of {y:,.0f} ms", area=0.5)
        # Colours go by data-series: the classes of svg.py belong to the report's page.
        rules.append(f"[data-series='{series}'].line{{stroke:{colour}}}[data-series='{series}'].mark{{fill:{colour}}}")
        legend = svg.text(drawn.root, svg.LEFT + 8, svg.TOP + 10 + 13 * (series - 1), f"— {engine}", "start")
        legend.set("style", f"fill:{colour}")
    style = ET.Element("style")
    style.text = "".join(rules)
    drawn.root.insert(0, style)
    drawn.root.insert(1, ET.Element("rect", {"width": "100%", "height": "100%", "fill": "white"}))
    drawn.root.set("xmlns", "http://www.w3.org/2000/svg")
    return drawn.xml() + "\n"


def _coloured(points: Mapping[str, Any], ours: set[str]) -> dict[str, str]:
    """Blues for ours, other colours for the peers, round again where there are more."""
    peers = [name for name in points if name not in ours]
    own = [name for name in points if name in ours]
    found = {name: _OURS[at % len(_OURS)] for at, name in enumerate(own)}
    return found | {name: _PEERS[at % len(_PEERS)] for at, name in enumerate(peers)}
