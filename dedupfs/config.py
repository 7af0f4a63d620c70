"""Settings: what the user chose, as small frozen values. The only reader of option strings, environment and /etc.

`-o` takes the words of mount(8), because that is how fstab and administrators write them, and words of our own with a
value. A TOML file (`config=FILE`, or that of a systemd instance) has the same names as keys, each optional; what `-o`
says wins. Every value knows where it came from.
"""

import enum
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from .claims import NamePattern
from .errors import UsageError
from .model import SMALLEST_SHARED_BYTES
from .quiet import NEVER, QuietHours, parse_spans
from .rules import SharingRules, is_glob

FUSE_CONFIGURATION = "/etc/fuse.conf"
CONFIGURATIONS = "/etc/dedupfs"


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
    scrub_rate_mb_s: float = 50
    # When work in the background waits, by local time.
    quiet: QuietHours = NEVER
    # How fast files are settled in the background, by their sizes, in units of 10^6 bytes a second; 0 sets no bound.
    settle_rate_mb_s: float = 0
    # How many processes describe pictures at a time; 0: as many as half of the processors, four at most.
    workers: int = 0
    # Which files never share; None: those that the last mount was told.
    rules: SharingRules | None = None
    # Folders whose versions of a photograph are held authoritative where nothing else decides, the first one first.
    prefer: tuple[bytes, ...] = ()
    # Finds in a file's name the number by which two files claim to be one photograph; "" for none (see `claims`).
    name_pattern: str = ""
    # Where metrics are told: the path of a socket, [HOST:]PORT, or "" for nowhere.
    metrics: str = ""
    # What libfuse is told, one `-o` word each.
    fuse_words: tuple[str, ...] = ()


# Words that exclude each other: the last one given wins, as in mount(8). The second is what the setting is called.
_SWITCHES = (
    ("rw", "ro"),
    ("dev", "nodev"),
    ("suid", "nosuid"),
    ("exec", "noexec"),
    ("async", "sync"),
    ("atime", "noatime"),
)
_SWITCH_OF = {word: (pair[1], word == pair[1]) for pair in _SWITCHES for word in pair}
_FLAGS = ("dirsync", "allow_other")  # have no opposite
# What libfuse is told as it is; without `dev` and `suid` it mounts without devices and setuid.
_PASSED_ON = ("ro", "noexec", "sync", "noatime", "dirsync")
_ROOT_ONLY = ("dev", "suid")

# Accepted, and nothing to do: access times follow the rules of the backing filesystem (libfuse 3.14 refuses these words
# at that), and the rest is meant for mount(8) and systemd.
_NO_EFFECT = ("relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime")
_FOR_OTHERS = ("defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev")

# The words that take one of some values, those that take another, and those that may be repeated.
_CHOICES: dict[str, type[Share] | type[Passthrough]] = {"share": Share, "passthrough": Passthrough}
_RATES = ("scrub_rate", "settle_rate")
_VALUES = {
    "min_size": "BYTES",
    **dict.fromkeys(_RATES, "MB/s"),
    "workers": "NUMBER",
    "metrics": "SOCKET|[HOST:]PORT",
    "name_pattern": "REGEX",
}
_LISTS = {"include": "GLOB", "exclude": "GLOB", "domain": "GLOB", "prefer": "DIR", "quiet": "HH:MM-HH:MM"}
_MOST_WORKERS = 64
_CONFIG = "config"

_KNOWN = [
    *_SWITCH_OF,
    "dirsync",
    *_NO_EFFECT,
    "allow_other",
    *(f"{name}={choice}" for name, choices in _CHOICES.items() for choice in choices),
    *(f"{name}={what}" for name, what in {**_VALUES, **_LISTS, _CONFIG: "FILE"}.items()),
]

# Where a file may say what is mounted where; the other keys of a file are the names of settings.
_PLACES = ("source", "mountpoint")

_DEFAULTS: dict[str, object] = {
    "share": "auto",
    "passthrough": "auto",
    **{pair[1]: False for pair in _SWITCHES},
    "dirsync": False,
    "allow_other": False,
    "min_size": SMALLEST_SHARED_BYTES,
    "include": (),
    "exclude": (),
    "domain": (),
    "prefer": (),
    "name_pattern": "",
    "quiet": (),
    "settle_rate": 0,
    "workers": 0,
    "scrub_rate": 50,
    "metrics": "",
}

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Setting:
    """The effective value of one setting, and who gave it: a file and its line, `-o`, or nobody (default)."""

    name: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """Everything that one mount was told. Places are None where only the command line can know them."""

    options: MountOptions
    settings: tuple[Setting, ...]
    source: str | None = None
    mountpoint: str | None = None


def parse_options(text: str, *, privileged: bool) -> MountOptions:
    """The meaning of an `-o` string, "" included. Raises UsageError.

    `privileged`: whether root mounts, who gets allow_other, devices and setuid as mount(8) gives them.
    """
    return read_configuration(text, privileged=privileged).options


