"""What is wrong with a manifest as a whole."""

from __future__ import annotations


class ManifestError(ValueError):
    """A manifest that cannot be used at all: says which one, what is wrong with it and what would be right."""
