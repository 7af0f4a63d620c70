"""Settings: what the user chose, as small frozen values. The only reader of option strings, environment and /etc.

`-o` takes the words of mount(8), because that is how fstab and administrators write them, `share=` and
`passthrough=`.
"""

import enum
import os
import tempfile
from dataclasses import dataclass

from .errors import UsageError
from .rules import EVERYTHING, SharingRules

FUSE_CONFIGURATION = "/etc/fuse.conf"


class Share(enum.StrEnum):
    """How files of equal content come to share their bytes."""

    AUTO = "auto"  # reflink where the filesystem of the source can, else reference
    REFERENCE = "reference"
    REFLINK = "reflink"


class Passthrough(enum.StrEnum):
    """Whether the kernel reads and writes backing files without asking the daemon."""

    AUTO = "auto"  # where kernel, libfuse and rights allow it
    ON = "on"  # or the mount fails
    OFF = "off"


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What `-o` said. The defaults are those of an offline command, which mounts nothing."""

    share: Share = Share.AUTO
    passthrough: Passthrough = Passthrough.AUTO
    read_only: bool = False
    # Leave access times alone. The kernel keeps none for FUSE, so it is the daemon that has to open with O_NOATIME.
    noatime: bool = False
    # Let other users in (their rights are checked by the kernel). Always so for root, on request for a user.
    allow_other: bool = False
    # How fast a scrub reads, in units of 10^6 bytes a second; 0 sets no bound.
    scrub_rate_mb_s: int = 50
    # Which files never share.
    rules: SharingRules = EVERYTHING
    # What libfuse is told, one `-o` word each.
    fuse_words: tuple[str, ...] = ()


# Words that exclude each other: the last one given wins, as in mount(8).
_SWITCHES = (
    ("rw", "ro"),
    ("dev", "nodev"),
    ("suid", "nosuid"),
    ("exec", "noexec"),
    ("async", "sync"),
    ("atime", "noatime"),
)
_SWITCH_OF = {word: pair[0] for pair in _SWITCHES for word in pair}
# The first word of each pair is what happens anyway, except that libfuse mounts without devices and setuid unless told.
_PASSED_ON = ("ro", "dev", "suid", "noexec", "sync", "noatime")
_ROOT_ONLY = ("dev", "suid")

# Accepted, and nothing to do: access times follow the rules of the backing filesystem (libfuse 3.14 refuses these words
# at that), and the rest is meant for mount(8) and systemd.
_NO_EFFECT = ("relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime")
_FOR_OTHERS = ("defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev")

# The words that take a value.
_CHOICES: dict[str, type[Share] | type[Passthrough]] = {"share": Share, "passthrough": Passthrough}

_KNOWN = [
    *_SWITCH_OF,
    "dirsync",
    *_NO_EFFECT,
    "allow_other",
    *(f"{name}={choice}" for name, choices in _CHOICES.items() for choice in choices),
]


def parse_options(text: str, *, privileged: bool) -> MountOptions:
    """The meaning of an `-o` string, "" included. Raises UsageError.

    `privileged`: whether root mounts, who gets allow_other, devices and setuid as mount(8) gives them.
    """
    choices: dict[str, str] = {}
    chosen: dict[str, str] = {}
    allow_other = privileged
    dirsync = False
    for word in filter(None, text.split(",")):
        name, equals, value = word.partition("=")
        if name in _CHOICES and equals:
            if value not in list(_CHOICES[name]):
                raise UsageError(f"{name}={value} is unknown; use {name}={'|'.join(_CHOICES[name])}")
            if choices.setdefault(name, value) != value:
                raise UsageError(f"{name}={choices[name]} and {name}={value} contradict each other; give one")
        elif word in _SWITCH_OF:
            if word in _ROOT_ONLY and not privileged:
                raise UsageError(f"only root can mount with {word}; leave it out")
            chosen[_SWITCH_OF[word]] = word
        elif word == "allow_other":
            allow_other = True
        elif word == "dirsync":
            dirsync = True
        elif word not in _NO_EFFECT and word not in _FOR_OTHERS and not word.startswith("x-"):
            raise UsageError(f"mount option {word} is unknown; known are {', '.join(_KNOWN)}")
    if privileged:
        for word in _ROOT_ONLY:
            chosen.setdefault(word, word)
    words = ["default_permissions"]
    words += ["allow_other"] if allow_other else []
    words += [word for word in chosen.values() if word in _PASSED_ON]
    words += ["dirsync"] if dirsync else []
    return MountOptions(
        share=Share(choices.get("share", Share.AUTO)),
        passthrough=Passthrough(choices.get("passthrough", Passthrough.AUTO)),
        read_only=chosen.get("rw") == "ro",
        noatime=chosen.get("atime") == "noatime",
        allow_other=allow_other,
        fuse_words=tuple(words),
    )


def user_may_allow_other(configuration: str = FUSE_CONFIGURATION) -> bool:
    """Whether fusermount3 lets an ordinary user mount with allow_other."""
    try:
        with open(configuration, encoding="utf-8", errors="surrogateescape") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except FileNotFoundError:
        return False


def control_directory(*, uid: int) -> str:
    """Where the control sockets of this user's mounts are."""
    if uid == 0:
        return "/run/dedupfs"
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(os.path.abspath(runtime), "dedupfs")
    return os.path.join(os.path.abspath(tempfile.gettempdir()), f"dedupfs-{uid}")


def debugging() -> bool:
    """Whether the user wants to see the traceback of a bug."""
    return os.environ.get("DEDUPFS_DEBUG", "") not in ("", "0")
