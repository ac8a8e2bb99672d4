"""HTTP client of a teacher's server: timeouts, and retries with backoff."""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from effopd.errors import CompatibilityError, ConfigError, TeacherServerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Status codes after which a request is repeated, besides all from 500 on.
_TRANSIENT = (408, 425, 429)
#: Longest wait between two attempts, in seconds.
_LONGEST_WAIT = 30.0
#: Environment variable with the server's API key (`vllm serve --api-key`).
API_KEY = "VLLM_API_KEY"


class UnusableReplyError(Exception):
    """A reply lacks log-probabilities or has impossible ones. The request is repeated."""


class _Refused(Exception):
    """The server refused a request for its content, so a repetition cannot help."""


def server_url(text: str) -> str:
    """The server's base URL, without a trailing slash and without `/v1`.

    Raises:
        ConfigError: it is not an http or https URL with a host.

    Example:
        >>> server_url("http://localhost:8000/v1/")
        'http://localhost:8000'
    """
    try:
        parts = urlsplit(text.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"--teacher_server: expected a URL such as http://localhost:8000, got {text!r}.")
    return text.strip().rstrip("/").removesuffix("/v1").rstrip("/")


class TeacherClient:
    """JSON requests to one server; safe to use from several threads.

    No proxy is used. If the environment variable `VLLM_API_KEY` is set, it is sent as a bearer
    token. A request is repeated after a timeout, a cut or refused connection, a status of 408, 425,
    429 or at least 500, and a reply without usable content. The wait doubles from attempt to
    attempt, up to 30 seconds.

    Args:
        url: base URL of the server.
        timeout: seconds without data after which an attempt is given up.
        retries: attempts after the first one.
        wait: seconds before the second attempt.

    Attributes:
        received_bytes: bytes of all reply bodies so far.
        requests: attempts so far.
        retried: attempts so far that repeated another one.
    """

    def __init__(self, url: str, *, timeout: float = 120.0, retries: int = 5, wait: float = 0.5):
        self.url, self._timeout, self._retries, self._wait = server_url(url), timeout, retries, wait
        self._lock = threading.Lock()
        self.received_bytes, self.requests, self.retried = 0, 0, 0

    def call(self, path: str, body: Any = None, read: Callable[[Any], T] = lambda reply: reply) -> T:
        """`read(reply)` of a GET, or of a POST with `body`.

        Args:
            read: converts the reply; raises `UnusableReplyError` if the reply is unusable.

        Raises:
            TeacherServerError: no attempt succeeded.
            CompatibilityError: the server refused the request for its content.
        """
        retries, wait = self._retries, self._wait
        for attempt in range(retries + 1):
            hold = 0.0
            try:
                return read(self._attempt(path, body))
            except _Refused as error:
                raise CompatibilityError(f"the teacher's server {self.url}{path} refused a request: {error}") from None
            except _Busy as error:
                reason, hold = str(error), error.hold
            except TimeoutError:
                reason = f"no reply within {self._timeout:g} seconds"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            except (UnusableReplyError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                reason = f"unusable reply ({type(error).__name__.removesuffix('Error')}: {error})"
            if attempt < retries:
                pause = min(max(wait * 2**attempt, hold), _LONGEST_WAIT)
                logger.warning(
                    "The teacher's server %s%s: %s. Attempt %d of %d in %.1f seconds.",
                    self.url, path, reason, attempt + 2, retries + 1, pause,
                )  # fmt: skip
                with self._lock:
                    self.retried += 1
                time.sleep(pause)
        raise TeacherServerError(
            f"the teacher's server {self.url}{path} gave no usable reply in {retries + 1} attempt(s); the last one: "
            f"{reason}. Nothing was updated with it. Check that the server runs (vllm serve TEACHER), raise "
            "--teacher_server_timeout if it is slow, and continue with --resume_from_checkpoint true."
        )

    def _attempt(self, path: str, body: Any) -> Any:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self._timeout)
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self.requests += 1
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", parts.path + path, payload, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        with self._lock:
            self.received_bytes += len(data)
        if response.status in _TRANSIENT or response.status >= 500:
            raise _Busy(f"status {response.status} {_message(data)}", response.getheader("Retry-After"))
        if response.status != 200:
            raise _Refused(f"status {response.status} {_message(data)}")
        return json.loads(data)


class _Busy(Exception):
    """A transient status. `hold`: seconds that the server asks to wait."""

    def __init__(self, text: str, hold: str | None):
        super().__init__(text)
        self.hold = float(hold) if hold is not None and hold.isdecimal() else 0.0


def _message(data: bytes) -> str:
    """The message of an error reply, at most 300 characters."""
    text = data.decode(errors="replace")
    try:
        reply = json.loads(text)
        error = reply.get("error", reply)
        text = str(error.get("message", text) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]
