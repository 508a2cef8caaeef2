"""OpenVINO GenAI over what optimum-intel exports with nncf's weight compression, on the CPU plugin with its defaults.

The defaults include an 8-bit KV cache and, where the CPU has AMX, bfloat16 or 8-bit arithmetic between the layers.
Items are scored by its prefix cache: each is a prompt whose beginning the pipeline has seen.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import NotOffered, Rows


def versions(**options: Any) -> dict[str, str]:
    """Of the pipeline and the runtime under it."""
    return {name: version(name) for name in ("openvino-genai", "openvino")}


def prepare(checkpoint: Path, folder: Path, bits: int) -> None:
    """Export and compress as `optimum-cli export openvino --weight-format` does."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    sizes = json.loads((checkpoint / "config.json").read_text())
    # nncf wants a size of groups that divides every input; 128 is the usual one.
    group = 128 if sizes["hidden_size"] % 128 == sizes["intermediate_size"] % 128 == 0 else 64
    settings: dict[str, Any] = {"group_size": group, "ratio": 1.0, "sym": True} if bits == 4 else {}
    wanted = OVWeightQuantizationConfig(bits=bits, **settings)
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, quantization_config=wanted)
    model.save_pretrained(folder)


def open_engine(folder: Path, threads: int, **options: Any) -> "OpenvinoGenai":
    """Open an exported folder."""
    import openvino_genai

    return OpenvinoGenai(openvino_genai, folder, {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})


class OpenvinoGenai:
    """A pipeline without a prefix cache, and on first use another one with it."""

    def __init__(self, api: Any, folder: Path, settings: dict[str, int]) -> None:
        import openvino

        self._api, self._folder, self._settings, self._tensor = api, folder, settings, openvino.Tensor
        self._pipeline = api.LLMPipeline(str(folder), "CPU", **settings)
        self._caching: Any = None
        self._prefix: list[int] = []

    def _inputs(self, rows: Rows) -> Any:
        ids = np.array(rows, np.int64)
        return self._api.TokenizedInputs(self._tensor(ids), self._tensor(np.ones_like(ids)))

    def _config(self, new_tokens: int) -> Any:
        config = self._api.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        return config

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Seconds of each token since the start, from its streamer, which follows one row only.

        Of several rows the pipeline tells when each had its first token; the steps behind are given their mean time.
        """
        inputs, config = self._inputs(prompts), self._config(new_tokens)
        started, stamps = time.perf_counter(), []

        def told(_: object) -> Any:
            stamps.append(time.perf_counter() - started)
            return self._api.StreamingStatus.RUNNING

        if len(prompts) == 1:
            self._pipeline.generate(inputs, config, self._streamer(told))
            yield from stamps
            return
        result = self._pipeline.generate(inputs, config)
        total = time.perf_counter() - started
        first = max(result.perf_metrics.raw_metrics.m_times_to_first_token) / 1e6
        yield from (first + (total - first) * step / (new_tokens - 1) for step in range(new_tokens))

    def _streamer(self, told: Callable[[object], Any]) -> Any:
        """A streamer that gets token ids, so that nothing is turned into text."""

        class Streamer(self._api.StreamerBase):  # type: ignore[name-defined,misc]
            def write(self, token: object) -> Any:
                return told(token)

            def end(self) -> None:
                pass

        return Streamer()

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Have the prefix in the cache of blocks."""
        if self._caching is None:
            scheduler = self._api.SchedulerConfig()
            scheduler.enable_prefix_caching, scheduler.cache_size = True, 1
            self._caching = self._api.LLMPipeline(
                str(self._folder), "CPU", scheduler_config=scheduler, **self._settings
            )
        self._prefix = list(prefix)
        self._caching.generate(self._inputs([self._prefix]), self._config(1))

    def score(self, items: Rows) -> object:
        """All items as prompts that begin with the prefix, with the log-probability of one token behind each."""
        config = self._config(1)
        config.logprobs = 1
        return self._caching.generate(self._inputs([self._prefix + list(item) for item in items]), config).scores

    def encode(self, rows: Rows) -> object:
        """Encoders run in OpenVINO itself."""
        raise NotOffered("OpenVINO GenAI runs decoders; encoders are the engine openvino's")
