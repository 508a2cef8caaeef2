"""slmdeploy beside the CPU engines that a user could pick instead: same weights and rounds; writes docs/performance.md.

    .venv/bin/python benchmarks/cpu_peers.py --quick                 a subset in ten minutes
    .venv/bin/python benchmarks/cpu_peers.py                         everything: hours, and the same command goes on
    .venv/bin/python benchmarks/cpu_peers.py --prepare-only          environments, checkpoints and builds, no measuring
    .venv/bin/python benchmarks/cpu_peers.py --report-only           the page again from the results

What is compared and how is said in benchmarks/peers/ and on the page itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.cli import app  # the path above is what finds it

if __name__ == "__main__":
    app()
