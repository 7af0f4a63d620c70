"""The command line: what it asks, what it shows, and how it fails. The mount is a double behind a real socket."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dedupfs import __version__, errors
from dedupfs.backing import Backing
from dedupfs.cli import main, output, targets
from dedupfs.control import Command, Server
from dedupfs.model import Progress
from dedupfs.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("mount", "umount", "settle", "status", "duplicates", "scan", "scrub", "restore", "leave", "rebuild", "fsck"),
    *("gc", "config", "estimate", "health", "report"),
)

STATUS = {
    "files": 1234,
    "logical_bytes": 3 << 20,
    "stored_bytes": 1 << 20,
    "saved_bytes": 2 << 20,
    "references": 3,
    "blobs": 1,
    "pending": 0,
    "scanning": False,
    "quiet_until": "",
    "share": "reference",
    "passthrough": False,
    "passthrough_reason": "too old",
    "pictures_described": 1200,
    "pictures_waiting": 0,
    "pictures_undescribable": 3,
    "pictures_reason": "",
}
GROUP = {"digest": "ab" * 16, "size_bytes": 2048, "paths": ["a.jpg", os.fsdecode(b"caf\xe9/\x1b[2J\n.jpg")]}


@dataclass
class FakeMount:
    """A source whose mount answers what the test says, and remembers what it was asked."""

    source: Path
    server: Server
    answers: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def command(self, name: str) -> Command:
        def run(arguments: Mapping[str, object], progress: Progress) -> object:
            self.asked.append((name, dict(arguments)))
            progress("working", 1, 2)
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        return run


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dedupfs-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def source(directory: Path) -> Path:
    path = directory / "source"
    path.mkdir()
    (path / "a.jpg").write_bytes(b"x" * 2048)
    (path / "folder").mkdir()
    (path / "folder" / "b.jpg").write_bytes(b"y")
    return path


@pytest.fixture
def live(directory: Path, source: Path) -> Iterator[FakeMount]:
    commands: dict[str, Command] = {}
    with ExitStack() as stack:
        store = stack.enter_context(Store(stack.enter_context(closing(Backing(str(source))))))
        server = Server(str(directory / "run" / "x.sock"), commands)
        stack.callback(server.close)
        fake = FakeMount(source, server)
        commands |= {
            name: fake.command(name)
            for name in ("status", "health", "settle", "scan", "scrub", "restore", "duplicates")
        }
        server.start()
        store.announce(mountpoint="/mnt", socket=server.path)
        yield fake


@dataclass
class Shell:
    """Runs a command line in this process."""

    capsysbinary: pytest.CaptureFixture[bytes]

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = self.capsysbinary.readouterr()
        return code, os.fsdecode(out), os.fsdecode(err)

    def json(self, *arguments: str | Path) -> Any:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def refusal(self, code: int, *arguments: str | Path) -> str:
        """The one line with which a command line is refused, and this exit code."""
        found, out, err = self(*arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("dedupfs: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def shell(capsysbinary: pytest.CaptureFixture[bytes]) -> Shell:
    return Shell(capsysbinary)


def start(*arguments: str | Path, **options: Any) -> "subprocess.Popen[bytes]":
    """The same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dedupfs", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        **options,
    )


# -- help and usage


def test_version(shell: Shell) -> None:
    assert shell("--version") == (0, f"dedupfs {__version__}\n", "")


def test_help_lists_commands_and_exit_codes(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n    {command} " in out
    numbers = {
        each.exit_code for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")
    }
    for number in numbers | {0, 1, 2, errors.EXIT_INTERNAL, errors.EXIT_OS_ERROR}:
        assert f"\n{number:>5}  " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(shell: Shell, command: str) -> None:
    code, out, _ = shell(command, "--help")
    assert code == 0
    assert "--json" in out
    assert "--ready-fd" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frob"],
        ["status"],
        ["status", "a", "b"],
        ["status", "--frob", "a"],
        ["mount", "a"],
        ["fsck", "--rep", "a"],
        ["mount", "/", "/", "-o", "frob"],
        ["mount", "/", "/", "-o", "ro", "-o", "share=reflink,share=auto"],
    ],
)
def test_wrong_usage(shell: Shell, arguments: list[str]) -> None:
    shell.refusal(64, *arguments)


