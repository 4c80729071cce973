"""Defaults that the service's settings share with the trainer, which may not read the settings."""

PREFIX_CACHE_BYTES = 2 * 1024**3
"""Bound on the frozen prefix's cache on disk, bytes."""
