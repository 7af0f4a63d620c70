"""What an administrator does to a mount, with the real commands: scrub, restore, leave, gc, health."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.mounted import REPOSITORY, Mounted
from tests.support.tools import tool

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="blobs are root's")
references = pytest.mark.parametrize("mounts", [("reference", "ext4")], indirect=True, ids="-".join)


def the_blob(mounted: Mounted) -> Path:
    (path,) = (path for path in (mounted.store / "blobs").rglob("*.*") if path.is_file())
    return path


def rot(path: Path) -> None:
    subprocess.run(["chattr", "-i", str(path)], check=True)
    with open(path, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


@references
def test_scrub_of_a_mount(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    data = os.urandom(100_000)
    for name in ("one", "two"):
        mounted.path(name).write_bytes(data)
    mounted.settle()
    answer = mounted.run("scrub", mounted.mountpoint, "--json", "--rate", "0").json()
    assert (answer["contents"], answer["findings"]) == (1, [])
    assert mounted.path("one").read_bytes() == data  # the kernel has it in memory
    rot(the_blob(mounted))
    mounted.expect_log("scrub: blob", "is missing", "was damaged; healed")
    said = mounted.run("scrub", mounted.mountpoint, exit_code=2).stdout
    assert said.startswith("quarantined: blob ")
    assert "\n  one\n  two\n" in said
    for name in ("one", "two"):
        with pytest.raises(OSError) as caught:
            mounted.path(name).read_bytes()
        assert caught.value.errno == errno.EIO
    mounted.path("good").write_bytes(data)
    mounted.settle()
    assert [mounted.path(name).read_bytes() for name in ("one", "two", "good")] == [data] * 3
    assert mounted.run("scrub", mounted.mountpoint).stdout.startswith("contents verified  1\n")


def test_scrub_refuses_a_senseless_rate(mounted: Mounted) -> None:
    for rate in ("-1", "nan", "fast"):
        assert "--rate" in mounted.run("scrub", mounted.mountpoint, "--rate", rate, exit_code=64).stderr


def test_a_configuration_file(mounts: Mounts, tmp_path: Path) -> None:
    file = tmp_path / "archive.toml"
    file.write_text('exclude = ["drafts/"]\nnoatime = true\n')
    mounted = mounts.new(f"config={file}").start()
    data = os.urandom(50_000)
    for directory in ("drafts", "permits"):
        mounted.path(directory).mkdir()
        for name in ("one", "two"):
            mounted.path(directory, name).write_bytes(data)
    mounted.settle()
    assert {mounted.state(f"permits/{name}") for name in ("one", "two")} <= {"reference", "shared"}
    assert {mounted.state(f"drafts/{name}") for name in ("one", "two")} == {"plain"}
    said = mounted.run("config", "show", str(file)).stdout
    assert f'exclude = ["drafts/"] # {file}:1' in " ".join(said.split())
    file.write_text("noatime = 1\n")
    refusal = mounted.run("mount", mounted.source, mounted.mountpoint, "-o", f"config={file}", exit_code=64).stderr
    assert refusal == f"dedupfs: {file}:1: noatime is true or false, not 1\n"


def test_domains(mounts: Mounts, tmp_path: Path) -> None:
    """With the tools that people use: cp asks for a copy of the whole, mv renames."""
    file = tmp_path / "archive.toml"
    file.write_text('domain = ["police", "health"]\n')
    mounted = mounts.new(f"config={file}").start()
    data = os.urandom(300_000)
    for folder in ("police", "health"):
        mounted.path(folder).mkdir()
        for name in ("one", "two"):
            mounted.path(folder, name).write_bytes(data)
    mounted.settle()
    shared = {"reference", "shared"}
    paths = [b"health/one", b"health/two", b"police/one", b"police/two"]
    assert {mounted.state(path) for path in paths} <= shared
    assert mounted.status()["stored_bytes"] == 2 * len(data)
    for folder in ("police", "health"):
        tool("cp", mounted.path("police/one"), mounted.path(folder, "copy"))
        assert mounted.path(folder, "copy").read_bytes() == data
    mounted.settle()
    paths += [b"health/copy", b"police/copy"]
    assert mounted.duplicates("health/copy") == sorted(set(paths) - {b"health/copy"})
    assert mounted.status()["stored_bytes"] == 2 * len(data)
    report = mounted.run("report", mounted.mountpoint, "--json").json()
    assert (report["shared_across_domains"], report["across_domains"]) == (0, [])
    tool("mv", mounted.path("police/two"), mounted.path("health/moved"))
    mounted.settle()
    assert mounted.path("health/moved").read_bytes() == data
    report = mounted.run("report", mounted.mountpoint, "--json").json()
    assert report["across_domains"] == [["health/moved", "police/copy", "police/one"]]
    assert "1 content is shared across domains" in mounted.run("report", mounted.mountpoint).stdout


def test_quiet_hours(mounts: Mounts) -> None:
    """By the real clock: quiet since an hour ago, and for two more."""
    now = time.localtime()
    minutes = 60 * now.tm_hour + now.tm_min
    begin, end = ((minutes + offset) % 1440 for offset in (-60, 120))
    until = f"{end // 60:02}:{end % 60:02}"
    mounted = mounts.new(f"quiet={begin // 60:02}:{begin % 60:02}-{until}", "workers=1").start()
    data = os.urandom(50_000)
    for name in ("one", "two", "three"):
        mounted.path(name).write_bytes(data)
    assert mounted.state("three") == "plain"
    status = mounted.status()
    assert (status["pending"], status["quiet_until"]) == (2, until)
    said = mounted.run("status", mounted.mountpoint).stdout
    assert f"what is pending waits until {until}; dedupfs settle does it now" in said
    mounted.kill()
    mounted.start()
    assert [mounted.path(name).read_bytes() for name in ("one", "two", "three")] == [data] * 3
    assert mounted.status()["scanning"]
    mounted.settle()
    shared = mounted.state("one")
    assert shared in ("reference", "shared")
    assert [mounted.state(name) for name in ("two", "three")] == [shared] * 2
    mounted.path("four").write_bytes(data)
    mounted.unmount()
    mounted.start()
    assert mounted.status()["pending"] == 1


def test_health_and_metrics_of_a_mount(mounts: Mounts, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    mounted = mounts.new(f"metrics={path}").start()
    mounted.path("one").write_bytes(os.urandom(5000))
    mounted.settle()
    answer = mounted.run("health", mounted.mountpoint, "--json", exit_code=None)
    assert {problem["check"] for problem in answer.json()["problems"]} <= {"disk"}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        told = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert "\ndedupfs_files 1.0\n" in told
    assert "\ndedupfs_pending_files 0.0\n" in told
    mounted.unmount()
    assert not path.exists()
    path.write_text("somebody's")
    assert (
        "is no socket"
        in mounted.run("mount", mounted.source, mounted.mountpoint, "-o", f"metrics={path}", exit_code=66).stderr
    )


def test_report_of_a_mount(mounts: Mounts, tmp_path: Path) -> None:
    mounted = mounts.new().start()
    data = os.urandom(50_000)
    for directory in ("permits", "inspections"):
        mounted.path(directory).mkdir()
        mounted.path(directory, "one").write_bytes(data)
    mounted.settle()
    answer = mounted.run("report", mounted.mountpoint, "--json", "--html", str(tmp_path / "page.html")).json()
    assert answer["saved_bytes"] == len(data)
    assert answer["pairs"] == [{"folders": ["inspections", "permits"], "bytes": len(data)}]
    assert "50.0 kB" in (tmp_path / "page.html").read_text()


def test_a_copy_of_a_store_is_mounted_beside_it(mounts: Mounts) -> None:
    """As who restored a backup does, to look whether all is there."""
    original = mounts.new().start()
    data = os.urandom(50_000)
    for name in ("one", "two"):
        original.path(name).write_bytes(data)
    original.settle()
    original.unmount()

    def copy(source: Path) -> None:
        tool("cp", "-a", f"{original.backing}/.", source)

    copied = mounts.new(prepare=copy)
    copied.expect_log("describes another store, or this one before it was copied")
    original.start()
    copied.start()
    for each in (original, copied):
        assert each.status()["source"] == str(each.source)
        assert each.path("two").read_bytes() == data
    original.unmount()
    assert copied.is_alive
    copied.settle()
    copied.unmount()


def test_leave_and_gc_wait_for_the_mount_to_end(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    data = os.urandom(50_000)
    for name in ("one", "two"):
        mounted.path(name).write_bytes(data)
    mounted.settle()
    for command in ("leave", "gc", "fsck"):
        for target in (mounted.source, mounted.mountpoint):
            assert "is mounted; run dedupfs umount first" in mounted.run(command, target, exit_code=75).stderr
    assert mounted.path("one").read_bytes() == data
    mounted.unmount()
    assert mounted.run("gc", mounted.source, "--json").json()["problems"] == []
    assert mounted.run("leave", mounted.source, "--json").json()["left"]
    assert not mounted.store.exists()
    assert [mounted.below(name).read_bytes() for name in ("one", "two")] == [data] * 2


def test_scrub_while_programs_write(mounts: Mounts) -> None:
    """What is being written is never called damaged, and nobody is held up."""
    mounted = mounts.new().start()
    pieces = [os.urandom(200_000) for _ in range(4)]
    stop = threading.Event()
    written = [0]

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            path = mounted.path(f"file {number % 12}")
            if number % 3:
                path.write_bytes(pieces[number % 4])
            else:
                with open(path, "r+b") as file:
                    file.seek(5000)
                    file.write(b"%d" % number)
            if number % 7 == 0:
                path.rename(mounted.path(f"file {(number + 5) % 12}"))
                path.write_bytes(pieces[0])
            written[0] = number

    for number in range(12):
        mounted.path(f"file {number}").write_bytes(pieces[number % 4])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            answer = mounted.run("scrub", mounted.mountpoint, "--json", "--rate", "0").json()
            assert answer["findings"] == []
    finally:
        stop.set()
        writer.join()
    assert written[0] > 20
    mounted.settle()
    answer = mounted.run("scrub", mounted.mountpoint, "--json", "--rate", "0").json()
    assert (answer["findings"], answer["skipped"]) == ([], 0)


@references
def test_a_scrub_ends_with_its_mount_and_goes_on_in_the_next(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    for number in range(20):
        mounted.path(f"file {number}").write_bytes(os.urandom(300_000))
    mounted.settle()

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "dedupfs", "scrub", mounted.mountpoint, "--rate", "1"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )

    slow = begin()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if slow.poll() is not None:  # the one below came first
            slow.communicate()
            slow = begin()
        refused = mounted.run("scrub", mounted.mountpoint, "--rate", "0", exit_code=None)
        if "a scrub of this source is running already" in refused.stderr:
            break
    mounted.unmount()
    _, complaint = slow.communicate(timeout=30)
    assert (slow.returncode, "going down" in complaint) == (75, True)
    mounted.start()
    answer = mounted.run("scrub", mounted.mountpoint, "--json", "--rate", "0").json()
    assert (answer["resumed"], answer["findings"], answer["exit_code"]) == (True, [], 0)
