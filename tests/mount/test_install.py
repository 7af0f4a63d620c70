"""What an administrator installs: the helper of mount(8), the systemd units, manual pages, completion, the wheel."""

import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.filesystems import is_mountpoint
from tests.support.mounted import REPOSITORY, Mounted, dedupfs
from tests.support.photos import photographs
from tests.support.tools import needs_root

references = pytest.mark.parametrize("mounts", [("reference", "ext4")], indirect=True, ids="-".join)

pytestmark = pytest.mark.either_way


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env={**os.environ, **environment},
    )


# -- mount(8)


def helper(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As mount(8) runs it."""
    program = "import sys; from dedupfs.cli.helper import main; sys.exit(main())"
    return run(sys.executable, "-c", program, *arguments, PYTHONPATH=str(REPOSITORY))


@references
@pytest.mark.parametrize(
    "options",
    ["rw", "ro,noatime,_netdev,x-systemd.requires=network.target,nofail", "defaults,user,noauto,allow_other"],
)
def test_the_helper_mounts(mounts: Mounts, options: str) -> None:
    mounted = mounts.new()
    done = helper(mounted.source, mounted.mountpoint, "-n", "-s", "-o", options, "-t", "fuse.dedupfs")
    assert (done.returncode, done.stderr) == (0, "")
    assert is_mountpoint(mounted.mountpoint)
    dedupfs("umount", mounted.mountpoint)


@references
def test_what_the_helper_refuses(mounts: Mounts) -> None:
    mounted = mounts.new()
    done = helper(mounted.source, mounted.mountpoint, "-o", "rw,frob")
    assert done.returncode == 64
    assert "mount option frob is unknown; known are " in done.stderr
    for arguments in (["-N", "3", "a", "b"], ["only-one"], ["-q", "a", "b"]):
        done = helper(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert helper(mounted.source, mounted.mountpoint, "-f").returncode == 0
    assert not is_mountpoint(mounted.mountpoint)


# -- systemd


@contextmanager
def told(path: Path) -> Iterator[socket.socket]:
    """Where systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(30)
        yield listener


@references
def test_systemd_is_told(mounts: Mounts, tmp_path: Path) -> None:
    mounted = mounts.new()
    with told(tmp_path / "notify") as systemd:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "dedupfs", "mount", "--foreground", mounted.source, mounted.mountpoint],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.DEVNULL,
        )
        first = systemd.recv(4096).decode()
        assert is_mountpoint(mounted.mountpoint)  # not sooner
        assert first.startswith("READY=1\nSTATUS=serving")
        dedupfs("umount", mounted.mountpoint)
        assert daemon.wait(30) == 0
        last = ""
        while not last.startswith("STOPPING=1"):
            last = systemd.recv(4096).decode()


def set_in_the_unit(name: str) -> list[str]:
    """The words of a setting that may be given several times."""
    unit = (REPOSITORY / "systemd" / "dedupfs@.service").read_text()
    return [word for line in re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE) for word in line.split()]


