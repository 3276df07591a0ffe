"""`v2m doctor`: it checks what it prints, and a wrong backend does not pass."""

import pytest

from v2m.cli.main import main
from v2m.ops import eager


def test_says_what_runs_where_and_passes(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "timm", "numba", "cpu", "eager", "error against float64"):
        assert word in out


def test_a_wrong_backend_fails(capsys, monkeypatch):
    right = eager.selective_scan
    monkeypatch.setattr(eager, "selective_scan", lambda *a: 1.01 * right(*a))
    assert main(["doctor"]) == 1


def test_a_broken_backend_is_named(capsys, monkeypatch):
    def broken(*_):
        raise OSError("library not found")

    monkeypatch.setattr(eager, "selective_scan", broken)
    assert main(["doctor"]) == 1
    assert "OSError" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert main(["doctor"]) == 0
    assert "triton" in capsys.readouterr().out
