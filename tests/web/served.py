"""A served page on a thread, whose answers are made of given sources instead of asked ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from services.base.errors import UnavailableError
from services.web.served_page import AskedView, served_page
from services.web.shown import shown_text
from tests.web.test_token_page import page_of

TOKEN = "a-token-of-the-test"
MAX_REQUEST_BYTES = 100_000
CHOICES: dict[str, Any] = {
    "splits": {"train": 7, "held_out": 3},
    "strategies": ["recipe", "avg_ce", "min_ce", "fixed", "online"],
    "recipe_strategy": "avg_ce",
    "first": {"split": "held_out", "window": 1, "text": None, "strategies": ["recipe", "min_ce"], "top": 5},
}


async def answer(asked: AskedView) -> dict[str, Any]:
    """Views of the text that is asked for; the text "gone" finds no source."""
    if asked.text == "gone":
        raise UnavailableError("source <b>one</b> does not answer")
    before = ""
    if asked.messages is not None:
        text, before = asked.messages[-1]["content"], str(asked.messages[:-1])
    else:
        text = asked.text if asked.text is not None else f"window {asked.window} of {asked.split}: the cat sat."
    _, view = page_of(text.encode())
    return {
        "view": view | {"strategies": view["strategies"][: len(asked.strategies)]},
        "title": f"<i>{len(text)} characters</i>",
        "before": shown_text(before),
    }


@contextmanager
def served() -> Iterator[str]:
    """The address of the page, without the token."""
    app = served_page(answer, CHOICES, title="<b>recipe</b>", token=TOKEN, max_request_bytes=MAX_REQUEST_BYTES)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    started = threading.Event()

    async def serve() -> None:
        startup = server.startup

        async def telling(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = telling  # type: ignore[method-assign]
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
