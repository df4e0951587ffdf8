"""A model behind HTTP as vLLM or SGLang serve it, without either: rows of a forward pass, and faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

Entry = tuple[int, float, str]


class ModelServer:
    """A running server and its faults.

    `statuses` are answered to the next POSTs, one each; `down` hangs up on everybody; `silent` keeps POSTs waiting;
    `spoil` changes the JSON value of an answer. `asked` are the bodies of all POSTs that were read.
    """

    def __init__(self, folder: Path, flavour: str, key: str | None = None) -> None:
        self.flavour, self.key = flavour, key
        self.root, self.max_model_len, self.max_logprobs = "org/tiny", 512, 32
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.statuses: list[int] = []
        self.down = False
        self.silent = threading.Event()
        self.released = threading.Event()
        self.spoil: Callable[[Any], Any] | None = None
        self.asked: list[dict[str, Any]] = []
        self.url = ""
        self._one_at_a_time = threading.Lock()

    def rows(self, ids: Sequence[int], top_k: int) -> list[tuple[Entry, list[Entry]]]:
        """Return for each token but the first its own entry, and the likeliest."""
        with self._one_at_a_time, torch.inference_mode():
            logprobs_TV = torch.log_softmax(self.model(torch.tensor([list(ids)])).logits[0, :-1], dim=-1)
            top = logprobs_TV.topk(top_k, dim=1)

        def entry(token_id: int, logprob: float) -> Entry:
            return token_id, logprob, self.tokenizer.decode([token_id])

        return [
            (entry(own, float(logprobs_TV[row, own])), list(map(entry, likeliest, values)))
            for row, (own, likeliest, values) in enumerate(
                zip(ids[1:], top.indices.tolist(), top.values.tolist(), strict=True)
            )
        ]

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and JSON value for the body of a POST."""
        ids = body["prompt"] if self.flavour == "vllm" else body["input_ids"]
        top_k = body.get("prompt_logprobs" if self.flavour == "vllm" else "top_logprobs_num")
        if top_k is None:
            return 200, self._sampled(ids, body)
        if top_k > self.max_logprobs:
            return 400, {"error": {"message": f"{top_k} is greater than max allowed: {self.max_logprobs}"}}
        rows = self.rows(ids, top_k)
        if self.flavour == "vllm":
            listed = [
                {str(i): {"logprob": p, "rank": n, "decoded_token": text} for n, (i, p, text) in enumerate([own, *top])}
                for own, top in rows
            ]
            return 200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *listed]}]}
        with_text = body["return_text_in_logprobs"]
        first = [None, ids[0], None]

        def listing(e: Entry) -> list[Any]:
            return [e[1], e[0], e[2] if with_text else None]

        new = [listing((0, -1.0, "")), listing((1, -2.0, ""))]
        meta = {
            **_sglang_meta(len(ids), 1),
            "input_token_logprobs": [first, *(listing(own) for own, _ in rows)],
            "output_token_logprobs": new[:1],
            "input_top_logprobs": [None, *([listing(e) for e in top] for _, top in rows)],
            "output_top_logprobs": [new],
        }
        return 200, {"text": "", "output_ids": [0], "meta_info": meta}

    def _sampled(self, ids: list[int], body: dict[str, Any]) -> Any:
        """Return the likeliest continuation, whatever the temperature."""
        wanted = body["max_tokens"] if self.flavour == "vllm" else body["sampling_params"]["max_new_tokens"]
        new: list[int] = []
        for _ in range(wanted):
            new.append(self.rows([*ids, *new, 0], 1)[-1][1][0][0])
        if self.flavour == "vllm":
            return {"choices": [{"token_ids": new}]}
        return {"text": "", "output_ids": new, "meta_info": _sglang_meta(len(ids), wanted)}


def _sglang_meta(num_prompt: int, num_new: int) -> dict[str, Any]:
    """What SGLang says of every answer of its /generate."""
    return {
        "id": "0123456789abcdef",
        "finish_reason": {"type": "length", "length": num_new},
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "cached_tokens": 0,
        "weight_version": "default",
        "e2e_latency": 0.01,
    }


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                model = {"id": "tiny", "root": server.root, "max_model_len": server.max_model_len}
                self._say(200, {"object": "list", "data": [model]})
            elif self.path in {"/version", "/get_server_info"}:
                self._say(200, {"version": "9.8.7"})
            else:
                self._say(200 if self.path == "/health" else 404, None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != ("/v1/completions" if server.flavour == "vllm" else "/generate"):
                self._say(404, {"detail": "Not Found"})
                return
            server.asked.append(body)
            if server.silent.is_set():
                server.released.wait(60)
            if server.statuses:
                self._say(server.statuses.pop(0), {"error": f"not now, {self.headers['Authorization']}"})
                return
            status, value = server.answer(body)
            self._say(status, value if server.spoil is None else server.spoil(value))

        def _say(self, status: int, value: Any) -> None:
            if server.down:
                self.close_connection = True
                self.connection.close()
                return
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                status, value = 401, {"error": f"wrong key {self.headers['Authorization']}"}
            data = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

        def finish(self) -> None:
            if not server.down:
                super().finish()

    return Handler


@contextmanager
def model_server(folder: Path, flavour: str = "vllm", key: str | None = None) -> Iterator[ModelServer]:
    server = ModelServer(folder, flavour, key)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    http.handle_error = lambda *client: None  # type: ignore[method-assign]  # of clients that have left
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join(10)