# -- asking a mount


@pytest.mark.parametrize(
    "command", ["status", "settle", "duplicates", "similar", "health", "umount", "watch", "authoritative"]
)
def test_who_asks_a_mount_loads_little(command: str) -> None:
    """Scripts ask once a file; numpy and the index take longer to load than the answer takes."""
    script = (
        f"import sys; from dedupfs.cli import main; code = main([{command!r}, '--help'])\n"
        "sys.exit(code or str(sorted({'numpy', 'lmdb', 'mfusepy', 'rich', 'PIL', 'dedupfs.engine'} & {*sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_status(shell: Shell, live: FakeMount) -> None:
    live.answers["status"] = STATUS
    assert shell.json("status", live.source) == STATUS
    code, out, err = shell("status", live.source)
    assert (code, err) == (0, "")
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert {name.strip(): value.strip() for name, value in rows.items()} == {
        "files": "1,234",
        "size of all": "3.0 MiB",
        "stored": "1.0 MiB",
        "saved": "2.0 MiB (67 %)",
        "references": "3",
        "blobs": "1",
        "pending": "0",
        "pictures": "1,200 described, 3 undescribable",
        "sharing by": "reference",
        "passthrough": "no: too old",
    }


def test_status_of_an_archive_that_was_just_mounted(shell: Shell, live: FakeMount) -> None:
    live.answers["status"] = {**STATUS, "logical_bytes": 0, "saved_bytes": 0, "scanning": True}
    code, out, _ = shell("status", live.source)
    assert code == 0
    assert "a scan is running" in out


def test_health(shell: Shell, live: FakeMount) -> None:
    well = {"healthy": True, "problems": [], "free_bytes": 5, "index_used_share": 0.1}
    live.answers["health"] = well
    assert shell("health", live.source) == (0, "well\n", "")
    assert shell.json("health", live.source) == well
    live.answers["health"] = {**well, "healthy": False, "problems": [{"check": "disk", "problem": "nearly full"}]}
    assert shell("health", live.source) == (1, "disk: nearly full\n", "")


def test_settle(shell: Shell, live: FakeMount) -> None:
    live.answers["settle"] = {"settled": 5}
    assert shell.json("settle", live.source) == {"settled": 5}
    assert shell("settle", live.source) == (0, "settled  5\n", "")


def test_scan_asks_the_mount(shell: Shell, live: FakeMount) -> None:
    live.answers["scan"] = {"files": 5, "read_bytes": 2048}
    assert shell.json("scan", live.source) == {"files": 5, "read_bytes": 2048}
    assert shell("scan", live.source) == (0, "files  5\nread   2.0 KiB\n", "")


def test_duplicates_of_everything(shell: Shell, live: FakeMount) -> None:
    live.answers["duplicates"] = [GROUP]
    assert shell.json("duplicates", live.source) == [GROUP]
    assert live.asked == [("duplicates", {})]
    _, out, _ = shell("duplicates", live.source)
    assert out == (
        f"{'ab' * 16}  2 x 2.0 KiB\n  a.jpg\n  caf\udce9/\\x1b[2J\\x0a.jpg\n"
        "groups: 1; size of the further copies: 2.0 KiB\n"
    )


@pytest.mark.parametrize("form", ["folder/b.jpg", "{source}/folder/b.jpg", "./folder/../folder//b.jpg"])
def test_duplicates_of_one_file(shell: Shell, live: FakeMount, form: str) -> None:
    live.answers["duplicates"] = GROUP
    assert shell.json("duplicates", live.source, form.format(source=live.source)) == GROUP
    assert live.asked == [("duplicates", {"path": "folder/b.jpg"})]
    assert "groups" not in shell("duplicates", live.source, "a.jpg")[1]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("absent", 66),
        ("a.jpg/absent", 66),
        (".dedupfs/format", 66),
        ("folder", 64),
        (".", 64),
        ("..", 64),
        ("../source2", 64),
        ("/etc/passwd", 64),
    ],
)
def test_duplicates_of_what_is_no_file_there(shell: Shell, live: FakeMount, path: str, code: int) -> None:
    assert path in shell.refusal(code, "duplicates", live.source, path)
    assert not live.asked


