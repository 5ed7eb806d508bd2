"""Bridges to training libraries, each imported by its own name: they need what the library itself does not."""
