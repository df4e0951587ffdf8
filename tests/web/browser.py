"""A Chromium without a window, driven over its debugging pipe: no driver and no library is needed.

It is the program in the environment variable FUSION_CHROMIUM, or one on the path.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
_SECONDS = 60.0
"""Longest time that an answer may take: the browser starts slowly on a busy machine."""
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio")
_STARTER = 'exec 3<&0 4>&1 0</dev/null 1>&2; exec "$0" "$@"'


def chromium() -> str | None:
    """The program, None where there is none."""
    return os.environ.get("FUSION_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page of a running browser; `errors` are the exceptions of its programs and its console's error lines."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        program = chromium()
        assert program is not None
        flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _STARTER, program, *flags, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(profile.parent / "chromium.log").open("wb"),
        )
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(found["targetId"] for found in targets if found["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def errors(self) -> list[dict[str, Any]]:
        raised = [event["params"] for event in self._events if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in self._events if event["method"] == "Log.entryAdded"]
        return raised + [entry for entry in logged if entry["level"] == "error"]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for since `open` was called, the page's own among them."""
        return [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def open(self, page: Path | str) -> None:
        """Open a file or an address and wait until it is loaded."""
        self.call("Network.enable")
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true; the page itself looks, every 5 ms."""
        look = f"(function look() {{ if ({expression}) done(true); else setTimeout(look, 5); }})();"
        promise = f"new Promise((done) => {{ {look} }})"
        answer = self.call("Runtime.evaluate", expression=promise, awaitPromise=True, returnByValue=True)
        assert answer["result"].get("value") is True, answer

    def type(self, text: str) -> None:
        """Put text where the focus is, as a paste does."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        x, y = self.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getClientRects()[0];"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], _SECONDS)
            assert ready, "the browser does not answer"
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
