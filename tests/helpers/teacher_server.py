"""A small server with vLLM's protocol for teachers: `/v1/models`, `/tokenize`, `/v1/completions`.

Standard library only, on a thread. Faults are injected by name, one per request to
`/v1/completions`.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

FAULTS = ("slow", "500", "429", "cut", "nan", "missing", "short", "few", "empty", "mass")


class TeacherServer:
    """Serves `model` until `close`; a context manager.

    Args:
        vocab_size: rows of the vocabulary that the server knows; default: the model's.
        max_logprobs: largest `prompt_logprobs`.
        port: 0: a free one.

    Attributes:
        faults: names of `FAULTS`, or "down"; the next request takes the first. "down" stays.
        sequences: token sequences scored so far.
        scored: numbers of sequences per answered request.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_model_len: int = 128,
        max_logprobs: int = 10**9,
        vocab_size: int = 0,
        port: int = 0,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.vocab_size = vocab_size or model.config.vocab_size
        self.faults: deque[str] = deque()
        self.sequences, self.scored = [], []
        self._lock, self._closing = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                owner.reply(self, 200, owner.models())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    ids = owner.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
                    owner.reply(self, 200, {"tokens": ids, "count": len(ids), "max_model_len": owner.max_model_len})
                else:
                    owner.complete(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def wait(self):
        """Return when the server is closed."""
        self._closing.wait()

    def close(self):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def models(self):
        return {"object": "list", "data": [{"id": "tiny-teacher", "max_model_len": self.max_model_len}]}

    @staticmethod
    def reply(handler, status: int, body: Any, *, cut: bool = False, **headers: str):
        data = json.dumps(body).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if cut else data)
        except OSError:  # the client has given up
            pass
        handler.close_connection = True

    def complete(self, handler, body):
        with self._lock:
            fault = self.faults[0] if self.faults else None
            if fault not in (None, "down"):
                self.faults.popleft()
        if fault in ("500", "down"):
            return self.reply(handler, 500, {"error": {"message": "the engine is dead"}})
        if fault == "429":
            return self.reply(handler, 429, {"error": {"message": "busy"}}, Retry_After="0")
        if fault == "slow":
            self._closing.wait(30)
            return None  # the client has given up
        sequences, top_k = body["prompt"], body["prompt_logprobs"]
        if refusal := self.refusal(sequences, top_k):
            return self.reply(handler, 400, {"error": {"message": refusal, "type": "BadRequestError", "code": 400}})
        with self._lock, torch.no_grad():
            rows = [self.log_probabilities(sequence, top_k) for sequence in sequences]
            self.sequences += sequences
            self.scored.append(len(sequences))
        for row in rows:
            self.spoil(fault, row)
        choices = [
            {"index": i, "text": "", "prompt_logprobs": row, "finish_reason": "length"} for i, row in enumerate(rows)
        ]
        return self.reply(handler, 200, {"choices": choices[:-1] if fault == "empty" else choices}, cut=fault == "cut")

    def refusal(self, sequences, top_k) -> str:
        if top_k > self.max_logprobs:
            return f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs}"
        if (largest := max(map(max, sequences))) >= self.vocab_size:
            return f"Token id {largest} is out of vocabulary"
        if (longest := max(map(len, sequences))) + 1 > self.max_model_len:
            return f"maximum context length is {self.max_model_len} tokens, but the request has {longest} + 1"
        return ""

    def log_probabilities(self, sequence, top_k):
        """vLLM's `prompt_logprobs`: `None`, then per token the top k and the token itself."""
        logits = self.model(torch.tensor([sequence])).logits[0, :, : self.vocab_size].float()
        logp = logits.log_softmax(-1)
        top, owns = logp.topk(top_k), torch.tensor(sequence[1:])
        own_values = logp[:-1].gather(1, owns[:, None])[:, 0]
        own_ranks = 1 + (logp[:-1] > own_values[:, None]).sum(1)
        values, ids = top.values.tolist(), top.indices.tolist()
        rows: list[Any] = [None]
        for position, own in enumerate(sequence[1:]):
            found = {
                str(token): {"logprob": value, "rank": rank, "decoded_token": ""}
                for rank, (token, value) in enumerate(zip(ids[position], values[position], strict=True), 1)
            }
            last = {"logprob": float(own_values[position]), "rank": int(own_ranks[position]), "decoded_token": ""}
            rows.append(found | {str(own): last})
        return rows

    @staticmethod
    def spoil(fault, row):
        last = row[-1]
        if fault == "nan":
            last[next(iter(last))]["logprob"] = math.nan
        elif fault == "missing":
            row[-1] = None
        elif fault == "short":
            row.pop()
        elif fault == "few":
            row[-1] = dict(list(last.items())[-1:])
        elif fault == "mass":
            for entry in last.values():
                entry["logprob"] = 0.0
