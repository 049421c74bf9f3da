"""Clients over HTTP, as cheap as they can be: they share the machine with the server they measure."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._core import ConfigError
from .drive import Load
from .workload import Ask, Record

if TYPE_CHECKING:
    import aiohttp

_WORDS = (
    "the", "a", "of", "and", "to", "in", "is", "it", "on", "as", "at", "by", "we", "he", "or", "an", "be", "so", "if",
    "my", "up", "do", "no", "me", "us", "go", "am",
)  # fmt: skip
_FRAME = b"data: "
_DONE = b"[DONE]"
_BUSY = re.compile(r"^splitfuse:busy_seconds_total\S* (\S+)$", re.MULTILINE)
_ERROR_LENGTH = 200  # characters of a server's refusal that are kept

OnRecord = Callable[[Record], None]


@dataclass(frozen=True)
class HttpOptions:
    """How servers are spoken to. `model`: None asks /v1/models. `text`: prompts as words, about one a token."""

    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = None
    text: bool = False
    greedy: bool = False
    """Else FastGen's sampling."""
    timeout: float = 600.0
    """Seconds for one request."""


async def closed_loop(
    urls: Sequence[str],
    asks: Sequence[Ask],
    clients: int,
    *,
    options: HttpOptions,
    on_record: OnRecord | None = None,
    seed: int = 0,
) -> list[Record]:
    """`clients` that ask again as soon as they were answered; client i talks to server i modulo their number.
    `on_record` is called as each request ends, so what there is survives a cancellation."""
    remaining = iter(asks)
    starts = Load(clients=clients).first_arrivals(len(asks), seed)

    async def client(session: Session, number: int, start: float) -> None:
        await asyncio.sleep(start)
        for ask in remaining:
            await session.ask(urls[number % len(urls)], ask)

    return await _all(
        urls, options, on_record, lambda session: [client(session, i, s) for i, s in enumerate(starts)]
    )


async def poisson(
    urls: Sequence[str],
    asks: Sequence[Ask],
    rate: float,
    *,
    options: HttpOptions,
    on_record: OnRecord | None = None,
    seed: int = 0,
) -> list[Record]:
    """Requests at `rate` a second with exponential gaps, to the servers in turn."""
    starts = Load(rate=rate).first_arrivals(len(asks), seed)

    async def one(session: Session, number: int, start: float) -> None:
        await asyncio.sleep(start)
        await session.ask(urls[number % len(urls)], asks[number])

    return await _all(
        urls, options, on_record, lambda session: [one(session, i, s) for i, s in enumerate(starts)]
    )


async def all_at_once(
    url: str, asks: Sequence[Ask], *, options: HttpOptions, on_record: OnRecord | None = None
) -> list[Record]:
    """Each on a connection of its own."""
    return await _all([url], options, on_record, lambda session: [session.ask(url, ask) for ask in asks])


async def busy_seconds(urls: Sequence[str], options: HttpOptions) -> float | None:
    """What our servers have spent in steps since they started; None if one of them doesn't tell."""
    total = 0.0
    async with _http(options) as http:
        for url in urls:
            async with http.get(f"{url}/metrics") as response:
                found = _BUSY.search(await response.text()) if response.status == 200 else None
            if found is None:
                return None
            total += float(found[1])
    return total


async def _all(
    urls: Sequence[str],
    options: HttpOptions,
    on_record: OnRecord | None,
    make: Callable[[Session], list[Coroutine[Any, Any, None]]],
) -> list[Record]:
    async with _http(options) as http:
        session = Session(http, options, on_record)
        await session.find_model(urls[0])
        await asyncio.gather(*make(session))
    return session.records


def _http(options: HttpOptions) -> aiohttp.ClientSession:
    try:
        import aiohttp
    except ImportError:
        raise ConfigError("measuring servers needs aiohttp: pip install 'splitfuse[bench]'") from None
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=options.timeout),
        headers=headers,
    )


class Session:
    """Sends requests and keeps their records."""

    def __init__(self, http: aiohttp.ClientSession, options: HttpOptions, on_record: OnRecord | None) -> None:
        self.records: list[Record] = []
        self._http = http
        self._options = options
        self._on_record = on_record
        self._model = options.model

    async def find_model(self, url: str) -> None:
        if self._model is not None:
            return
        async with self._http.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise OSError(f"{url}/v1/models answers {response.status}: {await _told(response)}")
            self._model = (await response.json())["data"][0]["id"]

    async def ask(self, url: str, ask: Ask) -> None:
        """Adds the record of one request; whatever goes wrong is its error."""
        path, body = self._request(ask)
        record = Record(len(ask.prompt), ask.output, time.perf_counter())
        try:
            async with self._http.post(f"{url}{path}", data=body, headers=_JSON) as response:
                if response.status != 200:
                    record.error = f"{response.status}: {await _told(response)}"
                else:
                    await _read(response, record)
        except (OSError, asyncio.TimeoutError, ValueError) as error:
            record.error = str(error) or type(error).__name__
        except Exception as error:
            if not type(error).__module__.startswith("aiohttp"):
                raise
            record.error = f"{type(error).__name__}: {error}"
        record.ended = time.perf_counter()
        if record.error is None and record.count < ask.output:
            record.error = f"{record.count} tokens came, not {ask.output}"
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    def _request(self, ask: Ask) -> tuple[str, bytes]:
        """The answer's length is forced."""
        sampling = {"temperature": 0.0} if self._options.greedy else {"temperature": 1.0, "top_p": 0.9}
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": ask.output,
            "min_tokens": ask.output,
            "ignore_eos": True,
            **sampling,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = " ".join(_words(ask)) if self._options.text or self._options.endpoint == "chat" else None
        if self._options.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
            return "/v1/chat/completions", json.dumps(body).encode()
        body["prompt"] = ask.prompt if text is None else text
        return "/v1/completions", json.dumps(body).encode()


_JSON = {"Content-Type": "application/json"}


async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
    """Notes when tokens came, and how many the server says there were."""
    rest = b""
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *frames, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            if not frame.startswith(_FRAME) or frame.endswith(_DONE):
                continue
            answer = json.loads(frame[len(_FRAME) :])
            if error := answer.get("error"):
                record.error = str(error.get("message", error) if isinstance(error, dict) else error)[
                    :_ERROR_LENGTH
                ]
            if usage := answer.get("usage"):
                record.made = usage.get("completion_tokens")
            if any(_has_token(choice) for choice in answer.get("choices", ())):
                record.tokens.append(now)


def _has_token(choice: dict[str, Any]) -> bool:
    """The first frame of a chat has only a role. A token may have no text yet, while a character is incomplete."""
    delta = choice.get("delta")
    if delta is None:
        return True
    return bool(delta.get("content")) or choice.get("finish_reason") is not None or "role" not in delta


async def _told(response: aiohttp.ClientResponse) -> str:
    return (await response.text())[:_ERROR_LENGTH]


def _words(ask: Ask) -> Iterator[str]:
    rng = random.Random(str(ask.prompt))
    return (rng.choice(_WORDS) for _ in ask.prompt)
