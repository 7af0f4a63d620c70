"""How many examples the property tests of parsers take: `DEDUPFS_FUZZ=N` multiplies them."""

import os

import hypothesis

FACTOR = int(os.environ.get("DEDUPFS_FUZZ", "1"))


def examples(count: int = 300) -> hypothesis.settings:
    """Decorates a property test; a profile's other settings stay."""
    return hypothesis.settings(max_examples=count * FACTOR)
