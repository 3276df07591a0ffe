"""Downloads from a server on this machine: good, broken, interrupted, resumed."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from v2m.data import download, fashion_mnist, load_dataset
from v2m.data.fashion_mnist import FULL, format_idx
from v2m.errors import InputError

NAMES = [f"{name}.gz" for pair in FULL.files.values() for name in pair]
FIRST = NAMES[0]


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults` {name: kind} make it misbehave, and `asked` counts requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.server.asked[name] += 1
        content, fault = self.server.files[name], self.server.faults.get(name)
        if fault == "missing":
            return self.send_error(404)
        if fault == "busy":
            return self.send_error(503)
        if fault == "damaged":
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        if fault == "another":
            content = gzip.compress(b"something else")
        if fault == "page":
            content = b"<html>Log in to this network</html>"
        if fault == "bomb":
            content = gzip.compress(bytes(100 << 20))
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "truncated" else content)
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves a stand-in for Fashion-MNIST, whose checksums replace the real ones."""
    random = np.random.default_rng(0)
    with Server() as server:
        for part, count in (("train", 300), ("test", 100)):
            labels = np.arange(count, dtype=np.uint8) % 10
            arrays = (random.integers(0, 256, (count, 28, 28), np.uint8), labels)
            for name, values in zip(FULL.files[part], arrays):
                content = format_idx(values)
                monkeypatch.setitem(FULL.checksums, name, hashlib.sha256(content).hexdigest())
                server.files[f"{name}.gz"] = gzip.compress(content)
        monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", Path("/nowhere"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_is_complete_and_found(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("V2M_DATA", str(tmp_path / "new" / "folder"))
    calls = []
    directory = download("fashion-mnist", None, lambda *c: calls.append(c), sources=[server.url])
    assert directory == tmp_path / "new" / "folder" / "fashion-mnist"
    assert sorted(path.name for path in directory.iterdir()) == sorted(NAMES)
    assert len(load_dataset("fashion-mnist", "test")) == 100
    for name in NAMES:
        mine = [call for call in calls if call[0] == name]
        size = len(server.files[name])
        assert mine[0] == (name, 0, size)
        assert mine[-1] == (name, size, size)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


def test_what_is_there_is_kept_and_what_is_damaged_is_fetched_again(server, tmp_path) -> None:
    download("fashion-mnist", tmp_path, sources=[server.url])
    (tmp_path / NAMES[1]).write_bytes(server.files[NAMES[1]][:-3])
    (tmp_path / NAMES[2]).unlink()
    server.asked.clear()
    download("fashion-mnist", tmp_path, sources=[server.url])
    assert server.asked == {NAMES[1]: 1, NAMES[2]: 1}
    server.asked.clear()
    download("fashion-mnist", tmp_path, sources=["http://127.0.0.1:9/nothing"])
    assert not server.asked


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "the server answered 404"),
        ("busy", "the server answered 503"),
        ("truncated", r"the connection (ended after|broke)"),
        ("damaged", "damaged"),
        ("another", "damaged"),
        ("page", "damaged"),
        ("bomb", "damaged"),
    ],
)
def test_a_faulty_server_is_an_error_and_leaves_nothing_behind(
    server, tmp_path: Path, fault: str, reason: str
) -> None:
    server.faults[FIRST] = fault
    with pytest.raises(InputError, match=reason) as caught:
        download("fashion-mnist", tmp_path, sources=[server.url])
    assert f"{server.url}/{FIRST}" in str(caught.value)
    assert "Check the network connection" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path: Path) -> None:
    server.faults[NAMES[2]] = "truncated"
    with pytest.raises(InputError):
        download("fashion-mnist", tmp_path, sources=[server.url])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES[:2])
    server.faults.clear()
    server.asked.clear()
    download("fashion-mnist", tmp_path, sources=[server.url])
    assert set(server.asked) == set(NAMES[2:])


def test_the_second_source_is_tried(server, tmp_path: Path) -> None:
    download("fashion-mnist", tmp_path, sources=["http://127.0.0.1:9/closed", server.url])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_length_is_not_needed(server, tmp_path: Path) -> None:
    server.faults = dict.fromkeys(NAMES, "no length")
    calls = []
    download("fashion-mnist", tmp_path, lambda *c: calls.append(c), sources=[server.url])
    assert calls[-1][2] is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://127.0.0.1:9/closed", "refused"),
        ("nonsense", "unknown url type"),
    ],
)
def test_no_network(tmp_path: Path, source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        download("fashion-mnist", tmp_path, sources=[source])
    for hint in ("could not download", "HTTPS_PROXY", "apt-get install", str(tmp_path)):
        assert hint in str(caught.value)


def test_ctrl_c_leaves_no_half_file(server, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("fashion-mnist", tmp_path, interrupt, sources=[server.url])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write to .*: No space left on device"):
        download("fashion-mnist", tmp_path, sources=[server.url])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        download("fashion-mnist", tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-mnist-small", "is part of v2m: there is nothing to download"),
        ("imagenet", "'imagenet' cannot be downloaded; 'fashion-mnist' can"),
    ],
)
def test_names_that_cannot_be_downloaded(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        download(name)


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("V2M_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fashion_mnist.data_directory() == tmp_path / "v2m"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fashion_mnist.data_directory() == tmp_path / ".cache" / "v2m"
    monkeypatch.setenv("V2M_DATA", "~/sets")
    assert fashion_mnist.data_directory() == tmp_path / "sets"
