"""The page at /, its files and its feed; and the page in a real browser, before a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from splitfuse.server import app, live, page
from splitfuse.server.errors import ApiError
from splitfuse.server.live import Digest, Feed
from splitfuse.server.runtime import Runtime, StepRecord
from splitfuse.server.settings import Settings

pytestmark = pytest.mark.machine_independent
STATIC = resources.files("splitfuse.server") / "static"
BUDGET = 64
PACE = 0.004  # seconds that every step is made longer: nobody can watch a tiny model at full speed
KEY = "sesame"


class Paced(Runtime):
    def _on_step(self, scheduler: Any, output: Any) -> None:
        if output is not None:
            time.sleep(PACE)
        super()._on_step(scheduler, output)


@dataclass
class Site:
    url: str
    runtime: Runtime

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers)

    def feed(self) -> Any:
        """A context: the response of /live, which has no end."""
        return httpx.stream("GET", f"{self.url}/live", timeout=30)

    def complete(self, prompts: list[list[int]], max_tokens: int) -> None:
        body = {"model": self.runtime.names[0], "prompt": prompts, "max_tokens": max_tokens}
        assert httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).status_code == 200


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[Site]:
    engine = {"dtype": "float32", "threads": 1, "token_budget": BUDGET, "kv_memory": "4MiB", "verbose": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Runtime", Paced)
        served = app.create_app(Settings(str(model), engine=engine, served_names=("tiny",), **settings))
    runtime: Runtime = served.state.runtime
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(served, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started and runtime.ready, "the server")
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", runtime)
        finally:
            runtime.draining = True  # ends the feeds
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    """Never at the end of its sequence, so an answer is as long as was asked for."""
    return tiny_llama(eos_token_id=None)


@pytest.fixture(scope="module")
def site(model: Path) -> Iterator[Site]:
    with serving(model) as site:
        yield site


# ---------------------------------------------------------------- files


def test_every_file_is_served(site: Site) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    names = [file.name for file in STATIC.iterdir()]
    assert {"index.html", "page.css", "page.js", "icon.svg"} <= set(names)
    for name in names:
        path = "/" if name == "index.html" else f"/static/{name}"
        response = site.get(path)
        assert response.status_code == 200
        assert response.content == (STATIC / name).read_bytes()
        assert response.headers["content-type"].split(";")[0] == types[Path(name).suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert set(policy.values()) == {"'none'", "'self'"}
        assert policy["default-src"] == "'none'"
        again = site.get(path, **{"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = httpx.head(site.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert page.is_open(path)
    assert site.get("/static/../page.py").status_code == 404
    assert site.get("/static/nothing.js").status_code == 404
    assert not page.is_open("/live")
    assert not page.is_open("/v1/models")


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    for file in STATIC.iterdir():
        text = file.read_text()
        addresses = [
            a for a in re.findall(r"\bhttps?://[^\s\"'<>]*|@import|url\(", text) if "w3.org" not in a
        ]
        assert not addresses, file.name
        if file.name == "index.html":
            assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", text)
            for name in re.findall(r'(?:src|href)="static/([^"]*)"', text):
                assert (STATIC / name).is_file(), name


def test_no_page_unless_wanted(model: Path) -> None:
    with serving(model, ui=False) as site:
        for path in ("/", "/static/page.js"):
            refused = site.get(path)
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == 404
        with site.feed() as feed:
            assert feed.status_code == 404
        assert site.runtime.settings.loopback
    assert not Settings("m", host="0.0.0.0").shows_ui
    assert Settings("m", host="0.0.0.0", ui=True).shows_ui


# ---------------------------------------------------------------- the feed


def frames(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) of a stream, without end."""
    event = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "data":
            yield event, json.loads(value)


