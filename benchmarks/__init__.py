"""Benchmarks: ``python -m benchmarks`` from the repository's root. README.md says what they measure."""
