"""A model whose training runs as CUDA graphs: one launch forwards, one backwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from v2m.engine.config import TrainConfig
from v2m.errors import InputError

__all__ = ["check_graphs", "graphed"]


def check_graphs(config: TrainConfig, device: torch.device) -> None:
    """InputError for what CUDA graphs cannot be combined with."""
    for used, what in (
        (device.type != "cuda", f"a CUDA device, and this run is on {device.type}"),
        (config.run.parallel == "fsdp", "run.parallel = ddp"),
        (config.run.grad_checkpointing, "run.grad_checkpointing = false"),
        (config.optim.accumulation > 1, "optim.accumulation = 1"),
    ):
        if used:
            raise InputError(f"run.cuda_graph = true needs {what}.")


def graphed(
    network: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> nn.Module:
    """The network with its forward and backward pass captured; in evaluation it is as it was.

    It takes images of this shape (B, C, H, W) alone while it trains. Its gradients lie in memory
    that the next backward pass overwrites, so they are to be used before it. Buffers that a forward
    pass changes (running statistics) are put back after the capture.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    network.train()
    with autocast():
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # casts of weights belong into the graph
        try:
            images = torch.randn(shape, device=device)
            network = torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
        finally:
            torch.set_autocast_cache_enabled(cached)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    # The capture was on a stream of its own, and PyTorch would warn of that at the first gradient.
    warn_of_streams = getattr(
        torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda wanted: None
    )
    warn_of_streams(False)
    return network
