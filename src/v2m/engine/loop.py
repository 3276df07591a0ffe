"""One epoch of training: micro-batches, one optimiser step for each global batch, and nothing
else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from v2m.engine.distributed import Ranks
from v2m.engine.progress import Reporter
from v2m.engine.randomness import seed_everything
from v2m.engine.sharding import whole
from v2m.engine.state import TrainingState
from v2m.errors import NonFiniteLossError

Batch = tuple[Any, Any]  # inputs and targets, as the task has them


@dataclass(kw_only=True)
class Loop:
    """What a step needs besides the state it changes.

    Attributes:
        network: what is called: the model, or the model compiled or wrapped for several ranks.
        loss: the task's: (this, inputs, targets) -> mean loss and number of right answers.
        autocast: makes the context of the forward pass.
        accumulation: micro-batches per optimiser step.
        keep_for_inspection: told what went wrong, with the batches, before NonFiniteLossError is
            raised; says where it kept them.
    """

    state: TrainingState
    network: nn.Module
    schedule: Scheduler
    device: torch.device
    seed: int
    loss: Callable[[Loop, Any, Any], tuple[Tensor, Tensor]]
    ranks: Ranks = field(default_factory=Ranks)
    autocast: Callable[[], AbstractContextManager] = nullcontext
    clip_norm: float | None = None
    accumulation: int = 1
    has_accuracy: bool = True  # whether `loss` counts right answers
    keep_for_inspection: Callable[[str, list[Batch]], str] = lambda _message, _batches: ""


def train_epoch(
    loop: Loop,
    batches: Iterable[Batch],
    *,
    reporter: Reporter,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Make the steps that are left of the epoch over this rank's micro-batches; the sums are in
    `loop.state.meter`.

    `after_step` is called after each; it may raise to stop the run, which then stops between two
    steps.
    """
    loop.network.train()
    state, iterator = loop.state, iter(batches)
    meter = state.meter
    for _ in range(state.steps_per_epoch - meter.steps):
        started = time.perf_counter()
        group = list(islice(iterator, loop.accumulation))
        assert len(group) == loop.accumulation, "the loader yields whole steps"
        optimiser_step(loop, group)
        meter.seconds += time.perf_counter() - started
        if meter.images:
            figures = meter.figures(accuracy=loop.has_accuracy)
            reporter.step(
                loss=figures["train_loss"],
                accuracy=figures.get("train_accuracy"),
                images_per_second=figures["images_per_second"] * loop.ranks.world,
            )
        after_step()


def optimiser_step(loop: Loop, group: list[Batch]) -> None:
    """Gradients of one global batch, then one step of the optimiser, the average and the schedule.

    What is random in a step (mixup, stochastic depth, dropout) depends on (seed, step, rank)
    alone. Raises NonFiniteLossError on every rank, before the weights change, if the loss or a
    gradient of any of them is not finite.
    """
    state = loop.state
    seed_everything(loop.seed, state.step, loop.ranks.rank)
    state.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, device=loop.device)  # loss, right answers
    images = 0
    for index, (inputs, targets) in enumerate(group):
        with _without_exchange(loop.network, index + 1 < len(group)):
            loss, right = loop.loss(loop, inputs, targets)
            (loss / len(group)).backward()
        sums += torch.stack([loss.detach() * len(inputs), right])
        images += len(inputs)
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    loss_sum, right_sum, gradient_norm = torch.cat([sums, norm.float()[None]]).tolist()
    _refuse_non_finite(loop, group, loss_sum / images, gradient_norm)
    if loop.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, loop.clip_norm, norm)
    state.optimizer.step()
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.model, step=state.step)
    loop.schedule.step_update(state.step)
    state.meter.add(loss=loss_sum, right=right_sum, images=images, gradient_norm=gradient_norm)


def _without_exchange(network: nn.Module, hold: bool) -> AbstractContextManager:
    """Hold back the exchange of gradients between ranks until the last micro-batch."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not hold)
    return network.no_sync() if hold and hasattr(network, "no_sync") else nullcontext()


def _refuse_non_finite(loop: Loop, group: list[Batch], loss: float, norm: float) -> None:
    state = loop.state
    here = not (math.isfinite(loss) and math.isfinite(norm))
    anywhere = bool(loop.ranks.largest([float(here)], loop.device)[0])
    if not anywhere:
        return
    names = [
        name
        for name, p in state.model.named_parameters()
        if p.grad is not None and not bool(whole(p.grad).isfinite().all())
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    message = (
        f"the loss or its gradient is not finite at step {state.step} (epoch {state.epoch + 1}): "
        f"loss {loss}, gradient norm {norm}, "
        f"learning rate {state.optimizer.param_groups[0]['lr']:.3g}; "
        f"gradients that are not finite: {shown or 'none'}. "
        "The weights were not changed by this step."
    )
    raise NonFiniteLossError(f"{message} {loop.keep_for_inspection(message, group)}".rstrip())
