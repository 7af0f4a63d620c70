"""`-o` strings mean what mount(8) says they mean, and everything else is refused in one helpful line."""

import dataclasses
from pathlib import Path

import pytest

from dedupfs import config
from dedupfs.config import MountOptions, Share, parse_options
from dedupfs.errors import UsageError


def words(text: str, *, privileged: bool = True) -> list[str]:
    return sorted(parse_options(text, privileged=privileged).fuse_words)


def test_defaults_of_root() -> None:
    options = parse_options("", privileged=True)
    assert (options.share, options.read_only, options.noatime, options.allow_other) == (Share.AUTO, False, False, True)
    assert sorted(options.fuse_words) == ["allow_other", "default_permissions", "dev", "suid"]


def test_defaults_of_a_user() -> None:
    options = parse_options("", privileged=False)
    assert not options.allow_other
    assert options.fuse_words == ("default_permissions",)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MountOptions().read_only = True  # type: ignore[misc]


@pytest.mark.parametrize("choice", list(Share))
def test_share(choice: Share) -> None:
    assert parse_options(f"share={choice}", privileged=True).share is choice


@pytest.mark.parametrize(
    ("text", "passed_on"),
    [
        ("ro", ["ro"]),
        ("rw", []),
        ("noexec", ["noexec"]),
        ("exec", []),
        ("noatime", ["noatime"]),
        ("sync", ["sync"]),
        ("async,dirsync", ["dirsync"]),
        ("allow_other", ["allow_other"]),
        ("nodev,nosuid", []),
        ("atime,relatime,strictatime,nodiratime,diratime", []),
        ("defaults,auto,noauto,user,nofail,_netdev,x-systemd.automount,x-gvfs-show", []),
        (",,ro,", ["ro"]),
    ],
)
def test_words_for_libfuse(text: str, passed_on: list[str]) -> None:
    assert words(text, privileged=False) == sorted(["default_permissions", *passed_on])


@pytest.mark.parametrize(
    ("text", "left"),
    [("nodev", ["suid"]), ("nosuid", ["dev"]), ("nosuid,nodev", []), ("nodev,dev", ["dev", "suid"])],
)
def test_root_gets_devices_and_setuid_unless_told(text: str, left: list[str]) -> None:
    assert words(text) == sorted(["allow_other", "default_permissions", *left])


@pytest.mark.parametrize(
    ("text", "read_only"), [("ro", True), ("rw", False), ("rw,ro", True), ("ro,rw", False), ("defaults,ro", True)]
)
def test_the_last_of_two_opposites_wins(text: str, *, read_only: bool) -> None:
    options = parse_options(text, privileged=True)
    assert options.read_only is read_only
    assert ("ro" in options.fuse_words) is read_only


@pytest.mark.parametrize(("text", "noatime"), [("noatime", True), ("noatime,atime", False), ("relatime", False)])
def test_noatime_is_told_to_the_daemon(text: str, *, noatime: bool) -> None:
    assert parse_options(text, privileged=True).noatime is noatime


@pytest.mark.parametrize("text", ["frob", "share", "ro=1", "noatime=", "RO", "allow_root", " ro", "subtype=x"])
def test_unknown_words_are_refused_with_the_known(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_options(text, privileged=True)
    line = str(refusal.value)
    assert "\n" not in line
    for known in ("ro", "nodev", "noatime", "allow_other", "share=reflink"):
        assert known in line.replace(",", "").split()


@pytest.mark.parametrize("text", ["share=", "share=hardlink", "share=reflink,share=reference", "ro,share=auto=1"])
def test_share_is_one_known_choice(text: str) -> None:
    with pytest.raises(UsageError, match="share="):
        parse_options(text, privileged=True)


def test_share_may_be_repeated() -> None:
    assert parse_options("share=reflink,share=reflink", privileged=True).share is Share.REFLINK


@pytest.mark.parametrize("word", ["dev", "suid"])
def test_a_user_cannot_have_devices_or_setuid(word: str) -> None:
    with pytest.raises(UsageError, match=f"only root.*{word}"):
        parse_options(word, privileged=False)


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        ("user_allow_other\n", True),
        ("# comment\nmount_max = 100\n user_allow_other \n", True),
        ("#user_allow_other\n", False),
        ("", False),
        ("caf\udce9\n", False),
    ],
)
def test_user_may_allow_other(tmp_path: Path, content: str, *, allowed: bool) -> None:
    file = tmp_path / "fuse.conf"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert config.user_may_allow_other(str(file)) is allowed


def test_without_fuse_conf_users_may_not_allow_other(tmp_path: Path) -> None:
    assert not config.user_may_allow_other(str(tmp_path / "absent"))


def test_control_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert config.control_directory(uid=0) == "/run/dedupfs"
    assert config.control_directory(uid=1000) == "/run/user/1000/dedupfs"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    directory = config.control_directory(uid=1000)
    assert directory.startswith("/")
    assert directory.endswith("/dedupfs-1000")


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_debugging(monkeypatch: pytest.MonkeyPatch, value: str | None, *, wanted: bool) -> None:
    monkeypatch.delenv("DEDUPFS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("DEDUPFS_DEBUG", value)
    assert config.debugging() is wanted