def read_configuration(text: str, *, privileged: bool, file: str | None = None) -> Configuration:
    """What an `-o` string and a configuration file say together: the string wins. Raises UsageError.

    The file is the one given, or the one that `config=` in the string names.
    """
    given, named = _read_words(text)
    if file is not None and named is not None and os.path.realpath(file) != os.path.realpath(named):
        raise UsageError(f"{file} and config={named} contradict each other; give one")
    file = file or named
    found = {name: Setting(name, value, "default") for name, value in _DEFAULTS.items()}
    places: dict[str, str] = {}
    if file is not None:
        for setting in _read_file(file):
            if setting.name in _PLACES:
                places[setting.name] = str(setting.value)
            else:
                found[setting.name] = setting
    found |= {name: Setting(name, value, "-o") for name, value in given.items()}
    if privileged:
        if found["allow_other"].origin != "default" and not found["allow_other"].value:
            raise UsageError(
                f"{found['allow_other'].origin}: root's mounts always let others in; leave allow_other out"
            )
        found["allow_other"] = Setting("allow_other", True, "root")
    else:
        for word in _ROOT_ONLY:
            refused = found[f"no{word}"]
            if refused.origin != "default" and not refused.value:
                where = "" if refused.origin == "-o" else f"{refused.origin}: "
                raise UsageError(f"{where}only root can mount with {word}; leave it out")
            found[f"no{word}"] = Setting(f"no{word}", True, refused.origin if refused.value else "user")
    return Configuration(_options_of(found, privileged=privileged), tuple(found.values()), **places)


def _options_of(found: Mapping[str, Setting], *, privileged: bool) -> MountOptions:
    value = {name: setting.value for name, setting in found.items()}
    words = ["default_permissions"]
    words += ["allow_other"] if value["allow_other"] else []
    words += [word for word in _ROOT_ONLY if privileged and not value[f"no{word}"]]
    words += [word for word in _PASSED_ON if value[word]]
    include, exclude, domains, prefer = (
        tuple(dict.fromkeys(os.fsencode(glob) for glob in _strings(value[name])))
        for name in ("include", "exclude", "domain", "prefer")
    )
    try:
        quiet = parse_spans(_strings(value["quiet"]))
    except ValueError as error:  # of those of a file and of each word alone nothing is wrong
        raise UsageError(f"quiet: {error}") from None
    return MountOptions(
        share=Share(str(value["share"])),
        passthrough=Passthrough(str(value["passthrough"])),
        read_only=bool(value["ro"]),
        noatime=bool(value["noatime"]),
        allow_other=bool(value["allow_other"]),
        scrub_rate_mb_s=float(str(value["scrub_rate"])),
        settle_rate_mb_s=float(str(value["settle_rate"])),
        quiet=quiet,
        workers=int(str(value["workers"])),
        rules=SharingRules(
            min_size_bytes=int(str(value["min_size"])), include=include, exclude=exclude, domains=domains
        ),
        prefer=prefer,
        name_pattern=str(value["name_pattern"]),
        metrics=str(value["metrics"]),
        fuse_words=tuple(words),
    )


def _strings(value: object) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def _read_words(text: str) -> tuple[dict[str, object], str | None]:
    """The settings of an `-o` string, and the file that `config=` names."""
    given: dict[str, object] = {}
    config: str | None = None
    for word in filter(None, text.split(",")):
        name, equals, value = word.partition("=")
        if name == _CONFIG and equals:
            if config not in (None, value):
                raise UsageError(f"config={config} and config={value} contradict each other; give one")
            config = value
        elif name in _LISTS and equals:
            given[name] = (*_strings(given.get(name)), *_strings(_checked(name, [value])))
        elif (name in _CHOICES or name in _VALUES) and equals:
            checked = _checked(name, value)
            if given.setdefault(name, checked) != checked:
                raise UsageError(f"{name}={given[name]} and {name}={value} contradict each other; give one")
        elif word in _SWITCH_OF:
            setting, on = _SWITCH_OF[word]
            given[setting] = on
        elif word in _FLAGS:
            given[word] = True
        elif word not in _NO_EFFECT and word not in _FOR_OTHERS and not word.startswith("x-"):
            raise UsageError(f"mount option {word} is unknown; known are {', '.join(_KNOWN)}")
    return given, config