def test_restore_asks_the_mount(shell: Shell, live: FakeMount) -> None:
    done = {"restored": 2, "bytes": 4096, "failed": []}
    live.answers["restore"] = done
    assert shell.json("restore", live.source) == done
    assert shell.json("restore", live.source, "a.jpg", live.source / "folder") == done
    assert live.asked == [("restore", {"paths": []}), ("restore", {"paths": ["a.jpg", "folder"]})]
    assert shell("restore", live.source)[1] == "restored  2\nbytes     4.0 KiB\n"


def test_restore_names_what_it_could_not_do(shell: Shell, live: FakeMount) -> None:
    live.answers["restore"] = {"restored": 0, "bytes": 0, "failed": [{"path": "a\n.jpg", "reason": "blob is missing"}]}
    code, out, _ = shell("restore", live.source)
    assert code == 1
    assert out.splitlines()[-1] == "not restored: a\\x0a.jpg: blob is missing"
    assert shell("restore", live.source, "--json")[0] == 1


def test_scrub_tells_what_it_found(shell: Shell, live: FakeMount) -> None:
    finding = {
        "kind": "blob",
        "digest": "ab" * 16,
        "problem": "its bytes are not what its digest says",
        "fate": "healed",
        "paths": ["a\n.jpg"],
        "copies": ["b.jpg"],
    }
    answer = {"contents": 7, "bytes": 2048, "skipped": 0, "resumed": False, "findings": [finding], "exit_code": 1}
    live.answers["scrub"] = answer
    code, out, _ = shell("scrub", live.source, "--rate", "12.5")
    assert code == 1
    assert live.asked == [("scrub", {"rate": 12.5})]
    assert out.splitlines()[:3] == [
        f"healed: blob {'ab' * 16}: its bytes are not what its digest says",
        "  a\\x0a.jpg",
        "  a good copy: b.jpg",
    ]
    code, out, _ = shell("scrub", live.source, "--json")
    assert (code, json.loads(out)) == (1, answer)


# -- working on the store itself


def test_without_a_mount_the_store_is_worked_on(shell: Shell, source: Path) -> None:
    assert shell.json("scan", source)["files"] == 2
    assert shell("scan", source)[::2] == (0, "")
    assert shell.json("fsck", source) == {"findings": [], "exit_code": 0}
    assert shell("fsck", source) == (0, "clean\n", "")
    assert shell("rebuild", source)[::2] == (0, "")
    assert shell.json("restore", source, "folder") == {"restored": 0, "bytes": 0, "failed": []}
    assert "absent" in shell.refusal(66, "restore", source, "absent")


