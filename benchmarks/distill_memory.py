"""What the chunked loss and the cached teacher save: peak memory and time beside the plain forms, as ratios.

    python benchmarks/distill_memory.py                             prints and writes results/distill_memory.json
    python benchmarks/distill_memory.py --tokens 256 --rounds 1     smaller

Two comparisons. *Loss*: value and gradients of the forward KL between random hidden states under two heads, once with
whole logits and autograd, once by chunked.py; each in a process of its own, whose peak is VmHWM of Linux beyond what
was resident before. *Teacher*: forward and backward of a student over fixed rows with the teacher's model running, and
with its outputs read from disk; the cost of writing these is told in steps. The forms take turns, a figure is the
median of the rounds, and seconds are processor time of one thread: what else runs on the machine then matters little.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "distill_memory.json"


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def processor() -> str:
    """The name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def loss_once(form: str, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    """Memory beyond the inputs in bytes, and seconds, of one loss with its gradients."""
    import torch
    from torch.nn import functional

    from slmdeploy.compress.chunked import Positions, TeacherStates, chunked_loss
    from slmdeploy.compress.losses import Objective

    torch.manual_seed(0)
    states, its = (torch.randn(tokens, hidden) for _ in range(2))
    head, its_head = (torch.randn(vocabulary, hidden) / hidden**0.5 for _ in range(2))
    for learned in (states, head):
        learned.requires_grad_()
    labels, weights = torch.randint(vocabulary, (tokens,)), torch.full((tokens,), 1 / tokens)
    before, start = peak_bytes(), time.process_time()
    if form == "naive":
        log_q = functional.log_softmax(states @ head.T, -1)
        log_p = functional.log_softmax(its @ its_head.T, -1)
        total = functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / tokens
    else:
        side = TeacherStates(its, its_head)
        total = chunked_loss(Positions(states, labels, weights), head, side, Objective(), torch.float32).total
    total.backward()
    seconds = time.process_time() - start
    return {"bytes": peak_bytes() - before, "seconds": seconds, "loss": total.item()}


def compare_losses(tokens: int, vocabulary: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Both forms in turns, each run in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {"naive": [], "chunked": []}
    for _ in range(rounds):
        for form, found in runs.items():
            child = [sys.executable, __file__, "--child", form]
            sizes = ["--tokens", str(tokens), "--vocabulary", str(vocabulary), "--hidden", str(hidden)]
            found.append(json.loads(subprocess.run([*child, *sizes], check=True, capture_output=True).stdout))
    middle = {form: {k: statistics.median(run[k] for run in found) for k in found[0]} for form, found in runs.items()}
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": hidden,
        **middle,
        "memory_ratio": middle["chunked"]["bytes"] / middle["naive"]["bytes"],
        "time_ratio": middle["chunked"]["seconds"] / middle["naive"]["seconds"],
    }


def compare_teachers(rounds: int, top: int) -> dict[str, Any]:
    """One student's step with a teacher of 4.8 times its blocks' parameters, live and read from disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slmdeploy.compress.chunked import Positions, chunked_loss
    from slmdeploy.compress.losses import Objective
    from slmdeploy.compress.teachers import CachedTeacher, CachePlan, LiveTeacher, Row, keep
    from slmdeploy.progress import SILENT

    common = {"vocab_size": 16384, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**common, num_hidden_layers=12, intermediate_size=1024)).eval()
    student = LlamaForCausalLM(LlamaConfig(**common, num_hidden_layers=4, intermediate_size=512))
    live, rows, length = LiveTeacher(teacher.requires_grad_(False), teacher.lm_head.weight), 16, 256
    taken: list[Row] = [
        {
            "input_ids": torch.randint(16384, (length,)),
            "position_ids": torch.arange(length),
            "queries": torch.zeros(length, dtype=torch.int64),
            "weights": torch.full((length,), 1 / length),
            "is_text": torch.tensor(True),
        }
        for _ in range(rows)
    ]

    def step(batch: Row, look: Callable[..., Any]) -> None:
        counted = batch["weights"][:, 1:] > 0
        side = look(batch, counted)
        states = student.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1][counted]
        at = Positions(states, batch["input_ids"][:, 1:][counted], batch["weights"][:, 1:][counted])
        chunked_loss(at, student.lm_head.weight, side, Objective(), torch.float32).total.backward()

    with tempfile.TemporaryDirectory() as folder:
        plan, start = CachePlan(rows, top, 1.0, None), time.process_time()
        keep(Path(folder), iter(taken), live, plan, 4, SILENT)
        writing = time.process_time() - start
        cached = CachedTeacher(Path(folder), plan)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        stream = cached.rows(0)
        seconds: dict[str, list[float]] = {"live": [], "cached": []}
        for turn in range(rounds + 1):
            four = list(islice(stream, 4))
            batch = {name: torch.stack([row[name] for row in four]) for name in four[0]}
            for form, look in (("live", live.look), ("cached", cached.look)):
                start = time.process_time()
                step(batch, look)
                if turn > 0:  # the first one warms up
                    seconds[form].append(time.process_time() - start)
    middle = {form: statistics.median(found) for form, found in seconds.items()}
    return {
        "top": top,
        "seconds": middle,
        "time_ratio": middle["cached"] / middle["live"],
        "bytes_per_token": size / (rows * length),
        "writing_in_live_steps": writing / (rows / 4) / middle["live"],
    }


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--child", choices=["naive", "chunked"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(loss_once(given.child, given.tokens, given.vocabulary, given.hidden)))
        return
    result = {
        "machine": {"cpu": processor(), "torch": torch.__version__},
        "rounds": given.rounds,
        "loss": compare_losses(given.tokens, given.vocabulary, given.hidden, given.rounds),
        "teacher": compare_teachers(given.rounds, given.top),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
