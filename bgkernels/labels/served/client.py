"""Requests to inference servers: many at once, and again where a server was only busy or away.

``urllib3`` brings connections that are kept and shared by threads, and rules of what to try again
and when. It has no dependencies of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from bgkernels.labels.errors import ServerError
from bgkernels.training.errors import extra

T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 32
"""Requests at once."""
KEY = "VLLM_API_KEY"
"""The variable of the environment that holds the key, as for the server."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which a request is sent again."""


@dataclass
class Server:
    """One of several that share the load.

    Args:
        url: ``http://host:port``.
        in_flight: requests that it has not answered.
        rests_until: when it may be asked again, after it failed, by ``time.monotonic``.
    """

    url: str
    in_flight: int = 0
    rests_until: float = 0.0


class Client:
    """Sends JSON to one server or to several of the same model.

    Each request goes to the server that has the fewest unanswered ones, and after a time-out, a cut
    connection, a refusal to connect, or a status in :data:`BUSY` again, after a pause that doubles
    and that the server may set (``Retry-After``). Others rest as long as one of them fails.

    Args:
        urls: ``http://host:port``, or several.
        api_key: sent as a bearer token, and never shown; None: that of ``VLLM_API_KEY``.
        in_flight: requests at once, of this machine: processes of ``torchrun`` share them out.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again; 10 last about five minutes.
        backoff: seconds before the second repetition.

    Raises:
        ServerError: a URL is none, or holds a password.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key: str | None = None,
        in_flight: int = IN_FLIGHT,
        timeout: float = 300.0,
        retries: int = 10,
        backoff: float = 0.5,
    ) -> None:
        with extra("served"):
            import urllib3
        if in_flight < 1:
            raise ServerError(f"`in_flight` must be at least 1; got {in_flight}")
        listed = urls.split(",") if isinstance(urls, str) else urls
        self.servers = [Server(_checked(url)) for url in listed]
        key = os.environ.get(KEY) if api_key is None else api_key
        self._secret = {"Authorization": f"Bearer {key}"} if key else {}
        self.in_flight = max(1, in_flight // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._connections = urllib3.PoolManager(
            len(self.servers),
            maxsize=self.in_flight,
            timeout=urllib3.Timeout(connect=min(10.0, timeout), read=timeout),
        )
        self._rules = urllib3.Retry(
            retries,
            backoff_factor=backoff,
            backoff_max=60,
            allowed_methods=None,
            status_forcelist=BUSY,
        )
        self._failures = urllib3.exceptions.HTTPError
        self._given_up = urllib3.exceptions.MaxRetryError
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._threads = ThreadPoolExecutor(self.in_flight, "served")

    def __repr__(self) -> str:
        return f"Client({self.name!r})"

    @property
    def name(self) -> str:
        """The URLs."""
        return ", ".join(server.url for server in self.servers)

    def request(
        self, method: str, path: str, body: Any = None, *, url: str | None = None,
        again: bool = True,
    ) -> Any:  # fmt: skip
        """The answer, a ``urllib3.BaseHTTPResponse`` of status 200, or of 4xx if ``body`` is wrong.

        Args:
            method: ``"GET"`` or ``"POST"``.
            path: such as ``/v1/models``.
            body: sent as JSON; None: nothing is.
            url: of the server to ask; None: any.
            again: send it again where that may help; else an answer of any status is returned.

        Raises:
            ServerError: none answers, or the key is refused.
        """
        rules = self._rules if again else self._rules.new(total=0)
        while True:
            server, answer, error = self._take(url), None, None
            try:
                answer = self._connections.request(
                    method, server.url + path, json=body, headers=self._secret, retries=False
                )
            except self._failures as failure:
                error = failure
            finally:
                self._return(server)
            if answer is not None and (not again or answer.status not in BUSY):
                return self._allowed(answer, server)
            try:
                rules = rules.increment(method, server.url, answer, error)
            except self._given_up:
                raise ServerError(_unanswered(server, answer, error)) from None
            asked = rules.get_retry_after(answer) if answer is not None else None
            pause = rules.get_backoff_time() if asked is None else asked
            server.rests_until = time.monotonic() + max(pause, 0.05)
            others = url is None and any(x.rests_until <= time.monotonic() for x in self.servers)
            if not others and self._closed.wait(pause):
                raise ServerError(f"{server.url} was given up: the client is closed")

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function, which makes requests, in a thread; at most ``in_flight`` run at once."""
        return self._threads.submit(function, *arguments)

    def in_order(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``map(function, items)``, with requests of later items under way.

        Of what was asked and not yet taken there is at most twice ``in_flight``.
        """
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self.submit(function, item))
                if len(waiting) >= 2 * self.in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Forget what was not sent, and let no pause end in another attempt."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._connections.clear()

    def _take(self, url: str | None) -> Server:
        """The server for the next request: one that does not rest, with the fewest unanswered."""
        now = time.monotonic()
        with self._lock:
            among = [server for server in self.servers if url in (None, server.url)]
            server = min(among, key=lambda x: (x.rests_until > now, x.in_flight))
            server.in_flight += 1
        return server

    def _return(self, server: Server) -> None:
        with self._lock:
            server.in_flight -= 1

    def _allowed(self, answer: Any, server: Server) -> Any:
        if answer.status in (401, 403):
            have = "the key that was given" if self._secret else "a request without a key"
            raise ServerError(
                f"{server.url} refuses {have} (status {answer.status}); set {KEY} to that of the "
                "server, or pass `api_key`"
            )
        return answer


def message(answer: Any) -> str:
    """What a server says about a request that it refuses, in one line."""
    try:
        content = answer.json()
        text = content.get("error", content).get("message") or content.get("detail")
    except (ValueError, AttributeError):
        text = None
    return f"status {answer.status}" + (f": {' '.join(str(text).split())[:300]}" if text else "")


def _checked(url: str) -> str:
    """A URL without the slash at its end."""
    import urllib3

    try:
        parsed = urllib3.util.parse_url(url.strip())
    except urllib3.exceptions.LocationParseError:
        parsed = urllib3.util.Url()
    if parsed.auth is not None:
        raise ServerError(
            f"the URL of a server on {parsed.host} holds a password; leave it out, and set {KEY} "
            "or pass `api_key`"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError(
            f"the URL of a server must be such as http://localhost:8000; got {url.strip()!r}"
        )
    return parsed.url.rstrip("/").removesuffix("/v1")


def _unanswered(server: Server, answer: Any, error: Exception | None) -> str:
    if answer is not None:
        return f"{server.url} keeps answering with {message(answer)}; see the log of the server"
    reason = {"NewConnectionError": "nothing listens there", "NameResolutionError": "no such host"}
    kind = type(error).__name__
    return (
        f"{server.url} does not answer ({reason.get(kind, kind)}); check the URL, and that the "
        "server is up: vllm serve MODEL --runner pooling"
    )