def test_fsck_tells_what_it_found(shell: Shell, source: Path) -> None:
    shell.json("scan", source)
    leftover = source / ".dedupfs" / "staging" / "left\nover"
    leftover.touch()
    code, out, _ = shell("fsck", source)
    assert code == 2
    (line,) = out.splitlines()
    assert "left\\x0aover: " in line
    assert line.endswith(" (not repaired)")
    code, out, _ = shell("fsck", source, "--repair", "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["exit_code"] == 1
    assert [(found["path"], found["repaired"]) for found in answer["findings"]] == [
        (".dedupfs/staging/left\nover", True)
    ]
    assert not leftover.exists()


def test_fsck_shows_its_plan(shell: Shell, source: Path) -> None:
    shell.json("scan", source)
    leftover = source / ".dedupfs" / "staging" / "refer.1.2.3"
    leftover.touch()
    code, out, _ = shell("fsck", source, "--repair", "--dry-run")
    assert code == 2
    assert out.startswith("leftovers: .dedupfs/staging/refer.1.2.3: ")
    assert out.endswith(" (would be taken back, or set aside in quarantine/ if it is not of dedupfs)\n")
    assert leftover.exists()
    assert "--repair" in shell.refusal(64, "fsck", source, "--dry-run")


def test_gc_and_leave_of_a_store(shell: Shell, source: Path) -> None:
    shell.json("scan", source)
    blob = source / ".dedupfs" / "blobs" / "ab" / ("ab" * 16 + ".0")
    blob.parent.mkdir()
    blob.write_bytes(bytes(2048))
    assert "would be moved to the trash  1 blobs, 2.0 KiB" in shell("gc", source, "--dry-run")[1]
    assert blob.exists()
    assert shell.json("gc", source)["unreferenced"] == 1
    assert not blob.exists()
    assert "stay in the trash     1 blobs, 2.0 KiB" in shell("gc", source)[1]
    (source / ".dedupfs" / "mine").touch()
    code, out, _ = shell("leave", source)
    assert code == 1
    assert (
        out.splitlines()[0] == "in the way: .dedupfs/mine: would be lost with the store; look at it, and move it away"
    )
    (source / ".dedupfs" / "mine").unlink()
    assert shell("leave", source)[:2] == (
        0,
        "restored   0\nproven     2 files, 2.0 KiB\nthe store  is removed\n",
    )
    assert sorted(path.name for path in source.iterdir()) == ["a.jpg", "folder"]


def test_an_owned_store_is_left_alone(shell: Shell, source: Path) -> None:
    with closing(Backing(str(source))) as backing, Store(backing):
        for command in ("scan", "restore", "rebuild", "fsck"):
            assert "in use by another dedupfs" in shell.refusal(75, command, source)


# -- failing


@pytest.mark.parametrize("command", ["status", "health", "settle", "duplicates"])
def test_these_need_a_mount(shell: Shell, source: Path, command: str) -> None:
    assert "not mounted" in shell.refusal(67, command, source)


@pytest.mark.parametrize("command", ["status", "settle", "duplicates", "scan", "restore", "rebuild", "fsck"])
def test_a_source_that_is_not_there(shell: Shell, source: Path, command: str) -> None:
    assert "absent" in shell.refusal(66, command, source / "absent")


@pytest.mark.parametrize("command", ["rebuild", "fsck", "leave", "gc"])
def test_these_need_the_store_to_themselves(shell: Shell, live: FakeMount, command: str) -> None:
    assert "umount" in shell.refusal(75, command, live.source)


@pytest.mark.parametrize("command", ["restore", "scrub", "leave", "rebuild", "fsck", "gc"])
def test_these_make_no_store(shell: Shell, source: Path, command: str) -> None:
    assert "no dedupfs store" in shell.refusal(66, command, source)
    assert not (source / ".dedupfs").exists()


def test_a_report_of_a_directory_makes_no_store(
    shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert shell.json("report", source)["estimated"] is True
    assert not (source / ".dedupfs").exists()


def test_an_error_of_the_mount_is_one_line_here(shell: Shell, live: FakeMount) -> None:
    live.answers["scan"] = errors.IndexDamaged("the index\n is damaged; run dedupfs rebuild")
    assert shell.refusal(65, "scan", live.source) == "dedupfs: the index\\x0a is damaged; run dedupfs rebuild\n"
    live.answers["scan"] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert shell.refusal(71, "scan", live.source) == "dedupfs: No space left on device\n"


def test_a_bug_is_one_line_and_a_traceback_for_who_asks(
    shell: Shell, live: FakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.answers["status"] = {}
    monkeypatch.delenv("DEDUPFS_DEBUG", raising=False)
    line = shell.refusal(70, "status", live.source)
    assert "internal error: KeyError" in line
    assert "DEDUPFS_DEBUG=1" in line
    monkeypatch.setenv("DEDUPFS_DEBUG", "1")
    code, _, err = shell("status", live.source)
    assert code == 70
    assert "Traceback" in err


def test_ctrl_c(live: FakeMount) -> None:
    asked, release = threading.Event(), threading.Event()

    def wait() -> object:
        asked.set()
        release.wait(10)
        return {}

    live.answers["settle"] = wait
    # A shell that starts us in the background has it ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with start("settle", live.source) as process:
            assert asked.wait(10)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
            release.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (process.returncode, err) == (130, b"dedupfs: interrupted\n")


def test_a_reader_that_has_enough(live: FakeMount) -> None:
    live.answers["duplicates"] = [GROUP] * 10_000
    with start("duplicates", live.source, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=10) == 141


def test_a_full_disk_is_noticed(live: FakeMount) -> None:
    live.answers["status"] = STATUS
    with open("/dev/full", "wb") as full, start("status", live.source, stdout=full) as process:
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (71, b"dedupfs: No space left on device\n")


def test_names_are_printed_as_the_bytes_they_are(live: FakeMount) -> None:
    live.answers["duplicates"] = [GROUP]
    with start("duplicates", live.source, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=10)
    assert err == b""
    assert b"\n  caf\xe9/\\x1b[2J\\x0a.jpg\n" in out


# -- mount and umount, as far as they refuse


def foreground_refusal(code: int, *arguments: Path) -> str:
    with start("mount", "--foreground", *arguments, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=30)
    line = os.fsdecode(err)
    assert (process.returncode, out, line.count("\n")) == (code, b"", 1), line
    return line


def test_mount_says_what_is_wrong(source: Path, directory: Path) -> None:
    (directory / "file").touch()
    (directory / "mnt").mkdir()
    for arguments, reason in [
        ((source, directory / "absent"), "does not exist"),
        ((directory / "absent", directory / "mnt"), "does not exist"),
        ((source, directory / "file"), "is not a directory"),
        ((directory / "file", directory / "mnt"), "is not a directory"),
        ((source, source / "folder"), "lies inside"),
        ((source, directory), "would hide it"),
    ]:
        assert reason in foreground_refusal(66, *arguments)
    assert not (source / ".dedupfs").exists()


def test_a_source_is_mounted_once(live: FakeMount, directory: Path) -> None:
    (directory / "mnt").mkdir()
    assert "mounted already" in foreground_refusal(75, live.source, directory / "mnt")


def test_mounting_in_the_background_fails_like_in_the_foreground(source: Path, directory: Path) -> None:
    # Somewhere else, beside a package that must not be taken for dedupfs.
    (directory / "dedupfs").mkdir()
    (directory / "dedupfs" / "__main__.py").write_text("raise SystemExit(42)\n")
    command = f"import os, sys; from dedupfs.cli import main; os.chdir({str(directory)!r}); sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "mount", source, "absent"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=30,
    )
    line = f"dedupfs: {directory}/absent does not exist; make the directory first\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (66, b"", line)


def test_umount_of_what_is_not_mounted(shell: Shell, source: Path, live: FakeMount) -> None:
    assert "no dedupfs is mounted" in shell.refusal(67, "umount", source)


# -- paths and output


@pytest.mark.parametrize(
    ("path", "relative"),
    [
        ("a", "a"),
        ("a/", "a"),
        (".", ""),
        ("link", "link"),
        ("link/x", "a/x"),
        ("a/../a/x", "a/x"),
        ("{root}/a/x", "a/x"),
        ("{root}", ""),
        ("{alias}/a/x", "a/x"),
        ("broken", "broken"),
    ],
)
def test_path_within(directory: Path, path: str, relative: str) -> None:
    root, alias = directory / "root", directory / "alias"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x").touch()
    (root / "link").symlink_to("a")
    (root / "broken").symlink_to("absent")
    alias.symlink_to(root)
    for top in (root, alias):
        assert targets.path_within(str(top), path.format(root=root, alias=alias)) == relative


def test_path_within_follows_no_link_out(directory: Path) -> None:
    (directory / "root").mkdir()
    (directory / "outside").touch()
    (directory / "root" / "link").symlink_to(directory)
    with pytest.raises(errors.UsageError):
        targets.path_within(str(directory / "root"), "link/outside")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size_text(size_bytes: int, text: str) -> None:
    assert output.size_text(size_bytes) == text


def test_facts_leave_lists_out() -> None:
    answer: dict[str, object] = {"new_files": 1200, "read_bytes": 1024, "clean": True, "mode": "quick", "failed": [1]}
    assert output.facts_of(answer) == [("new files", "1,200"), ("read", "1.0 KiB"), ("clean", "yes"), ("mode", "quick")]


def test_progress_is_for_terminals(live: FakeMount) -> None:
    live.answers["settle"] = {"settled": 5}
    terminal, device = os.openpty()
    with os.fdopen(terminal, "rb") as screen:
        command = [sys.executable, "-m", "dedupfs", "settle", str(live.source)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        done = subprocess.run(command, env=environment, stderr=device, stdout=subprocess.PIPE, timeout=30, check=True)
        os.close(device)
        shown = b""
        while chunk := _read_terminal(screen.fileno()):
            shown += chunk
    assert done.stdout == b"settled  5\n"
    assert b"working" in shown


def _read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO is how a terminal without a device ends
        return b""
