"""Losses that a refactoring must not change; `python -m tests.golden` records them for this torch and CPU."""
