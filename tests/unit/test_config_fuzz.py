"""Whatever is said after `-o`: it is understood, or refused."""

from hypothesis import given
from hypothesis import strategies as st

from dedupfs import config
from dedupfs.config import MountOptions, Passthrough, Share, parse_options
from dedupfs.errors import UsageError
from tests.support.fuzz import examples

WORDS = [*config._KNOWN, *config._FOR_OTHERS, "x-systemd.automount", "share=", "passthrough", "ro=1", "=", "", "\0"]
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))

# What may stand behind libfuse's -o: anything else could mean something to libfuse or to the kernel.
PASSED_ON = {"default_permissions", "allow_other", "ro", "dev", "suid", "noexec", "sync", "noatime", "dirsync"}


def understood(text: str, *, privileged: bool) -> MountOptions | None:
    try:
        options = parse_options(text, privileged=privileged)
    except UsageError:
        return None
    assert set(options.fuse_words) <= PASSED_ON
    assert len(set(options.fuse_words)) == len(options.fuse_words)
    assert ("ro" in options.fuse_words) is options.read_only
    assert options.share in Share
    assert options.passthrough in Passthrough
    assert privileged or not {"dev", "suid"} & set(options.fuse_words)
    assert "default_permissions" in options.fuse_words  # the kernel checks rights, whatever was said
    return options


@examples()
@given(st.text(), st.booleans())
def test_any_text(text: str, privileged: bool) -> None:
    understood(text, privileged=privileged)


@examples()
@given(st.lists(words, max_size=8), st.booleans())
def test_any_words(chosen: list[str], privileged: bool) -> None:
    text = ",".join(chosen)
    options = understood(text, privileged=privileged)
    # saying it twice says no more
    again = understood(f"{text},{text}", privileged=privileged)
    assert again == options
