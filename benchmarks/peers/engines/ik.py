"""ik_llama.cpp by its own llama-bench, each measurement a process of its own: it has no Python bindings.

Takes the GGUF files that llama.cpp's engine wrote and repacks them while loading (`-rtr 1`: Q4_0 becomes Q4_0_R8, Q8_0
becomes Q8_0_R8); flash attention on, KV in float16. What llama-bench times is the engine's work without sampling.
"""

import hashlib
import json
import resource
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.peers.engines.llamacpp import FILE
from benchmarks.peers.protocol import NotOffered, Rows

_PROGRAM = Path("bin") / "llama-bench"


def versions(build: str, source: str) -> dict[str, str]:
    """The first digits of the program's hash: it was compiled without the history that its version comes from."""
    program = (Path(build) / _PROGRAM).read_bytes()
    return {"ik_llama.cpp, llama-bench of sha256": hashlib.sha256(program).hexdigest()[:12]}


def prepare(checkpoint: Path, folder: Path, build: str, source: str) -> None:
    """Share llama.cpp's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    (folder / FILE).hardlink_to(folder.parent / source / FILE)


def open_engine(folder: Path, threads: int, build: str, source: str) -> "Ik":
    """Nothing is open between measurements."""
    return Ik(Path(build) / _PROGRAM, folder / FILE, threads)


class Ik:
    """A program and a file."""

    stays_open = False
    """Each measurement opens the file anew, so there is no load time to tell."""

    def __init__(self, program: Path, file: Path, threads: int) -> None:
        self._command = [str(program), "-m", str(file), "-t", str(threads), "-fa", "1", "-rtr", "1", "-o", "json"]

    def _seconds(self, *arguments: str) -> float:
        """What the last test of one llama-bench took on average, one repetition after its own warm-up."""
        done = subprocess.run([*self._command, "-r", "1", *arguments], capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout)[-1]["avg_ns"]) / 1e9

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """The prompt in one test, the tokens behind it in another; each token is given the mean time."""
        if len(prompts) > 1:
            raise NotOffered("llama-bench runs one sequence")
        length = len(prompts[0])
        first = self._seconds("-p", str(length), "-n", "0")
        yield first
        if new_tokens > 1:
            rest = self._seconds("-p", "0", "-n", "0", "-gp", f"{length},{new_tokens - 1}")
            yield from (first + rest * step / (new_tokens - 1) for step in range(1, new_tokens))

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """llama-bench has no prefixes."""
        raise NotOffered("llama-bench does not score")

    def score(self, items: Rows) -> object:
        """llama-bench has no items."""
        raise NotOffered("llama-bench does not score")

    def encode(self, rows: Rows) -> object:
        """It runs decoders."""
        raise NotOffered("ik_llama.cpp is driven for decoders only")

    def peak_rss_bytes(self) -> int:
        """The largest llama-bench so far."""
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
