"""DeepSpeed-MII's names for a server and its clients: `splitfuse.serve(model)`, `splitfuse.client(url)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any

from ._core import InvalidArgument, StateError
from ._http import Address, Calls, ServerError
from ._server_process import ServerProcess
from .mii import MiiParams, Response, prompt_list

_AT_ONCE = 256  # prompts that are asked at once: as many sequences as a server's forward holds by default
_DRAIN = 30.0  # seconds; `splitfuse serve`'s default
_BEYOND_DRAIN = 10.0  # seconds in which a server that has drained is to be gone
_ENDING = 1.0  # seconds between the end of a process's connections and its own

# Also what MII has no name for: else the server would take what the model's makers advise.
_SENT = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "ignore_eos",
)

StreamingFn = Callable[[list[Response]], None]


def serve(
    model: str | os.PathLike[str],
    *,
    port: int | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> Client:
    """Starts a server of `model` in a process of its own, waits until it is ready, at most `timeout` seconds,
    and returns a client of it.

    port: None takes a free one. api_key: what the server is to ask of clients; other processes can't see it.
    options: those of `splitfuse serve`, as its --help lists them, with underscores: `token_budget=512`,
    `prefix_caching=False`, `served_model_name=["a", "b"]`. Raises ServerError, with what the server printed, if
    it does not start. It ends with `terminate_server()`, a `with` block, or this process.
    """
    arguments = [os.fspath(model), f"--port={port or 0}", *_arguments(options)]
    process = ServerProcess(arguments, options.get("drain_timeout", _DRAIN) + _BEYOND_DRAIN, api_key)
    return Client(process.wait_ready(timeout), api_key, process)


def client(url: str, api_key: str | None = None) -> Client:
    """A client of the server that runs at `url`. Raises ServerError if there is none."""
    return Client(url, api_key)


class Client:
    """Made by `serve` and `client`. Safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None = None, process: ServerProcess | None = None) -> None:
        self._address = Address(url)
        self._api_key = api_key
        self._process = process
        self._terminated = False
        self.url = self._address.url
        with self._calls() as calls:
            card = calls.get("/v1/models")["data"][0]
        self.model: str = card["id"]
        """The name that the server gives its model."""
        self.max_model_len: int = card["max_model_len"]
        """Longest sequence, prompt and answer together, in tokens."""

    def generate(
        self, prompts: str | Sequence[str], streaming_fn: StreamingFn | None = None, **params: Any
    ) -> list[Response]:
        """One Response a prompt, in order, with the parameters and defaults of `Pipeline`. The first that fails
        ends them all: what the server refuses is an InvalidArgument, or a QueueFull if it has too much to do;
        other failures are a ServerError."""
        wanted = MiiParams(**params)
        wanted.sampling(None)  # what is wrong with it has nothing to do with any prompt
        texts = prompt_list(prompts, streaming_fn is not None)

        def answer(calls: Calls, index: int) -> Response:
            text = texts[index]
            shown = text if wanted.return_full_text else ""
            try:
                body = self._body(calls, wanted, {"prompt": text})
                return _ask(calls, "/v1/completions", body, streaming_fn, shown)
            except InvalidArgument as error:
                raise (error if len(texts) == 1 else InvalidArgument(f"prompt {index}: {error}")) from None

        with self._calls() as calls:
            if len(texts) == 1:
                return [answer(calls, 0)]
            return _together(calls, answer, len(texts))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], streaming_fn: StreamingFn | None = None, **params: Any
    ) -> Response:
        """The answer to a conversation, a list of {"role": ..., "content": ...}; as `generate` otherwise."""
        wanted = MiiParams(**params)
        if wanted.return_full_text:
            raise InvalidArgument("a conversation has no full text: leave return_full_text out")
        with self._calls() as calls:
            body = self._body(calls, wanted, {"messages": list(messages)})
            return _ask(calls, "/v1/chat/completions", body, streaming_fn, "")

    def terminate_server(self) -> None:
        """Ends the server that `serve` started: it finishes what it is doing for as long as its drain timeout
        allows. Doing it again does nothing."""
        if self._process is None:
            raise StateError(
                f"the server at {self.url} was not started by this client, so it is not for it to end"
            )
        self._terminated = True
        self._process.end()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.terminate_server()

    def __repr__(self) -> str:
        return f"<Client of {self.model} at {self.url}>"

    @contextmanager
    def _calls(self) -> Iterator[Calls]:
        """Calls that are broken off if the block fails, Ctrl-C included."""
        if self._terminated:
            raise StateError("the server was terminated")
        calls = Calls(self._address, self._api_key)
        try:
            yield calls
        except BaseException as error:
            calls.break_off()
            unanswered = isinstance(error, ServerError) and error.status is None
            if unanswered and self._process is not None and self._process.ends_within(_ENDING):
                raise ServerError(f"the server has ended, {self._process.how_it_ended()}") from error
            raise

    def _body(self, calls: Calls, wanted: MiiParams, asked: dict[str, Any]) -> dict[str, Any]:
        """The body of a request. How long a prompt is, only the server knows."""
        length = None
        if wanted.max_length is not None or wanted.max_new_tokens is None:
            length = calls.post("/tokenize", {"model": self.model, **asked})["count"]
        sampling = wanted.sampling(length)
        body = {"model": self.model, **asked}
        body |= {name: getattr(sampling, name) for name in _SENT}
        if sampling.max_tokens is None:
            body["max_tokens"] = max(1, self.max_model_len - (length or 0))
        return body


def _ask(
    calls: Calls, path: str, body: dict[str, Any], streaming_fn: StreamingFn | None, shown: str
) -> Response:
    """`shown`: text that the answer's is to begin with."""
    if streaming_fn is not None:
        return _stream(calls, path, body, streaming_fn, shown)
    reply = calls.post(path, body)
    choice, usage = reply["choices"][0], reply["usage"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Response(shown + text, usage["prompt_tokens"], usage["completion_tokens"], choice["finish_reason"])


def _stream(calls: Calls, path: str, body: dict[str, Any], streaming_fn: StreamingFn, shown: str) -> Response:
    body["stream"] = True
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    read, made, text, reason = 0, 0, "", None
    with closing(calls.stream(path, body)) as events:
        for event in events:
            for choice in event["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                more = event["usage"]["completion_tokens"] - made
                reason = choice.get("finish_reason")
                if piece or more or reason:  # a chat begins with an empty one
                    read, made = event["usage"]["prompt_tokens"], made + more
                    piece, shown = shown + piece, ""
                    text += piece
                    streaming_fn([Response(piece, read, more, reason)])
    return Response(text, read, made, reason)


def _together(calls: Calls, answer: Callable[[Calls, int], Response], count: int) -> list[Response]:
    with ThreadPoolExecutor(min(count, _AT_ONCE) or 1, "splitfuse-client") as pool:
        try:
            futures = [pool.submit(answer, calls, index) for index in range(count)]
            done = wait(futures, return_when=FIRST_EXCEPTION).done
            return [future.result() for future in futures if future in done]
        except BaseException:
            calls.break_off()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as those of a command line."""
    arguments = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            arguments += [f"--{option}={each}" for each in value]
        elif value is not None:
            arguments.append(f"--{option}={value}")
    return arguments
