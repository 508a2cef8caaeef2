"""Measuring builds on this machine: speed and quality in one table, candidates interleaved, the machine recorded."""
