"""The page as a small HTTP application: what it shows is asked for by the page, behind a token.

The token is in the address that opens the page, and the page sends it with every question. No cookie is set, so that no
other page can ask in a reader's name.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from services.base.errors import ServiceError
from services.web.token_page import asking_page

StrategyName = Literal["recipe", "avg_ce", "min_ce", "fixed", "online"]
"""A strategy to fuse by; `recipe` stands for the recipe's own with all its settings."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_log = logging.getLogger(__name__)


class AskedView(BaseModel):
    """What a page asks for: a window of a split, a text, or a conversation whose last message is scored.

    Attributes:
        split, window: name of the split, and place in it.
        text: a text of one's own.
        messages: a conversation, role and content of each message.
        strategies: one, or two to compare.
        top: candidates shown per row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = ""
    window: int | None = Field(default=None, ge=0)
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    strategies: tuple[StrategyName, ...] = Field(default=("recipe",), min_length=1, max_length=2)
    top: int = Field(default=5, ge=1, le=50)

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if sum(given is not None for given in (self.window, self.text, self.messages)) != 1:
            raise ValueError("window, text, messages: give one of them")
        return self


def served_page(
    answer: Callable[[AskedView], Awaitable[dict[str, Any]]],
    choices: dict[str, Any],
    *,
    title: str,
    token: str,
    max_request_bytes: int,
) -> Starlette:
    """Return the application: `/` is the page, `/view` answers what it asks for.

    Args:
        answer: gives `view`, `title` and `before` for the page to show.
        choices: as `asking_page` takes them.
        title: heading of the page before it shows a text.
        token: without it nothing is answered.
        max_request_bytes: of one question.
    """
    page = asking_page(choices, title=title)

    async def index(request: Request) -> Response:
        if not _matches(request.query_params.get("token", ""), token):
            return Response("Open the address that `fusion view` printed: it carries the token.\n", 401, _HEADERS)
        return HTMLResponse(page, headers=_HEADERS)

    async def view(request: Request) -> Response:
        if not _matches(request.headers.get("authorization", "").removeprefix("Bearer "), token):
            return _error(401, "authorization: the token is missing or wrong; open the address that was printed")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > max_request_bytes:
                return _error(413, f"at most {max_request_bytes} bytes are accepted")
        try:
            return JSONResponse(await answer(AskedView.model_validate_json(body)), headers=_HEADERS)
        except ValidationError as error:
            return _error(400, "\n".join(map(_mistake, error.errors())))
        except (ServiceError, ValueError) as error:
            return _error(400, str(error))
        except Exception:
            _log.exception("a view could not be made")
            return _error(500, "this failed inside `fusion view`; its terminal says more")

    return Starlette(routes=[Route("/", index), Route("/view", view, methods=["POST"])])


def _matches(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), token.encode())


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, _HEADERS)


def _mistake(error: Any) -> str:
    """Return a line that names the key of a mistake and says what is allowed."""
    key = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
