"""Benchmarks: ``python -m benchmarks.execution`` from the repository's root. README.md says what they measure."""