def test_the_feed_tells_every_forward(site: Site) -> None:
    capacity = site.runtime.capacity
    assert capacity is not None
    with site.feed() as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        feed = frames(response)
        event, hello = next(feed)
        assert event == "hello"
        assert hello == {
            "model": "tiny",
            "policy": "splitfuse",
            "token_budget": BUDGET,
            "max_sequences": capacity.max_sequences,
            "max_model_len": capacity.max_model_len,
            "blocks": capacity.total_blocks,
            "block_size": capacity.block_size,
            "vocab_size": 331,
        }
        prompts = [[i] * length for i, length in enumerate((100, 7, 200))]
        asking = threading.Thread(target=site.complete, args=(prompts, 20))
        began = time.monotonic()
        asking.start()
        batches: list[Any] = []
        for event, batch in feed:
            assert event == "batch"
            batches.append(batch)
            if batch["decode"] >= 3 * 19 and batch["running"] == 0:
                break
        took = time.monotonic() - began
        asking.join()
    assert len(batches) <= took / live._TICK + 2
    last = batches[-1]
    steps = [step for batch in batches for step in batch["steps"]]
    assert sum(batch["skipped"] for batch in batches) == 0
    assert last["prefill"] == 307 == sum(tokens for step in steps for _, tokens in step["p"])
    assert last["decode"] == 57 == sum(len(step["d"]) for step in steps)
    assert all(sum(t for _, t in step["p"]) + len(step["d"]) <= BUDGET for step in steps)
    assert any(step["p"] and step["d"] for step in steps)
    assert [step["t"] for step in steps] == sorted(step["t"] for step in steps)
    assert all(step["ms"] > 0 for step in steps)
    assert len([ms for batch in batches for ms in batch["ttft"]]) == 3
    gaps = [gap for batch in batches for gap in batch["itl"]]
    assert sum(count for _, count in gaps) == 57
    assert all(ms >= 1000 * PACE for ms, _ in gaps)
    assert (last["waiting"], last["used"], last["sick"]) == (0, 0, None)


def test_too_many_watchers(site: Site) -> None:
    feed = feed_of(site)
    until(lambda: not feed._watchers, "earlier ones to be gone")
    with ExitStack() as watching:
        for _ in range(live._WATCHERS):
            assert watching.enter_context(site.feed()).status_code == 200
        with site.feed() as refused:
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "5"
            assert json.loads(refused.read())["error"]["code"] == 429
    until(lambda: not feed._watchers, "the places to be free again")
    with site.feed() as response:
        assert response.status_code == 200


def test_nothing_is_gathered_while_nobody_watches(site: Site) -> None:
    feed = feed_of(site)
    until(lambda: feed._ticker is None, "the last watcher's end")
    feed._inbox.clear()
    site.complete([[1, 2, 3]], 10)
    assert not feed._inbox


def feed_of(site: Site) -> Feed:
    (feed,) = [observer for observer in site.runtime.observers if isinstance(observer, Feed)]
    return feed


def test_a_slow_watcher_misses_the_oldest() -> None:
    async def scenario() -> None:
        capacity = SimpleNamespace(running=0, waiting=0, used_blocks=0, cached_blocks=0)
        runtime: Any = SimpleNamespace(capacity=capacity, queued=0, draining=False, sick=lambda: None)
        feed = Feed(runtime)
        queue: asyncio.Queue[str | None] = asyncio.Queue(live._BATCHES)
        feed._watchers.add(queue)
        for i in range(100):
            feed._send(str(i))
        assert queue.qsize() == live._BATCHES
        assert await queue.get() == str(100 - live._BATCHES)
        runtime.draining = True
        await feed._run()
        assert [queue.get_nowait() for _ in range(live._BATCHES)][-1] is None

    asyncio.run(scenario())


def test_no_feed_without_an_engine(model: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError) as refused:
            Feed(Runtime(Settings(str(model)))).join()
        assert refused.value.status == 503

    asyncio.run(scenario())


def test_many_forwards_between_two_batches() -> None:
    """The last ones are told, all are counted."""
    scheduler: Any = SimpleNamespace(request_of=lambda sequence: None)
    digest = Digest()

    def step(i: int) -> StepRecord:
        output: Any = SimpleNamespace(
            chunks=[(1, 1), (2, 1), (3, 5)],
            ids=np.array([1]),
            finish=np.zeros(1, np.uint8),
            prefill_tokens=6,
            decode_tokens=1,
        )
        return StepRecord(10.0 + i / 8, 0.125, output, None, 0, scheduler)  # type: ignore[arg-type]

    batch = digest.add([step(i) for i in range(200)])
    assert len(batch["steps"]) == live._TOLD
    assert batch["skipped"] == 200 - live._TOLD
    assert (batch["prefill"], batch["decode"]) == (1200, 200)
    assert batch["itl"] == [(125.0, 199)]
    # A chunk of one token that made none is the beginning of a prompt.
    assert batch["steps"][-1] == {"t": 34875.0, "ms": 125.0, "p": [(2, 1), (3, 5)], "d": [1]}
    assert digest.add([])["prefill"] == 1200


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    assert all(programs), "this test needs Debian's chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-component-update", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs[1])))
        yield driver
        driver.quit()


