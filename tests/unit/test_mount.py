"""What a mount answers on its socket, and how it reads what others told it. Real mounts are in tests/mount/."""

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from dedupfs import mount, unmount
from dedupfs.engine import Engine
from dedupfs.errors import SourceError, Unavailable, UsageError
from dedupfs.model import Progress
from tests.support.mounted import REPOSITORY
from tests.support.tools import needs_root


class Recorder:
    """In the engine's place: remembers the paths it is given."""

    def __init__(self) -> None:
        self.paths: list[bytes | None] = []

    def restore(self, paths: list[bytes], _progress: Progress, *, dry_run: bool = False) -> dict[str, object]:
        self.paths += paths
        return {"dry_run": dry_run}

    def scrub(self, _progress: Progress, rate_mb_s: float | None = None) -> dict[str, object]:
        return {"rate": rate_mb_s}

    def duplicates(self, path: bytes | None) -> object:
        self.paths.append(path)
        return []


def no_progress(_phase: str, _done: int, _total: int | None) -> None:
    pass


@pytest.fixture
def engine() -> Recorder:
    return Recorder()


def ask(engine: Recorder, command: str, **arguments: object) -> object:
    return mount.commands(cast(Engine, engine))[command](arguments, no_progress)


def test_paths_reach_the_engine_as_bytes(engine: Recorder) -> None:
    ask(engine, "restore", paths=["", "a", os.fsdecode(b"caf\xe9/..b/.dedupfs"), " \n"])
    ask(engine, "restore")
    ask(engine, "duplicates", path="a/b")
    ask(engine, "duplicates", path=None)
    ask(engine, "duplicates")
    assert engine.paths == [b"", b"a", b"caf\xe9/..b/.dedupfs", b" \n", b"a/b", None, None]


@pytest.mark.parametrize(
    "path", ["/", "/etc", "..", "a/../../b", "./a", "a//b", "a/", "a\0b", "\ud800", 1, ["a"], {"a": 1}, True]
)
def test_what_is_no_path_in_the_mount_is_refused(engine: Recorder, path: object) -> None:
    with pytest.raises(UsageError):
        ask(engine, "duplicates", path=path)
    with pytest.raises(UsageError):
        ask(engine, "restore", paths=["a", path])
    assert not engine.paths


def test_one_path_is_no_list(engine: Recorder) -> None:
    with pytest.raises(UsageError, match="list"):
        ask(engine, "restore", paths="a")


@pytest.mark.parametrize("path", [".dedupfs", ".dedupfs/blobs/00"])
def test_the_store_is_not_there(engine: Recorder, path: str) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        ask(engine, "duplicates", path=path)
    assert not engine.paths


@pytest.mark.parametrize(
    ("field", "path"),
    [("/a", "/a"), (r"/a\040b", "/a b"), (r"/\134040", r"/\040"), (r"/\011\012\134", "/\t\n\\"), ("/\xe9", "/\xe9")],
)
def test_mount_table_fields(field: str, path: str) -> None:
    assert unmount._unescape(field) == path


def test_a_dry_run_is_one_only_when_asked_for(engine: Recorder) -> None:
    assert ask(engine, "restore") == {"dry_run": False}
    assert ask(engine, "restore", dry_run=True) == {"dry_run": True}


@pytest.mark.parametrize("rate", [None, 0, 12, 2.5])
def test_a_rate_of_a_scrub(engine: Recorder, rate: float | None) -> None:
    assert ask(engine, "scrub", rate=rate) == {"rate": rate}


@pytest.mark.parametrize("rate", [-1, "fast", True, [], float("nan"), float("inf")])
def test_a_rate_that_makes_no_sense_is_refused(engine: Recorder, rate: object) -> None:
    with pytest.raises(UsageError):
        ask(engine, "scrub", rate=rate)


@needs_root
def test_where_the_root_directory_is_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is the one of a chroot: no mount can be private and shared at once."""
    monkeypatch.setattr(unmount, "_MS_REC_PRIVATE", unmount._MS_REC_PRIVATE | 1 << 20)
    acted: list[str] = []
    with pytest.raises(Unavailable) as caught:
        unmount.beneath(str(tmp_path), lambda: acted.append("beneath"))
    assert f"run dedupfs umount {tmp_path}" in str(caught.value)
    assert acted == []


_LOGGING = """
import logging
from dedupfs.mount import prepare_process
prepare_process()
logging.getLogger("dedupfs.x").warning("two\\nlines")
logging.getLogger("dedupfs.x").debug("unheard")
"""


def test_lines_for_the_journal(tmp_path: Path) -> None:
    """With their priority where systemd reads them, with their time where standard error went elsewhere."""
    path = tmp_path / "log"
    for told, expected in ((True, "<4>MainThread dedupfs.x: two\n<4>lines\n"), (False, " WARNING MainThread ")):
        with open(path, "wb") as log:
            st = os.fstat(log.fileno())
            stream = f"{st.st_dev}:{st.st_ino if told else st.st_ino + 1}"
            environment = {**os.environ, "JOURNAL_STREAM": stream, "PYTHONPATH": str(REPOSITORY)}
            subprocess.run([sys.executable, "-c", _LOGGING], stderr=log, env=environment, check=True, timeout=60)
        assert expected in path.read_text()
