"""Chromium without a window, told what to do by its DevTools protocol over a pair of pipes; and what it has to say."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

_PATIENCE_S = 60.0


def chromium() -> str:
    """Skips where it is not installed."""
    return shutil.which("chromium") or pytest.skip("chromium is not installed (scripts/browser)")


class Browser:
    """One page at a time. Its own directory, no network, and no sandbox, which root cannot have."""

    def __init__(self, directory: Path) -> None:
        command = [
            chromium(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
            "--proxy-server=127.0.0.1:9",  # whatever it asked for would fail, and be told
            *("--remote-debugging-pipe", f"--user-data-dir={directory}", "about:blank"),
        ]
        # It reads from descriptor 3 and writes to 4.
        theirs_in, self._ours_out = os.pipe()
        self._ours_in, theirs_out = os.pipe()

        def place() -> None:
            high = os.dup(theirs_out)  # not in the way of 3
            os.dup2(os.dup(theirs_in), 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
            start_new_session=True,
            env={**os.environ, "HOME": str(directory)},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._buffer = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = next(each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """What is answered; events that come meanwhile are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ours_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._ours_in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium does not answer"
            some = os.read(self._ours_in, 1 << 16)
            assert some, "chromium has ended"
            self._buffer += some
        message, _, self._buffer = self._buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def open(self, page: Path, *, width: int, is_phone: bool = False) -> None:
        """Show a file in a window of that width, until it is loaded and drawn. Forgets the events of before."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=is_phone)
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of such events since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours_in)
        os.close(self._ours_out)
