"""One module per engine, each with `prepare`, `open_engine` and `versions`, which worker.py calls."""
