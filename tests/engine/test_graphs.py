"""Training as CUDA graphs: what it cannot be combined with, and that it computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from interruptions import assert_resumed_exactly
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.graphs import check_graphs, graphed
from v2m.engine.rundir import RunDirectory
from v2m.engine.trainer import train
from v2m.errors import InputError


def test_without_a_gpu(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"run.cuda_graph = true needs a CUDA device.*on cpu"):
        train(apply_overrides(config, ["run.cuda_graph=true"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ("run.parallel=fsdp", "run.parallel = ddp"),
        ("run.grad_checkpointing=true", "run.grad_checkpointing = false"),
        ("optim.accumulation=2", "optim.accumulation = 1"),
    ],
)
def test_what_it_does_not_go_with(config: TrainConfig, setting: str, needed: str) -> None:
    with pytest.raises(InputError, match=f"run.cuda_graph = true needs {needed}"):
        check_graphs(apply_overrides(config, [setting]), torch.device("cuda"))
    check_graphs(config, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_trains_as_without(
    tmp_path: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    backend: str,
) -> None:
    """With all that is random: stochastic depth and dropout draw the same numbers in a graph."""
    monkeypatch.setenv("V2M_BACKEND", backend)
    plain = apply_overrides(config, ["run.device=cuda", f"run.precision={precision}"])
    train(plain, tmp_path / "plain")
    train(apply_overrides(plain, ["run.cuda_graph=true"]), tmp_path / "graph")
    records = [RunDirectory(tmp_path / name).records() for name in ("plain", "graph")]
    assert len(records[0]) == len(records[1]) == 4
    for one, other in zip(*records):
        for key in ("train_loss", "gradient_norm", "validation_loss", "loss"):
            if key in one:
                limit = 1e-4 if precision == "float32" else 1e-2
                assert one[key] == pytest.approx(other[key], rel=limit), (key, one["kind"])


@pytest.mark.gpu
def test_is_resumed_exactly(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V2M_BACKEND", "triton")
    config = apply_overrides(config, ["run.device=cuda", "run.cuda_graph=true"])
    assert_resumed_exactly(tmp_path, config, monkeypatch, step=7)


@pytest.mark.gpu
def test_running_statistics_and_evaluation_are_as_they_were() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
        return nn.Sequential(*layers).cuda()

    device = torch.device("cuda")
    images = torch.randn(3, 1, 8, 8, device=device)
    plain, captured = network(), network()
    captured = graphed(captured, images.shape, device, lambda: torch.autocast("cuda"))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, captured.get_buffer(name)), name
    for model in (plain, captured):
        with torch.autocast("cuda"):
            model(images).float().square().sum().backward()
    for one, other in zip(plain.parameters(), captured.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(buffer.float(), captured.get_buffer(name).float()), name
    plain.eval(), captured.eval()
    one = images[:1]  # another size than was captured
    assert torch.allclose(plain(one), captured(one), rtol=1e-3, atol=1e-4)
