"""Checkpoints on the disk: whatever is damaged or interrupted, a complete one is left and found."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v2m.engine import store as store_module
from v2m.engine.store import MANIFEST, CheckpointStore, DamagedError, verify, write_file


def _write(text: str):
    def write(folder: Path) -> None:
        (folder / "a.bin").write_bytes(text.encode() * 100)
        (folder / "b.bin").write_bytes(bytes(range(256)))

    return write


@pytest.fixture
def filled(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for epoch in (1, 2, 3):
        store.save(epoch, _write(f"epoch {epoch}"))
    return store


def test_keeps_the_last_ones_and_finds_the_newest(filled: CheckpointStore) -> None:
    assert [f.name for f in filled.folders()] == ["step-00000003", "step-00000002"]
    warnings: list[str] = []
    assert filled.newest(warnings.append).name == "step-00000003"
    assert warnings == []
    assert (filled.root / "step-00000003" / "a.bin").read_bytes() == b"epoch 3" * 100


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(99_999_999, _write("x"))
    store.save(100_000_000, _write("y"))
    assert store.newest(print).name == "step-100000000"


def _damage(folder: Path, how: str, generator: random.Random) -> None:
    victim = folder / generator.choice(["a.bin", "b.bin", MANIFEST])
    data = bytearray(victim.read_bytes())
    if how == "flip":
        position = generator.randrange(len(data))
        data[position] ^= 1 << generator.randrange(8)
        victim.write_bytes(data)
    elif how == "truncate":
        victim.write_bytes(data[: generator.randrange(len(data))])
    elif how == "empty":
        victim.write_bytes(b"")
    elif how == "delete":
        victim.unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete", "all"])
@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, how: str, seed: int) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, _write("one"))
    store.save(2, _write("two"))
    _damage(store.root / "step-00000002", how, random.Random(seed))
    warnings: list[str] = []
    found = store.newest(warnings.append)
    changed = len(warnings) == 1
    # a flipped bit of the manifest's white space or of a digit's case may leave its meaning as it
    # was
    assert found.name == ("step-00000001" if changed else "step-00000002")
    if changed:
        assert "step-00000002 is damaged" in warnings[0]
        assert "falling back" in warnings[0]
    else:
        assert how == "flip"
        verify(store.root / "step-00000002")
    assert (found / "a.bin").read_bytes() in (b"one" * 100, b"two" * 100)


def test_a_save_replaces_damaged_and_later_ones(filled: CheckpointStore) -> None:
    (filled.root / "step-00000003" / "a.bin").unlink()
    filled.save(3, _write("again"))
    verify(filled.root / "step-00000003")
    filled.save(4, _write("four"))
    (filled.root / "step-00000004" / "a.bin").unlink()
    (filled.root / "step-00000003" / "a.bin").unlink()
    filled.save(3, _write("once more"))
    assert [f.name for f in filled.folders()] == ["step-00000003"]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent").newest(print) is None


@pytest.mark.parametrize("moment", ["write", "manifest", "rename"])
def test_a_full_disk_leaves_the_old_ones(
    filled: CheckpointStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise full

    if moment == "manifest":
        monkeypatch.setattr(store_module, "write_json", fail)
    if moment == "rename":
        monkeypatch.setattr(store_module.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        filled.save(4, fail if moment == "write" else _write("four"))
    assert [f.name for f in filled.folders()] == ["step-00000003", "step-00000002"]
    assert not list(filled.root.glob(".writing-*"))
    verify(filled.newest(print))


def test_a_save_that_does_not_read_back_keeps_the_old_ones(
    filled: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise DamagedError("a.bin does not match its checksum")

    monkeypatch.setattr(store_module, "verify", refuse)
    with pytest.raises(OSError, match="does not read back"):
        filled.save(4, _write("four"))
    assert {"step-00000003", "step-00000002"} <= {f.name for f in filled.folders()}


def test_the_manifest_comes_last_and_everything_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = store_module.fsync, os.replace
    monkeypatch.setattr(
        store_module, "fsync", lambda p: (events.append(f"fsync {p.name}"), fsync(p))
    )

    def record(source: os.PathLike, target: os.PathLike) -> None:
        events.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(store_module.os, "replace", record)
    CheckpointStore(tmp_path / "c").save(7, _write("x"))
    order = ["fsync a.bin", "fsync b.bin", f"rename {MANIFEST}", "rename step-00000007", "fsync c"]
    assert [e for e in events if e in order] == order


def test_write_file_leaves_the_old_bytes_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store_module.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


_ENDLESS = """
import itertools, runpy, sys
from pathlib import Path
store = runpy.run_path(sys.argv[2])["CheckpointStore"](Path(sys.argv[1]))  # without torch: fast
def write(folder):
    for name in "abc":
        (folder / name).write_bytes(bytes(200_000))
for epoch in itertools.count(1):
    store.save(epoch, write)
    print(epoch, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_saves(tmp_path: Path, count: int) -> None:
    generator = random.Random(count)
    for case in range(count):
        root = tmp_path / str(case)
        process = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(root), store_module.__file__],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        saved = int(process.stdout.readline())
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        saved = int(rest[-1]) if rest else saved
        store = CheckpointStore(root)
        found = store.newest(print)
        assert found is not None
        assert int(found.name[5:]) >= saved
        store.clean()
        assert not list(root.glob(".writing-*"))