class Tab:
    """The page of a site, opened anew."""

    def __init__(
        self, browser: Any, site: Site, dark: bool = False, size: tuple[int, int] = (1280, 800)
    ) -> None:
        self.browser, self.site = browser, site
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.darken(dark)
        browser.get(site.url + "/")
        browser.execute_script("sessionStorage.clear()")
        browser.get_log("browser")
        self.open()

    def open(self) -> None:
        self.browser.get(self.site.url + "/")
        self.run(
            "window.bodies = []; window.lengths = new Set(); const fetched = window.fetch;"
            "window.fetch = (path, init) => { if (init?.body) bodies.push([path, JSON.parse(init.body)]);"
            " return fetched(path, init); };"
            "new MutationObserver(() => lengths.add(document.getElementById('log').textContent.length))"
            ".observe(document.getElementById('log'), {childList: true, subtree: true});"
        )

    def darken(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def __getitem__(self, id: str) -> Any:
        return self.browser.find_element("id", id)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def live(self) -> Tab:
        until(lambda: self["status"].text == "live", "the feed")
        return self

    def say(self, text: str, wait: bool = True) -> None:
        self["text"].send_keys(text, "\n")
        if wait:
            until(lambda: self["send"].text == "Send", "the answer's end")

    def number(self, name: str) -> int:
        return int(self["bars"].get_attribute(f"data-{name}") or 0)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def test_it_loads_quietly(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    assert tab["model"].text == "tiny"
    assert "tiny" in browser.title
    assert tab["idle"].is_displayed()
    assert not tab["key-form"].is_displayed()
    assert tab.errors() == []
    loaded = tab.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith(site.url) for name in loaded)


def test_a_conversation(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    tab.run(
        "for (const [id, value] of [['system', 'Be brief.'], ['temperature', '0.2'], ['max-tokens', '40']])"
        " document.getElementById(id).value = value;"
    )
    tab.say("First?")
    assert len(tab.run("return [...lengths]")) > 5, "the answer did not come in pieces"
    (answer,) = tab.all(".message.assistant .text")
    first = tab.run("return arguments[0].textContent", answer)
    assert first
    told = tab.all(".message.assistant .meta")[0].text
    assert re.fullmatch(r"first token after \d+\.\d\d s · [\d.]+ tokens/s · 40 tokens · cut .*", told), told
    tab.say("Second?")
    (path, body), (_, again) = tab.run("return bodies")
    assert path == "v1/chat/completions"
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
    ]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.2, 40, True)
    assert [m["role"] for m in again["messages"]] == ["system", "user", "assistant", "user"]
    assert again["messages"][2]["content"] == first
    tab.open()
    assert len(tab.all(".message")) == 4, "the conversation is gone after a reload"
    tab["new-chat"].click()
    assert not tab.all(".message")
    assert tab["empty"].is_displayed()
    assert tab.errors() == []