def test_the_unit_lets_workers_shut_themselves_in() -> None:
    """What `sandbox` does needs more than a daemon otherwise does, and systemd's filters cannot be had without it."""
    assert {"CAP_SYS_CHROOT", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"} <= set(set_in_the_unit("CapabilityBoundingSet"))
    assert {"mnt", "net", "ipc", "uts"} <= set(set_in_the_unit("RestrictNamespaces"))
    assert {"@mount", "landlock_create_ruleset", "landlock_restrict_self"} <= set(set_in_the_unit("SystemCallFilter"))


@needs_root
@references
def test_with_no_more_than_the_unit_grants(mounts: Mounts, tmp_path: Path) -> None:
    """Pictures are described, and the store is closed and clean at the end, with the unit's capabilities alone."""
    unit = (REPOSITORY / "systemd" / "dedupfs@.service").read_text()
    granted = [
        word for line in re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE) for word in line.split()
    ]
    bounds = ",".join(["-all", *("+" + word.removeprefix("CAP_").lower() for word in granted)])
    mounted = mounts.new()
    command = (sys.executable, "-m", "dedupfs", "mount", "--foreground")
    with told(tmp_path / "notify") as systemd:
        daemon = subprocess.Popen(
            ["setpriv", f"--bounding-set={bounds}", "--no-new-privs", *command, mounted.source, mounted.mountpoint],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert systemd.recv(4096).startswith(b"READY=1")
        shutil.copy(photographs(1, jpeg=True)[0], mounted.path("photo.jpg"))
        mounted.settle()
        assert mounted.status()["pictures_described"] == 1
        dedupfs("umount", mounted.mountpoint)
        _, said = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, said
    assert (mounted.store / "clean").exists()


@references
def test_only_a_dead_mount_is_cleaned(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    dedupfs("umount", "--if-dead", mounted.mountpoint)
    assert is_mountpoint(mounted.mountpoint)
    assert mounted.is_alive
    mounted.path("one").write_bytes(b"kept")
    os.kill(mounted.pid, 9)
    mounted.wait_until_dead()
    dedupfs("umount", "--if-dead", mounted.mountpoint)
    assert not is_mountpoint(mounted.mountpoint)
    dedupfs("umount", "--if-dead", mounted.mountpoint)
    mounted.kill()
    mounted.start()
    assert mounted.path("one").read_bytes() == b"kept"


def test_instances(tmp_path: Path) -> None:
    """What stands in no configuration is the path that the name stands for."""
    refused = dedupfs("mount", "--instance", r"no-such\x2dplace", exit_code=66)
    assert "/no/such-place does not exist" in refused.stderr
    assert "not mounted" in dedupfs("health", str(tmp_path), exit_code=67).stderr
    dedupfs("umount", "--if-dead", "--instance", "no-such-place")
    dedupfs("scrub", "--instance", "no-such-place", exit_code=66)
    dedupfs("umount", "--instance", "a/b", exit_code=64)
    dedupfs("umount", exit_code=64)


@pytest.fixture
def manuals(tmp_path: Path) -> Path:
    """The manual pages where man(1) looks for them."""
    for page in (REPOSITORY / "docs/man").iterdir():
        directory = tmp_path / "man" / f"man{page.suffix[1:]}"
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, directory)
    return tmp_path / "man"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_units_are_valid(tmp_path: Path, manuals: Path) -> None:
    units = []
    for unit in (REPOSITORY / "systemd").iterdir():
        instance = unit.name.replace("@", "@photos")
        text = unit.read_text().replace("/usr/local/bin/dedupfs", "/bin/true")
        (tmp_path / instance).write_text(text)
        units.append(tmp_path / instance)
    assert len(units) == 3
    done = run("systemd-analyze", "verify", *units, MANPATH=str(manuals))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize(("unit", "most"), [("dedupfs@.service", 60), ("dedupfs-scrub@.service", 25)])
def test_the_units_are_hardened(unit: str, most: int) -> None:
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={most}", REPOSITORY / "systemd" / unit)
    assert done.returncode == 0, done.stdout[-300:]


# -- manual pages, completion, wheel


def test_manuals_and_completion_are_of_this_command_line() -> None:
    done = run(sys.executable, REPOSITORY / "scripts/manuals", "--check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff")
def test_manuals_are_well_formed(manuals: Path) -> None:
    for page in sorted(manuals.rglob("*.[158]")):
        done = run("groff", "-man", "-ww", "-Tutf8", "-z", page, LC_ALL="C.UTF-8")
        complaints = [line for line in done.stderr.splitlines() if ".so" not in line and "can't open" not in line]
        assert (done.returncode, complaints) == (0, []), page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sc"], ["scan", "scrub"]),
        (["gc", "--d"], ["--dry-run"]),
        (["config", ""], ["-h", "--help", "-o", "--json", "show"]),
        (["scrub", "--rate", ""], []),
    ],
)
def test_completion(words: list[str], expected: list[str]) -> None:
    script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dedupfs; printf "%s\\n" "${COMPREPLY[@]}"'
    done = run("bash", "-c", script, "bash", REPOSITORY / "completions/dedupfs", "dedupfs", *words)
    assert (done.stderr, done.stdout.split()) == ("", expected)


def test_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "tests", "__pycache__", "*.egg-info", "build", ".*_cache")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--no-index"]
    done = run(*wheel, "--wheel-dir", tmp_path, source)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        commands = archive.read(entry_points).decode()
    assert {line.split(" = ")[0] for line in commands.splitlines() if " = " in line} == {
        *("dedupfs", "mount.dedupfs", "mount.fuse.dedupfs"),
    }
    inside = {name.split(".data/data/")[1] for name in names if ".data/data/" in name}
    assert {
        "share/man/man1/dedupfs.1",
        "share/man/man1/dedupfs-scrub.1",
        "share/man/man5/dedupfs.toml.5",
        "share/man/man8/mount.fuse.dedupfs.8",
        "share/bash-completion/completions/dedupfs",
        "lib/systemd/system/dedupfs@.service",
        "lib/systemd/system/dedupfs-scrub@.timer",
    } <= inside
    assert "dedupfs/cli/helper.py" in names


def test_help_of_a_mount_names_every_option(mounted: Mounted) -> None:
    said = mounted.run("mount", "--help").stdout
    for name in ("config=", "exclude=", "include=", "min_size=", "scrub_rate=", "metrics=", "share=", "passthrough="):
        assert name in said
