"""Health tells of what somebody must see to, and of nothing else."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupfs.errors import Busy, IndexDamaged, SourceError
from dedupfs.index import Batch
from dedupfs.metrics import Exporter

from .bench import Bench, silent
from .test_damage import DATA, _rot_without_a_trace, rot, share


def failing(bench: Bench) -> set[str]:
    health = bench.engine.health()
    assert all("\n" not in problem.problem for problem in health.problems)
    # How full the disk of the tests is, is nobody's business here.
    return {problem.check for problem in health.problems} - {"disk"}


def test_all_is_well(bench: Bench) -> None:
    share(bench, "one", "two")
    assert failing(bench) == set()
    assert bench.engine.health().as_json()["free_bytes"] == (
        (st := bench.engine.backing.statvfs(b"")).f_bavail * st.f_frsize
    )


def test_damage_until_it_is_put_right(bench: Bench) -> None:
    share(bench, "one", "two")
    rot(bench.the_blob())
    assert failing(bench) == set()  # nobody knows yet
    bench.expect_log("scrub: ", "was damaged; healed")
    bench.engine.scrub(silent, 0)
    assert failing(bench) == {"damage"}
    bench.reopen()
    assert failing(bench) == {"damage"}
    bench.write("good", DATA)
    bench.settle()
    assert failing(bench) == set()


def test_a_rotten_file_until_it_is_gone(bench: Bench) -> None:
    bench.write("alone", DATA)
    bench.settle()
    _rot_without_a_trace(bench, "alone")
    bench.expect_log("scrub: ")
    bench.engine.scrub(silent, 0)
    assert failing(bench) == {"damage"}
    bench.unlink("alone")
    bench.settle()
    assert failing(bench) == set()


def test_an_index_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, broken = Batch.commit, threading.Event()

    def refusing(batch: Batch) -> None:
        if broken.is_set() and len(batch):
            raise IndexDamaged("the index cannot be written (no space left)")
        commit(batch)

    monkeypatch.setattr(Batch, "commit", refusing)
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.01)
    bench.expect_log("trying again until it can be")
    bench.reopen(start=True)
    broken.set()
    bench.write("one", DATA)
    bench.wait_for(lambda: failing(bench) == {"index"})
    broken.clear()
    bench.wait_for(lambda: failing(bench) == set())


def test_settling_that_is_stuck(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr("dedupfs.health._STUCK_S", 0.05)
    bench.reopen(start=True)
    with bench.engine.settler._batch_lock:
        bench.write("one", DATA)
        bench.wait_for(lambda: failing(bench) == {"settling"})
        assert not held.is_set()
    bench.settle()
    bench.wait_for(lambda: failing(bench) == set())


# -- metrics


def scrape(address: str) -> dict[str, float]:
    if address.startswith("/"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(address)
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    else:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            answer = reply.read().decode()
    lines = [line for line in answer.splitlines() if line.startswith("dedupfs_")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@contextmanager
def exporting(bench: Bench, address: str) -> Iterator[None]:
    exporter = Exporter(address, bench.engine.metrics)
    exporter.start()
    try:
        yield
    finally:
        exporter.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_metrics_on_a_socket(bench: Bench, tmp_path: Path) -> None:
    share(bench, "one", "two", "three")
    path = tmp_path / "metrics.sock"
    with exporting(bench, str(path)):
        found = scrape(str(path))
        assert found["dedupfs_files"] == 3
        assert found["dedupfs_saved_bytes"] == 2 * len(DATA)
        assert found["dedupfs_pending_files"] == 0
        assert found["dedupfs_settled_files_total"] >= 3
        assert found['dedupfs_problem{check="damage"}'] == 0
        assert found["dedupfs_scrub_finished_timestamp_seconds"] == 0
        bench.engine.scrub(silent, 0)
        assert scrape(str(path))["dedupfs_scrub_finished_timestamp_seconds"] > 1.7e9
        with pytest.raises(Busy):
            Exporter(str(path), bench.engine.metrics)
    assert not path.exists()


def test_metrics_on_a_port(bench: Bench) -> None:
    port = free_port()
    with exporting(bench, str(port)):
        assert scrape(f"127.0.0.1:{port}")["dedupfs_files"] == 0
        with pytest.raises(OSError, match=f"cannot tell metrics at 127.0.0.1:{port}"):
            Exporter(f"127.0.0.1:{port}", bench.engine.metrics)
    with pytest.raises(urllib.error.URLError):
        scrape(f"127.0.0.1:{port}")


def test_a_dead_daemons_socket_is_taken_over(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with exporting(bench, str(path)):
        assert scrape(str(path))["dedupfs_files"] == 0
    path.write_text("somebody's")
    with pytest.raises(SourceError):
        Exporter(str(path), bench.engine.metrics)
    assert path.read_text() == "somebody's"
