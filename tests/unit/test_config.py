"""`-o` strings mean what mount(8) says they mean, and everything else is refused in one helpful line."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# -- files


def told(tmp_path: Path, text: str, options: str = "", *, privileged: bool = True) -> config.Configuration:
    file = tmp_path / "some.toml"
    file.write_text(text, encoding="utf-8")
    return config.read_configuration(options, privileged=privileged, file=str(file))


def origins(configuration: config.Configuration) -> dict[str, tuple[object, str]]:
    return {
        setting.name: (setting.value, setting.origin.rpartition("/")[2])
        for setting in configuration.settings
        if setting.origin != "default"
    }


EVERY_KEY = """\
# all there are
source = "/srv/private"
mountpoint = "/srv/photos"
share = "reference"
"passthrough" = "off"
ro = true
noatime = true
nodev = true
nosuid = true
noexec = true
sync = true
dirsync = true
min_size = "64K"
include = ["permits/"]
exclude = ["*.tmp", "a,b"]
prefer = ["originals/", "scans/2026"]
name_pattern = '(\\d{4,6})'
domain = ["police/", "agencies/*"]
quiet = ["08:00-12:00", "13:00-18:00"]
settle_rate = 20
workers = 3
scrub_rate = 2.5
metrics = 9100
allow_other = true
"""


def test_every_key(tmp_path: Path) -> None:
    configuration = told(tmp_path, EVERY_KEY)
    options = configuration.options
    assert (configuration.source, configuration.mountpoint) == ("/srv/private", "/srv/photos")
    assert (options.share, options.passthrough.value, options.read_only) == (Share.REFERENCE, "off", True)
    assert options.rules is not None
    assert (options.rules.min_size_bytes, options.rules.exclude) == (65536, (b"*.tmp", b"a,b"))
    assert options.rules.domains == (b"police/", b"agencies/*")
    assert (options.scrub_rate_mb_s, options.metrics) == (2.5, "9100")
    assert (options.prefer, options.name_pattern) == ((b"originals", b"scans/2026"), r"(\d{4,6})")
    assert (options.settle_rate_mb_s, options.workers) == (20, 3)
    assert [options.quiet.until(hour, 30) for hour in (7, 8, 12, 13)] == ["", "12:00", "", "18:00"]
    assert sorted(options.fuse_words) == [
        *("allow_other", "default_permissions", "dirsync", "noatime", "noexec", "ro", "sync"),
    ]
    known = origins(configuration)
    assert known["share"] == ("reference", "some.toml:4")
    assert known["passthrough"] == ("off", "some.toml:5")
    assert set(EVERY_KEY.replace('"', "").split()) >= set(known)
    assert len(known) == len(configuration.settings)


def test_options_win(tmp_path: Path) -> None:
    text = 'share = "reference"\nro = true\nexclude = ["*.tmp"]\n'
    configuration = told(tmp_path, text, "rw,exclude=x/,exclude=*.bak,noatime")
    assert not configuration.options.read_only
    assert origins(configuration) == {
        "share": ("reference", "some.toml:1"),
        "ro": (False, "-o"),
        "exclude": (("x/", "*.bak"), "-o"),
        "noatime": (True, "-o"),
        "allow_other": (True, "root"),
    }


def test_quiet_hours_of_several_words() -> None:
    options = parse_options("quiet=08:00-12:00,quiet=13:00-18:00", privileged=True)
    assert options.quiet.until(12, 0) == ""
    with pytest.raises(UsageError, match="no time of the day is left"):
        parse_options("quiet=00:00-12:00,quiet=12:00-24:00", privileged=True)


def test_a_file_named_in_the_options(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("noatime = true")
    assert parse_options(f"config={file}", privileged=True).noatime
    with pytest.raises(UsageError, match="contradict"):
        config.read_configuration(f"config={file}", privileged=True, file="/another")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        parse_options(f"config={tmp_path}/absent", privileged=True)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("ro = true\nfrob = 1", 2, "'frob' is unknown; known are source, mountpoint, share"),
        ("\n\nshare = 'hardlink'", 3, "use share=auto|reference|reflink"),
        ("share = true", 1, "share is a string, not True"),
        ("ro = 1", 1, "ro is true or false, not 1"),
        ("ro = 'yes'", 1, "true or false"),
        ("[ro]\nx = 1", 1, "true or false"),
        ("min_size = -1", 1, "no number of bytes"),
        ("min_size = '1T'", 1, "K, M or G"),
        ("min_size = true", 1, "no number of bytes"),
        ("scrub_rate = -1", 1, "0 sets no bound"),
        ("settle_rate = 'fast'", 1, "settle_rate=fast is no number"),
        ("workers = 1.5", 1, "workers is a number"),
        ("workers = -1", 1, "from 1 to 64"),
        ("workers = 65", 1, "from 1 to 64"),
        ("workers = true", 1, "workers is a number"),
        ("quiet = '08:00-18:00'", 1, "quiet is a list of strings"),
        ("quiet = [8]", 1, "8 is no time of the day"),
        ("ro = true\nquiet = ['00:00-24:00']", 2, "no time of the day is left"),
        ("scrub_rate = nan", 1, "million bytes"),
        ("scrub_rate = []", 1, "a number"),
        ("exclude = 'x'", 1, "a list of strings"),
        ("\nexclude = [1]", 2, "1 is no glob"),
        ("exclude = ['']", 1, "no glob"),
        ("exclude = ['[z-a]']", 1, "no glob"),
        ("prefer = ['/srv']", 1, "relative to the source"),
        ("prefer = ['a/../b']", 1, "relative to the source"),
        ("prefer = ['']", 1, "relative to the source"),
        ("prefer = 'x'", 1, "a list of strings"),
        ("name_pattern = '('", 1, "no regular expression: missing )"),
        ("name_pattern = 'a'", 1, "0 groups"),
        ("name_pattern = 7", 1, "a string"),
        ("metrics = 0", 1, "PORT"),
        ("metrics = 'host:'", 1, "PORT"),
        ("source = 'relative'", 1, "absolute"),
        ("ro = true\nro = false", 2, ""),
        ("ro = ", 1, ""),
        ("allow_other = false", 1, "root's mounts always"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        told(tmp_path, text)
    message = str(refusal.value)
    assert reason in message
    assert "\n" not in message
    assert message.startswith(f"{tmp_path}/some.toml:")
    assert f"some.toml:{line}: " in message


def test_what_only_root_may(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"some\.toml:1: only root can mount with dev"):
        told(tmp_path, "nodev = false", privileged=False)
    assert told(tmp_path, "nosuid = true", privileged=False).options.fuse_words == ("default_permissions",)


@given(st.binary(max_size=200))
def test_any_bytes_are_settings_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    file.write_bytes(raw)
    with contextlib.suppress(UsageError):
        config.read_configuration("", privileged=True, file=str(file))


@given(st.text(max_size=80))
def test_any_options_are_settings_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_options(text, privileged=True)


@pytest.mark.parametrize(
    ("instance", "path"),
    [
        ("srv-photos", "/srv/photos"),
        (r"srv-my\x2dphotos", "/srv/my-photos"),
        (r"caf\xc3\xa9", "/café"),
        ("-", "/"),
    ],
)
def test_the_path_of_an_instance(instance: str, path: str) -> None:
    assert config.instance_path(instance) == path


@pytest.mark.parametrize("instance", ["", "..", "a/b"])
def test_no_instance(instance: str) -> None:
    with pytest.raises(UsageError):
        config.instance_file(instance)


def test_the_file_of_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONFIGURATIONS", str(tmp_path))
    assert config.instance_file("archive") is None
    (tmp_path / "archive.toml").touch()
    assert config.instance_file("archive") == str(tmp_path / "archive.toml")
