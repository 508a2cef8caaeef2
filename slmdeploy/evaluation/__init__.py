"""Tasks of EleutherAI's evaluation harness on a build: how likely continuations are, the harness' model, the verb."""
