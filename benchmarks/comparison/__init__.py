"""The comparison of compression methods that benchmarks/compression.py runs and docs/compression.md shows."""
