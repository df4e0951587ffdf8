"""`fusion view` as a page of two real sources: it prints its address, answers, and an interrupt ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from typer.testing import CliRunner

from services.cli.app import app
from services.commands.analysis.scoring import opened_fuser
from services.commands.analysis.serve_view import view_app
from services.commands.prepare import corpus_and_target, prepare
from services.recipes.load import load_recipe
from services.web.served_page import AskedView
from tests.commands.analysis.conftest import write_recipe

ASKED: list[tuple[dict[str, Any], int, str]] = [
    ({"window": 3, "split": "held_out", "strategies": ["recipe", "online"]}, 200, ""),
    ({"text": "The cat sat.", "strategies": ["fixed", "min_ce"], "top": 2}, 200, ""),
    ({"window": 9999, "split": "held_out"}, 400, "window 9999: split held_out has windows 0 to"),
    ({"window": 0, "split": "test"}, 400, "split test: the corpus has train, held_out"),
    ({"text": ""}, 400, "text: must not be empty"),
    ({"text": "x" * 100_000}, 400, "text: 100000 bytes, service.max_text_bytes allows"),
    ({"messages": []}, 400, "messages: must not be empty"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, 400, "messages[0].role: the last message must be"),
    ({"messages": [{"role": "cat", "content": "Hi"}]}, 400, "messages[0].role: 'cat' is none of"),
]


def test_windows_and_texts_are_answered_and_mistakes_named(
    models: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, models, addresses))
    prepare(recipe, save=False)
    corpus = corpus_and_target(recipe)
    headers = {"Authorization": "Bearer secret"}

    async def ask() -> None:
        async with opened_fuser(recipe) as fuser:
            page = view_app(recipe, corpus, fuser, AskedView(window=0), "secret")
            transport = httpx.ASGITransport(page)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
                for asked, status, message in ASKED:
                    answer = await client.post("/view", json=asked)
                    found = answer.json()
                    assert (answer.status_code, message in found.get("error", "")) == (status, True), found
                    if "window" in asked and status == 200:
                        assert [each["name"] for each in found["view"]["strategies"]] == ["avg_ce by window", "online"]
                        text = corpus.window("held_out", 3).text.decode()
                        assert "".join(found["view"]["tokens"]).replace("⏎\n", "\n").startswith(text)
                    elif status == 200:
                        assert found["view"]["strategies"][0]["name"] == "fixed small 1, large 1"

    asyncio.run(ask())


def test_the_command_prints_an_address_and_ends_on_an_interrupt(
    models: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, models, addresses)
    command = [
        sys.executable,
        "-m",
        "services.cli.app",
        "view",
        recipe,
        "--text",
        "The cat sat.",
        "--against",
        "online",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next((line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:")), "")
            assert address, process.stderr.read() if process.stderr else ""
            page = httpx.get(address)
            assert page.status_code == 200 and "The cat sat." in page.text
            token = address.partition("token=")[2]
            asked = {"text": "The cat sat.", "strategies": ["recipe", "online"]}
            url = address.partition("?")[0] + "view"
            answer = httpx.post(url, json=asked, headers={"Authorization": f"Bearer {token}"}, timeout=60)
            assert answer.status_code == 200, answer.text
            port = address.partition("/?")[0].rpartition(":")[2]
            taken = CliRunner().invoke(app, ["view", recipe, "--port", port])
            assert taken.exit_code == 2 and f"--port {port}: Address already in use" in taken.output
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(30) == 0 and "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
        finally:
            process.kill()
