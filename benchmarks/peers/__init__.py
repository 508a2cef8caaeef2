"""slmdeploy beside the engines that a user could pick instead: same weights, same machine, same rounds.

    shapes, checkpoints      the models: sizes from public configs, random weights, one checkpoint for all engines
    catalogue, engines/      the engines: how each is installed, given the checkpoint, and driven
    worker, cases            what is measured: the child's end and the parent's end
    rounds, limits, machine  the run: interleaved processes, one JSON line per cell, resumable
    summary, goals, report, plots   what comes of it: docs/performance.md

worker.py and engines/ run in the environments of the engines: they import the standard library, numpy and the engine.
"""
