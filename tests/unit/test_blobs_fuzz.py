"""Whatever a file among the blobs is called: it is the name of one content, or of none."""

import os
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from dedupfs.backing import Backing
from dedupfs.blobs import Blobs, parse_name
from dedupfs.store import Store
from tests.support.filesystems import remove_tree
from tests.support.fuzz import examples

HEX = "0123456789abcdef"
digests = st.text(HEX, min_size=30, max_size=34)
nearly = st.builds(
    "{}{}{}".format, digests, st.sampled_from([".", "", "..", ". ", "．"]), st.text("0123456789+-_ x٣", max_size=7)
)
any_name = st.binary(min_size=1, max_size=60).filter(lambda name: name not in (b".", b"..") and not {0, 47} & set(name))


@examples()
@given(st.one_of(nearly, st.text(max_size=60)))
@example("00" * 16 + ".0")
@example("00" * 16 + ".65536")
@example("00" * 16 + ".٣")
def test_a_name_is_one_contents_or_none(name: str) -> None:
    content = parse_name(name)
    if content is not None:
        assert content.name == name
        assert parse_name(content.name) == content
        assert Blobs.path(content).endswith(os.fsencode(f"/{name[:2]}/{name}"))


@examples(30)
@given(names=st.lists(any_name, max_size=6, unique=True), directory=any_name)
def test_listing_passes_over_what_is_no_blob(tmp_path: Path, names: list[bytes], directory: bytes) -> None:
    backing = Backing(str(tmp_path))
    try:
        with Store(backing):
            blobs = Blobs(backing)
            place = os.fsencode(tmp_path) + b"/.dedupfs/blobs/"
            for folder in (b"", b"00/", directory + b"/"):
                os.makedirs(place + folder, exist_ok=True)
                for name in names:
                    if not os.path.lexists(place + folder + name):
                        os.close(os.open(place + folder + name, os.O_CREAT | os.O_WRONLY))
            real = place + b"00/" + b"00" * 16 + b".7"
            os.close(os.open(real, os.O_CREAT | os.O_WRONLY))
            found = [content.name for content, _ in blobs.list()]
        assert found.count("00" * 16 + ".7") == 1
        assert all(parse_name(name) is not None for name in found)
    finally:
        backing.close()
        remove_tree(tmp_path / ".dedupfs")
