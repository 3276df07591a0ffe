"""`v2m benchmark`: what it prints, and what it refuses."""

import pytest

from v2m.cli.main import main

NANO = "v2m_nano_patch4_28"


@pytest.mark.parametrize("options", [[], ["--train"], ["--dtype", "bfloat16"]])
def test_a_row_for_each_model(options, capsys):
    command = ["benchmark", NANO, "test_vit", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    assert main(command + options) == 0
    out = capsys.readouterr().out
    assert ("training" in out) == ("--train" in options)
    assert ("bfloat16" in out) == ("bfloat16" in options)
    for name in (NANO, "test_vit"):
        milliseconds, rate, memory = next(
            line.split()[1:] for line in out.splitlines() if line.startswith(name)
        )
        assert float(milliseconds) > 0
        assert float(rate) == pytest.approx(2e3 / float(milliseconds), rel=0.2)
        assert memory == "-"


def test_other_sizes_and_backends(capsys):
    command = ["benchmark", NANO, "--batch", "1", "--rounds", "1", "--device", "cpu"]
    assert main([*command, "--size", "36", "--backend", "eager"]) == 0
    assert NANO in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([NANO, "--batch", "0"], "--batch must be at least 1; got 0"),
        ([NANO, "--rounds", "-1"], "--rounds must be at least 1; got -1"),
        ([NANO, "--device", "toaster"], "--device 'toaster' cannot be used here"),
        ([NANO, "--backend", "quick"], "one of reference, eager, cpu, triton; got 'quick'"),
        (["v2m_tiny_patch16_225"], "Did you mean 'v2m_tiny_patch16_224'?"),
        (["test_efficientnet", "--size", "64"], "takes no --size"),
    ],
)
def test_refused(options, message, capsys):
    assert main(["benchmark", *options]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