def _checked(name: str, value: object) -> object:
    """A value of a setting, from a word or a file, in its own type. Raises UsageError."""
    match name, value:
        case (("share" | "passthrough"), str()):
            if value not in list(_CHOICES[name]):
                raise UsageError(f"{name}={value} is unknown; use {name}={'|'.join(_CHOICES[name])}")
            return value
        case "min_size", _:
            return _bytes_of(value)
        case (("scrub_rate" | "settle_rate"), str() | int() | float()) if not isinstance(value, bool):
            try:
                rate = float(value)
            except ValueError:
                rate = math.nan
            if math.isfinite(rate) and 0 <= rate < 1e9:
                return rate
            raise UsageError(f"{name}={value} is no number of million bytes a second; 0 sets no bound")
        case "workers", str() | int() if not isinstance(value, bool):
            text = str(value)
            if text.isascii() and text.isdecimal() and len(text) < 4 and int(text) <= _MOST_WORKERS:
                return int(text)
            raise UsageError(f"workers={value} is no number from 1 to {_MOST_WORKERS}, or 0 for what fits the machine")
        case "quiet", list():
            try:
                parse_spans(str(span) for span in value)
            except ValueError as error:
                raise UsageError(f"quiet: {error}") from None
            return tuple(str(span) for span in value)
        case "metrics", str() | int() if not isinstance(value, bool):
            if not _is_address(str(value)):
                raise UsageError(f"metrics={value} is neither the absolute path of a socket nor [HOST:]PORT")
            return str(value)
        case (("include" | "exclude" | "domain"), list()):
            for glob in value:
                if not isinstance(glob, str) or not is_glob(glob):
                    raise UsageError(f"{name}: {glob!r} is no glob")
            return tuple(value)
        case "prefer", list():
            for folder in value:
                if not isinstance(folder, str) or not _is_folder(folder):
                    raise UsageError(f"prefer: {folder!r} is no directory relative to the source")
            return tuple(folder.rstrip("/") for folder in value)
        case "name_pattern", str():
            if value:
                NamePattern(value)
            return value
        case (("source" | "mountpoint"), str()):
            if not value.startswith("/"):
                raise UsageError(f"{name}: {value!r} is not an absolute path")
            return value
        case _, bool() if isinstance(_DEFAULTS.get(name), bool):
            return value
    kinds = {**dict.fromkeys((*_LISTS,), "a list of strings"), **dict.fromkeys((*_CHOICES, *_PLACES), "a string")}
    kinds |= {**dict.fromkeys(_RATES, "a number"), "workers": "a number", "metrics": "a string or a port"}
    kinds["name_pattern"] = "a string"
    raise UsageError(f"{name} is {kinds.get(name, 'true or false')}, not {value!r}")


def _bytes_of(value: object) -> int:
    text = str(value)
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "")
    if isinstance(value, bool) or not (number.isascii() and number.isdecimal()) or len(number) > 15:
        raise UsageError(f"min_size={text} is no number of bytes; a K, M or G may follow it")
    return int(number) * _UNITS.get(unit, 1)


def _is_address(text: str) -> bool:
    if text.startswith("/"):
        return True
    host, colon, port = text.rpartition(":")
    return port.isascii() and port.isdecimal() and 0 < int(port) < 65536 and bool(host) == bool(colon)


def _is_folder(text: str) -> bool:
    try:
        parts = os.fsencode(text.rstrip("/")).split(b"/")
    except UnicodeEncodeError:
        return False
    return all(part not in (b"", b".", b"..") and b"\0" not in part for part in parts)


def _read_file(path: str) -> list[Setting]:
    """The settings of a TOML file. Raises UsageError with file, line and reason."""
    text = ""
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(at[1]) if at else text.count("\n", 0, len(text.rstrip())) + 1
        raise UsageError(f"{path}:{line}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply") from None
    found = []
    for name, value in values.items():
        where = f"{path}:{_line_of(text, name)}"
        known = [*_PLACES, *_DEFAULTS]
        if name not in known:
            raise UsageError(f"{where}: {name!r} is unknown; known are {', '.join(known)}")
        try:
            found.append(Setting(name, _checked(name, value), where))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return found


def _line_of(text: str, name: str) -> int:
    """The line in which a top-level key (or table) of a valid TOML text is."""
    key = rf"""["']?{re.escape(name)}["']?"""
    found = re.search(rf"^[ \t]*(?:{key}[ \t]*[=.]|\[+[ \t]*{key}[ \t]*[\].])", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def instance_file(instance: str) -> str | None:
    """The configuration of an instance of the systemd unit, None when it has none. Raises UsageError."""
    if "/" in instance or instance in ("", ".", ".."):
        raise UsageError(
            f"{instance!r} is no name of an instance: it is that of a file in {CONFIGURATIONS}, without .toml"
        )
    path = os.path.join(CONFIGURATIONS, f"{instance}.toml")
    return path if os.path.lexists(path) else None


def instance_path(instance: str) -> str:
    """The path that an instance stands for where no configuration names another: as systemd-escape(1) --path."""
    raw = re.sub(
        rb"\\x([0-9a-fA-F]{2})", lambda found: bytes([int(found[1], 16)]), os.fsencode(instance).replace(b"-", b"/")
    )
    return "/" + os.fsdecode(raw).lstrip("/")


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


def cache_directory() -> str:
    """Where what can be computed again is kept for this user."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "dedupfs")


def notify_socket() -> str | None:
    """Where systemd waits to hear that a mount answers."""
    return os.environ.get("NOTIFY_SOCKET") or None


def debugging() -> bool:
    """Whether the user wants to see the traceback of a bug."""
    return os.environ.get("DEDUPFS_DEBUG", "") not in ("", "0")
