"""`fusion view` without a file: a page on the loopback interface that asks for windows, texts and conversations."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import uvicorn
from starlette.applications import Starlette

from services.commands.analysis.scoring import opened_fuser
from services.commands.analysis.view import corpus_window, own_conversation, own_text, view_of, with_strategy
from services.corpus.ledger import Corpus
from services.fusion.fuser import Fuser
from services.recipes.recipe import Recipe, RecipeError
from services.web.served_page import AskedView, StrategyName, served_page

_HOST = "127.0.0.1"
_LEAVING_SECONDS = 2
"""Time that answers under way have when the page is taken down."""


def serve_view(
    recipe: Recipe, corpus: Corpus, first: AskedView, *, port: int, print_line: Callable[[str], None]
) -> None:
    """Serve the page until an interrupt.

    Args:
        recipe: the run, whose target is prepared.
        corpus: its corpus.
        first: what the page shows when it opens.
        port: to listen on; 0 for a free one.
        print_line: gets the address, once the page is there.

    Raises RecipeError for a port that is taken.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_HOST, port))
        except OSError as error:
            raise RecipeError(f"--port {port}: {error.strerror}") from error
        token = secrets.token_urlsafe(24)
        address = f"http://{_HOST}:{listening.getsockname()[1]}/?token={token}"
        asyncio.run(_serve(recipe, corpus, first, listening, token, lambda: print_line(address)))


def view_app(recipe: Recipe, corpus: Corpus, fuser: Fuser, first: AskedView, token: str) -> Starlette:
    """Return the page's application, which asks the sources of an open fuser."""

    async def answer(asked: AskedView) -> dict[str, Any]:
        if asked.text is not None:
            chosen = own_text(recipe, asked.text.encode("utf-8", "surrogatepass"), "text")
        elif asked.messages is not None:
            chosen = own_conversation(recipe, asked.messages)
        else:
            assert asked.window is not None
            chosen = corpus_window(recipe, corpus, asked.split, asked.window)
        strategies = [
            recipe.fusion if name == "recipe" else with_strategy(recipe, name)
            for name in dict.fromkeys(asked.strategies)
        ]
        return await view_of(fuser, recipe, chosen, strategies, asked.top)

    choices = {
        "splits": {split: corpus.num_windows(split) for split in corpus.splits},
        "strategies": list(get_args(StrategyName)),
        "recipe_strategy": recipe.fusion.strategy,
        "first": first.model_dump(),
    }
    # A character may take six bytes where JSON spells it out.
    most = 6 * recipe.service.max_text_bytes + 65_536
    return served_page(answer, choices, title=recipe.name, token=token, max_request_bytes=most)


async def _serve(
    recipe: Recipe, corpus: Corpus, first: AskedView, listening: socket.socket, token: str, started: Callable[[], None]
) -> None:
    async with opened_fuser(recipe) as fuser:
        app = view_app(recipe, corpus, fuser, first, token)
        config = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=_LEAVING_SECONDS
        )
        await _Server(config, started).serve(sockets=[listening])


class _Server(uvicorn.Server):
    """A server that tells when it answers, and that an interrupt ends without an exception, so that what was scored is
    still written to the store."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
