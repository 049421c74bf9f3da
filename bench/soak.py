"""Minutes of well-formed and hostile clients on one server: does it grow, leak or forget?

    python bench/soak.py MODEL --minutes 10

Starts `splitfuse serve MODEL`, and all the time runs clients that ask properly (whole and streamed answers, chats,
batches), that leave in the middle, that send garbage, and that connect and say nothing. Prints a line every ten
seconds. Exit code 1 if a well-formed request was not answered, a KV block is held at the end, the server is not
healthy, or its memory grew by more than 5 % after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil

from splitfuse._server_process import ServerProcess

PROPER, LEAVING, LYING, SILENT = 12, 6, 3, 20  # clients of each kind
GROWTH = 1.05
SETTLED = 60.0  # seconds after which memory is held to what it was


class Soak:
    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.port = urlsplit(url).port
        self.counts: Counter[str] = Counter()
        self.bad: list[str] = []
        self.over = False
        self._rng = random.Random(seed)

    def body(self) -> tuple[str, dict]:
        rng = self._rng
        common = {"max_tokens": rng.randint(1, 60), "ignore_eos": True, "stream": rng.random() < 0.6}
        if rng.random() < 0.3:
            common |= {"n": rng.randint(1, 3)}
        if rng.random() < 0.3:
            common |= {"logprobs": rng.randint(0, 5)}
        if rng.random() < 0.3:
            common |= {"stop": ["zz", "qq"], "seed": rng.randrange(1000)}
        ids = [rng.randrange(200) for _ in range(rng.randint(1, 120))]
        if rng.random() < 0.4:
            logprobs = common.pop("logprobs", None)
            common |= {"logprobs": True, "top_logprobs": logprobs} if logprobs is not None else {}
            return "/v1/chat/completions", {
                **common,
                "messages": [{"role": "user", "content": "a b " * (len(ids) // 2)}],
            }
        prompt = [ids, ids[:5] or [1]] if rng.random() < 0.2 else ids
        return "/v1/completions", {**common, "prompt": prompt}

    async def proper(self, session: aiohttp.ClientSession) -> None:
        while not self.over:
            path, body = self.body()
            async with session.post(path, json=body) as answer:
                text = await answer.text()
            whole = text.endswith("data: [DONE]\n\n") if body["stream"] else '"usage"' in text
            self.counts["answered"] += 1
            if answer.status != 200 or not whole:
                self.bad.append(f"{answer.status} to {json.dumps(body)[:200]}: {text[-200:]}")

    async def leaving(self) -> None:
        while not self.over:
            path, body = self.body()
            body |= {"max_tokens": 200, "stream": True}
            heard = await self._raw(path, json.dumps(body).encode(), self._rng.random() * 0.2)
            self.counts["left in the middle" if heard.startswith(b"HTTP/1.1 200 ") else "left"] += 1

    async def lying(self) -> None:
        while not self.over:
            path, body = self.body()
            data = bytearray(json.dumps(body).encode())
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)
            heard = await self._raw(path, bytes(data), 0.1)
            self.counts["lied and were refused" if heard.startswith(b"HTTP/1.1 4") else "lied"] += 1

    async def silent(self) -> None:
        while not self.over:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            await asyncio.sleep(self._rng.random() * 5)
            writer.transport.abort()
            self.counts["silent"] += 1

    async def _raw(self, path: str, body: bytes, patience: float) -> bytes:
        """Sends a request and hangs up; what had come by then."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        heard = b""
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            heard = await asyncio.wait_for(reader.read(1 << 20), patience + 0.01)
            await asyncio.sleep(patience)
        except (asyncio.TimeoutError, ConnectionError):
            pass
        writer.transport.abort()
        return heard


async def run(url: str, process: psutil.Process, seconds: float, seed: int) -> int:
    soak = Soak(url, seed)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=300)) as session:
        work = [soak.proper(session) for _ in range(PROPER)]
        work += [soak.leaving() for _ in range(LEAVING)]
        work += [soak.lying() for _ in range(LYING)]
        work += [soak.silent() for _ in range(SILENT)]
        tasks = [asyncio.ensure_future(each) for each in work]
        settled = await watch(soak, session, process, seconds)
        soak.over = True
        await asyncio.gather(*tasks)
        for _ in range(200):
            facts = await (await session.get("/load")).json()
            if facts["server_load"] == 0:
                break
            await asyncio.sleep(0.1)
        healthy = (await session.get("/health")).status == 200
    grown = process.memory_info().rss / settled
    for line in soak.bad[:10]:
        print("not answered:", line)
    idle = [kind for kind in ("left in the middle", "lied and were refused") if not soak.counts[kind]]
    for kind in idle:
        print(f"no client {kind}: this was no test of the server")
    print(
        f"{sum(soak.counts.values())} requests, {len(soak.bad)} well-formed ones not answered; "
        f"{facts['kv_blocks_used']} blocks held; memory {100 * (grown - 1):+.1f} % since the first minute; "
        f"{'healthy' if healthy else 'NOT healthy'}"
    )
    return int(bool(soak.bad or idle) or facts["kv_blocks_used"] > 0 or not healthy or grown > GROWTH)


async def watch(soak: Soak, session: aiohttp.ClientSession, process: psutil.Process, seconds: float) -> float:
    """Prints until it is time to end. The server's resident bytes when it had settled."""
    begin = time.monotonic()
    settled = 0.0
    while (past := time.monotonic() - begin) < seconds:
        await asyncio.sleep(min(10.0, seconds - past))
        past = time.monotonic() - begin
        rss = process.memory_info().rss
        if not settled and past >= min(SETTLED, seconds / 2):
            settled = rss
        facts = await (await session.get("/load")).json()
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.counts.items()))
        print(
            f"{past:4.0f} s {rss / 2**20:7.1f} MiB {facts['kv_blocks_used']:4d} of {facts['kv_blocks_total']} blocks  "
            f"{counts}; {len(soak.bad)} bad",
            flush=True,
        )
    return settled or process.memory_info().rss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    server = ServerProcess(
        [
            str(Path(args.model)) if Path(args.model).exists() else args.model,
            "--port",
            "0",
            "--kv-memory",
            "64MiB",
        ],
        10.0,
    )
    try:
        url = server.wait_ready(600)
        children = psutil.Process().children(recursive=True)
        process = max(children, key=lambda child: child.memory_info().rss)
        return asyncio.run(run(url, process, 60 * args.minutes, args.seed))
    finally:
        server.end()


if __name__ == "__main__":
    sys.exit(main())
