"""Which sharing strategy is tried on which filesystem: by default all, by a mark only those that matter.

A test that asks for `mounts` or `mounted` runs once for each of FLAVOURS. Where the strategy makes no difference, one
flavour is enough, and `@ONE_FLAVOUR` says so.
"""

import pytest

FLAVOURS = [("reference", "ext4"), ("reference", "xfs"), ("reflink", "xfs")]


def flavours(*chosen: tuple[str, str]) -> pytest.MarkDecorator:
    """Run the test for these flavours only."""
    return pytest.mark.parametrize("mounts", chosen, indirect=True, ids=["-".join(flavour) for flavour in chosen])


# Where sharing plays no part. REFERENCE is the same, where it does.
ONE_FLAVOUR = flavours(("reference", "ext4"))
REFERENCE = flavours(("reference", "ext4"))
REFERENCES = flavours(("reference", "ext4"), ("reference", "xfs"))
BOTH_STRATEGIES = flavours(("reference", "ext4"), ("reflink", "xfs"))
