"""What an operator decides about a server, in one immutable object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._core import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. Checked before anything is allocated for the request."""

    body_bytes: int = 32 << 20
    json_depth: int = 64
    header_bytes: int = 64 << 10
    headers: int = 256
    head_seconds: float = 20.0
    """For request line and headers to arrive, from the connection's first byte or none at all."""
    body_seconds: float = 60.0
    idle_seconds: float = 30.0
    """That a connection may stay open between two requests."""
    answers: int = 128
    """`n`."""
    prompts: int = 1024
    """Prompts of one completions request; prompts times `n` are held to `answers_in_all`."""
    answers_in_all: int = 4096
    stops: int = 16
    stop_length: int = 256
    """Of one stop string, in characters."""
    stop_token_ids: int = 256
    logit_bias: int = 1024
    logprobs: int = 20
    prompt_logprobs: int = 1 << 20
    """Entries of one response: prompt tokens, by logprobs of each, by `n`."""
    answer_logprobs: int = 1 << 20
    """Entries of one response that is not streamed: answers, by their longest length, by logprobs of each token."""
    repeated_tokens: int = 1 << 20
    """Of prompts that one response repeats: prompt tokens, by `n`, with echo or return_token_ids."""
    json_values: int = 1 << 20
    """Of a body: making objects of them holds up everybody."""
    queued: int = 4096
    """Requests that may wait for admission; one more is answered 429."""
    queued_tokens: int = 4 << 20
    """Prompt tokens of those that wait, likewise; about 40 bytes each."""
    open_bodies: int = 512 << 20
    """Bytes of all bodies that are arriving or whose requests are open; more are answered 503."""
    stream_items: int = 4096
    """Deltas of an answer, and log-probabilities in them, that may wait for a slow reader before it is cut off."""


@dataclass(frozen=True)
class Settings:
    """One field an option of `splitfuse serve`; seconds are seconds."""

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `splitfuse.engine_setup.load_engine`."""
    policy: str = "splitfuse"
    served_names: tuple[str, ...] = ()
    """Names that clients may use, the first one shown; empty: the model's own."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Any of these opens every route; empty: no key is asked for."""
    cors_origins: tuple[str, ...] = ()
    ui: bool | None = None
    """The page at /; None: on a loopback address only."""
    chat_template: str | None = None
    """Instead of the checkpoint's."""
    trust_request_chat_template: bool = False
    drain_timeout: float = 30.0
    """For requests to finish after SIGTERM."""
    stall_timeout: float = 30.0
    """A reader that takes nothing for so long is cut off."""
    health_timeout: float = 60.0
    """/health fails when work waits and no step has ended for so long."""
    restarts: int = 0
    """How often a failed engine is built anew."""
    stay_up: bool = False
    """When it has failed and no restarts are left: answer on, with /health at 503, instead of ending."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}")
        for name in ("drain_timeout", "stall_timeout", "health_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds, not {getattr(self, name)}")
        if self.limits.queued < 1:
            raise ConfigError(f"at least 1 request must be allowed to wait, not {self.limits.queued}")
        if self.limits.queued_tokens < 1:
            raise ConfigError(f"at least 1 token must be allowed to wait, not {self.limits.queued_tokens}")
        if self.limits.open_bodies < self.limits.body_bytes:
            raise ConfigError(
                f"open bodies may have {self.limits.open_bodies} bytes, and one of them {self.limits.body_bytes}"
            )
        if self.restarts < 0:
            raise ConfigError(f"restarts must be 0 or more, not {self.restarts}")
        if not all(self.api_keys):
            raise ConfigError("an API key is empty")
        if any(key != key.strip() for key in self.api_keys):
            raise ConfigError(
                "an API key begins or ends with white space, which a client's header would lose"
            )

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"

    @property
    def shows_ui(self) -> bool:
        return self.loopback if self.ui is None else self.ui