def test_stop(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    tab.run("document.getElementById('max-tokens').value = 400")
    tab.say("Go on and on.", wait=False)
    until(lambda: tab.run("return lengths.size") > 3, "the first tokens")
    assert tab["send"].text == "Stop"
    tab["send"].click()
    until(lambda: tab["send"].text == "Send", "the end")
    assert tab.all(".message.assistant .meta")[0].text.endswith("stopped")
    until(lambda: site.runtime.capacity.used_blocks == 0, "the blocks to be freed")  # type: ignore[union-attr]
    assert tab.errors() == []


def pixels(tab: Tab, *variables: str) -> int:
    """Those of the canvas in just the colours of these variables."""
    return tab.run(
        """
        const canvas = document.getElementById('bars');
        const style = getComputedStyle(document.documentElement);
        const color = (name) => parseInt(style.getPropertyValue(name).trim().slice(1), 16);
        const wanted = new Set([...arguments].map(color));
        const copy = new OffscreenCanvas(canvas.width, canvas.height);
        const context = copy.getContext('2d', {willReadFrequently: true});
        context.drawImage(canvas, 0, 0);
        const data = context.getImageData(0, 0, copy.width, copy.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4) {
          if (data[i + 3] === 255 && wanted.has(data[i] << 16 | data[i + 1] << 8 | data[i + 2])) count++;
        }
        return count;
        """,
        *variables,
    )


PROMPT = tuple(f"--prompt-{i}" for i in range(4))
DECODE = tuple(f"--decode-{i}" for i in range(2))


def test_forwards_are_drawn(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    assert pixels(tab, *PROMPT, *DECODE) == 0
    tab["burst"].click()
    assert tab["burst"].text == "Stop them"
    until(lambda: tab.number("prompt") > 0, "the first forward")
    until(lambda: tab["running"].text != "0", "something running")
    until(lambda: tab["burst-note"].text.startswith("All 8 answered"), "the prompts to be answered")
    until(lambda: tab["running"].text == "0", "the last batch")
    assert not tab["idle"].is_displayed()
    (_, body), *_ = tab.run("return bodies")
    lengths = sorted(len(prompt) for prompt in body["prompt"])
    assert len(lengths) == 8
    assert lengths[0] == BUDGET // 2
    assert lengths[-1] > 4 * BUDGET
    assert 40 < tab.number("bars") <= 120
    assert tab.number("decode") > 8 * 20
    assert pixels(tab, *PROMPT) > 1000
    assert pixels(tab, *DECODE) > 1000
    summary = tab.run("return document.getElementById('summary').textContent")
    found = re.fullmatch(
        r"The last (\d+) forwards: (\d+) of 64 tokens on average, (\d+) of them full, (\d+) with prompt chunks "
        r"beside decodes\.",
        summary,
    )
    assert found, summary
    assert int(found[1]) == tab.number("bars")
    assert int(found[2]) == round((tab.number("prompt") + tab.number("decode")) / tab.number("bars"))
    for name in ("ttft", "itl"):
        assert re.fullmatch(r"[\d.]+ m?s\s+p95 [\d.]+ m?s", tab[name].text), name
    assert re.fullmatch(r"0 in use · \d+ cached · \d+ free", tab["blocks-text"].text)
    assert tab["cached"].size["width"] > 0
    assert tab.errors() == []


def test_a_forward_is_looked_at(browser: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains, Keys

    tab = Tab(browser, site).live()
    site.complete([[5] * 150, [6] * 20], 30)
    until(lambda: tab.number("decode") >= 58, "the bars")
    tab["bars"].send_keys(Keys.ARROW_LEFT)
    assert re.search(r"^1 token in [\d.]+ ms|^2 tokens in", tab["tip"].text)
    for _ in range(200):
        tab["bars"].send_keys(Keys.ARROW_LEFT) if "Prompt of" not in tab["tip"].text else None
    assert re.search(r"^64 tokens in|Prompt of sequence \d+: \d+ tokens", tab["tip"].text)
    tab["bars"].send_keys(Keys.ESCAPE)
    assert not tab["tip"].is_displayed()
    size = tab["bars"].size
    at_last = size["width"] // 2 - 2, size["height"] // 2 - 1
    ActionChains(browser).move_to_element_with_offset(tab["bars"], *at_last).perform()
    until(lambda: tab["tip"].is_displayed(), "the tip")
    assert "Next token of sequence" in tab["tip"].text
    bars, seen = tab.number("bars"), tab.number("seen")
    site.complete([[7] * 20], 5)
    until(lambda: tab.number("seen") >= seen + 5, "the page to hear of it")
    assert tab.number("bars") == bars, "the bars moved under the eye"
    ActionChains(browser).move_to_element(tab["live-title"]).perform()
    until(lambda: tab.number("bars") > bars, "the bars to go on")
    assert not tab["tip"].is_displayed()
    assert tab.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours(browser: Any, site: Site, dark: bool) -> None:
    tab = Tab(browser, site, dark=dark).live()
    read = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0]).trim()"
    assert (luminance(tab.run(read, "ground")) < 0.1) == dark
    for pair in (
        "ink panel", "ink ground", "ink tint", "ink field", "muted panel", "muted ground", "muted field",
        "accent-ink accent", "accent panel", "accent tint", "bad panel", "bad ground",
    ):  # fmt: skip
        assert contrast(*(tab.run(read, name) for name in pair.split())) >= 4.5, pair
    for pair in ("prompt-0 panel", "decode-0 panel", "field-line panel"):
        assert contrast(*(tab.run(read, name) for name in pair.split())) >= 3, pair
    site.complete([[3] * 100], 30)
    until(lambda: tab.number("decode") >= 29, "the bars")
    assert pixels(tab, *PROMPT) > 0
    assert pixels(tab, *DECODE) > 0
    tab.darken(not dark)
    until(lambda: pixels(tab, *PROMPT) > 0 and pixels(tab, *DECODE) > 0, "the bars in the other colours")
    assert tab.errors() == []


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone(browser: Any, site: Site) -> None:
    tab = Tab(browser, site, size=(360, 740)).live()
    tab.run("document.getElementById('max-tokens').value = 5")
    tab.say("a" * 300)
    tab.all("#settings summary")[0].click()
    assert tab["system"].is_displayed()
    tab["burst"].click()
    until(lambda: tab["burst-note"].text.startswith("All 8"), "the prompts to be answered")
    assert tab.run("return document.documentElement.scrollWidth") <= 360
    assert tab.run("return document.getElementById('log').scrollWidth") <= tab["log"].size["width"]
    sticking_out = tab.run(
        """
        return [...document.querySelectorAll("section")].flatMap((section) => {
          const most = section.getBoundingClientRect().right - parseFloat(getComputedStyle(section).paddingRight);
          return [...section.querySelectorAll(":not(#log)")]
            .filter((element) => element.getBoundingClientRect().right > most + 0.5)
            .map((element) => element.id || element.className || element.tagName);
        });
        """
    )
    assert sticking_out == []
    assert tab.number("bars") <= 60
    assert tab.errors() == []


def test_everything_has_a_name(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in (
            "button",
            "textbox",
            "slider",
            "spinbutton",
            "image",
            "log",
            "region",
            "DisclosureTriangle",
        ):
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert all(name for names in named.values() for name in names), named
    assert "Message" in named["textbox"]
    assert {"Send", "New chat", "Send 8 prompts at once"} <= set(named["button"])
    assert {"Chat", "SplitFuse at work"} <= set(named["region"])
    assert tab["status"].get_attribute("role") == "status"
    unlabelled = (
        "return [...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).length"
    )
    assert tab.run(unlabelled) == 0


def test_the_key(browser: Any, model: Path) -> None:
    with serving(model, api_keys=(KEY,)) as site:
        with site.feed() as refused:
            assert refused.status_code == 401
        tab = Tab(browser, site)
        until(lambda: tab["key-form"].is_displayed(), "the question for the key")
        assert tab["key-note"].text == ""
        tab["key"].send_keys("wrong\n")
        until(lambda: tab["key-note"].text, "the refusal")
        assert "did not accept" in tab["key-note"].text
        assert tab["key-form"].is_displayed()
        tab["key"].send_keys(KEY + "\n")
        tab.live()
        assert not tab["key-form"].is_displayed()
        assert tab.run("return sessionStorage.getItem('splitfuse.key')") == json.dumps(KEY)
        tab.run("document.getElementById('max-tokens').value = 5")
        tab.say("Who is there?")
        assert tab.all(".message.assistant .meta")
        tab.open()
        tab.live()
        assert not tab["key-form"].is_displayed()
        assert all("401" in error for error in tab.errors())


def test_refusals_in_words(browser: Any, site: Site) -> None:
    tab = Tab(browser, site).live()
    site.runtime.draining = True
    try:
        tab.say("Still there?")
        (problem,) = tab.all(".problem")
        assert "The server is not ready" in problem.text
        until(lambda: tab["status"].get_attribute("data-state") == "bad", "the feed's end to be told")
    finally:
        site.runtime.draining = False
    tab.run("document.getElementById('max-tokens').value = 5")
    tab.all(".problem button")[0].click()
    until(lambda: tab.all(".message.assistant .meta"), "the answer")
    assert len(tab.all(".message.user")) == 1
    assert not tab.all(".problem")
    tab.live()
    tab.run("document.getElementById('max-tokens').value = 100000")
    tab.say("More than fits.")
    assert "don't fit the model's context" in tab.all(".problem")[0].text
