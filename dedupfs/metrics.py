"""What a mount tells Prometheus, in its text format over HTTP, on a Unix socket or a TCP port. Only when asked to.

Numbers alone, and no names: whoever can reach the socket may have them. Each scrape looks anew, in a thread of its own.
"""

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector, CollectorRegistry

from .errors import Busy, SourceError
from .health import CHECKS

_PATIENCE_S = 10.0  # for a client that neither reads nor writes
_LOCALLY = "127.0.0.1"

# Name, help, and the key of what `look` answers.
_GAUGES = (
    ("files", "Settled files", "files"),
    ("logical_bytes", "Size of all settled files, as applications see them", "logical_bytes"),
    ("stored_bytes", "Size of their contents, each counted once", "stored_bytes"),
    ("saved_bytes", "What sharing saves", "saved_bytes"),
    ("references", "Files that refer to a blob", "references"),
    ("shared_files", "Files that share extents", "shared_files"),
    ("blobs", "Common contents", "blobs"),
    ("pending_files", "Files that wait to be settled", "pending"),
    ("scanning", "Whether a scan is running", "scanning"),
    ("passthrough", "Whether the kernel reads and writes files without the daemon", "passthrough"),
    ("damaged", "Contents that a scrub found damaged and nobody has put right", "damaged"),
    ("scrub_finished_timestamp_seconds", "When a scrub last came to its end; 0: never", "scrub_finished_s"),
    ("filesystem_free_bytes", "What is free on the filesystem of the source", "free_bytes"),
    ("index_used_ratio", "How much of the room that the index can have is used", "index_used_share"),
    ("healthy", "Whether dedupfs health finds nothing wrong", "healthy"),
)

Look = Callable[[], Mapping[str, object]]


class _Source(Collector):
    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        facts = self._look()
        for name, text, key in _GAUGES:
            yield GaugeMetricFamily(f"dedupfs_{name}", text, value=_number(facts[key]))
        yield CounterMetricFamily("dedupfs_settled_files", "Files that were settled", value=_number(facts["settled"]))
        family = GaugeMetricFamily("dedupfs_problem", "Whether a check of dedupfs health fails", labels=["check"])
        failing = facts["failing"]
        for check in CHECKS:
            family.add_metric([check], float(isinstance(failing, set) and check in failing))
        yield family


def _number(fact: object) -> float:
    return float(fact) if isinstance(fact, (int, float)) else 0.0


class _Handler(MetricsHandler):
    timeout = _PATIENCE_S


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news, and what it asked for failed for nobody else."""


class Exporter:
    """Answers at one address from `start` until `close`."""

    def __init__(self, address: str, look: Look) -> None:
        """`address`: the absolute path of a socket, or [HOST:]PORT, of this machine alone unless HOST says otherwise.

        Raises OSError; SourceError when something else is in the socket's place, Busy when somebody listens there.
        """
        registry = CollectorRegistry()
        registry.register(_Source(look))
        handler = _Handler.factory(registry)
        self._path = address if address.startswith("/") else None
        if self._path is not None:
            _make_way(self._path)
            server = type("_UnixServer", (_Server,), {"address_family": socket.AF_UNIX, "allow_reuse_address": False})
            self._server: _Server = server(self._path, handler)
            os.chmod(self._path, 0o666)  # as a port would be; only numbers are told
        else:
            host, _, port = address.rpartition(":")
            host = host.strip("[]") or _LOCALLY
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            server = type("_InetServer", (_Server,), {"address_family": family})
            try:
                self._server = server((host, int(port)), handler)
            except OSError as error:
                raise OSError(error.errno, f"cannot tell metrics at {address}: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)


def _make_way(path: str) -> None:
    """Remove the socket that a killed daemon left."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SourceError(f"{path} is no socket; name another place for metrics")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise Busy(f"somebody else listens at {path}; name another place for metrics")
