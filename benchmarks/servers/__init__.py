"""The servers of benchmarks/serving.py: how each is started, what load it gets, and the page that is made of it."""
