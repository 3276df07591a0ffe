"""A whole run: epochs, validation, checkpoints, and at the end the test images, once."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console

from v2m.engine.checkpoint import evaluated_weights, gather_state
from v2m.engine.config import TrainConfig
from v2m.engine.distributed import Ranks, choose_device, join_ranks
from v2m.engine.lock import RunLock
from v2m.engine.loop import train_epoch
from v2m.engine.progress import ConsoleReporter, Reporter, clock
from v2m.engine.rundir import REPORT, RunDirectory
from v2m.engine.saving import Timer, keep, peak_memory, restore, save
from v2m.engine.session import Session, build_session, micro_batch_size
from v2m.engine.sharding import gathered
from v2m.engine.signals import StopRequest, stop_on_signals
from v2m.engine.state import Meter
from v2m.engine.tensorboard import TensorBoardLog
from v2m.errors import InputError
from v2m.models.checkpoint import save_model
from v2m.visualize.machine import describe_machine
from v2m.visualize.report import write_report

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def train(
    config: TrainConfig,
    output: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, validate after each epoch, evaluate the test images at the end, and write everything
    to `output`.

    Args:
        config: what to do.
        output: the run's folder, see `RunDirectory`.
        resume: go on from the last checkpoint in `output`, exactly; start if there is no run yet.
        overwrite: replace the run in `output`.
        console: where to show the progress; none for silence.

    Returns:
        The record of the test images: top1, top5, loss, shuffled_top1, ... or what the task has.

    Raises:
        InputError: for anything given that cannot be used.
        NonFiniteLossError: the loss or a gradient is not finite; the state is kept in
            `output`/non_finite.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; the last checkpoint is valid.
    """
    with (
        join_ranks(config.run.device, config.run.timeout_minutes) as ranks,
        stop_on_signals() as stop,
    ):
        run = RunDirectory(output, keep=config.run.keep_checkpoints)
        run.check(config, resume=resume, overwrite=overwrite)
        with _alone(run, ranks, choose_device(config.run.device, ranks)):
            goes_on = run.check(config, resume=resume, overwrite=overwrite)
            return _run(config, run, ranks, stop, console, goes_on=goes_on)


@contextmanager
def _alone(run: RunDirectory, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Keep other runs out of the folder; InputError, on every rank, if there is one already, and
    for a disk that is full or cannot be written."""
    lock, problem = RunLock(run.path), None
    if ranks.first:
        try:
            lock.take()
        except (InputError, OSError) as error:
            problem = error
    if ranks.largest([float(problem is not None)], device)[0]:
        reason = problem if isinstance(problem, InputError) else f"cannot be used: {problem}"
        raise InputError(f"--output {run.path} {reason}") from problem
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise InputError(
            f"--output {run.path} cannot be written: {error}. The checkpoints in it are whole: "
            "make room, then go on with --resume."
        ) from error
    finally:
        lock.release()


def _run(
    config: TrainConfig,
    run: RunDirectory,
    ranks: Ranks,
    stop: StopRequest,
    console: Console | None,
    *,
    goes_on: bool,
) -> dict[str, Any]:
    """Begin or go on, to the end; returns the record of the test images."""
    session = build_session(config, ranks)
    ranks.barrier()
    if ranks.first and not goes_on:
        run.begin(config)
    reporter = Reporter()
    if console is not None and ranks.first:
        reporter = ConsoleReporter(
            console, epochs=config.schedule.epochs, steps=session.state.steps_per_epoch
        )
    with reporter:
        finished = run.finished() if goes_on else None
        if finished is None:
            _train(session, run, reporter, stop, goes_on=goes_on)
            finished = _finish(session, run, reporter)
        else:
            reporter.message(f"the run in {run.path} is finished already")
    if ranks.first:
        _report(session, run, reporter, finished)
    ranks.barrier()  # torchrun ends all when one fails at its exit: not before this is written
    return finished


def _train(
    session: Session, run: RunDirectory, reporter: Reporter, stop: StopRequest, *, goes_on: bool
) -> None:
    """All epochs that are left."""
    state, loop, config, ranks = session.state, session.loop, session.config, session.ranks
    _introduce(session, reporter)
    if goes_on:
        restore(session, run, reporter)
    loop.keep_for_inspection = partial(keep, session, run)
    timer = Timer(config.run.checkpoint_minutes)

    def after_step() -> None:
        wishes = [float(bool(stop)), float(ranks.first and timer.due())]
        wants_stop, is_due = ranks.largest(wishes, session.device)
        if wants_stop:
            _stop(session, run, stop)
        if is_due and 0 < state.step_in_epoch < state.steps_per_epoch:
            save(session, run)
            timer.restart()

    log = None
    if config.run.tensorboard and ranks.first:
        log = TensorBoardLog(run.path, state.step)
    with closing(log) if log is not None else nullcontext():
        while state.epoch < config.schedule.epochs:
            first_batch = state.step_in_epoch * config.optim.accumulation
            session.train_loader.set_epoch(state.epoch, first_batch)
            reporter.start_epoch(state.epoch + 1, state.steps_per_epoch, state.step_in_epoch)
            train_epoch(loop, session.train_loader, reporter=reporter, after_step=after_step)
            record = _close_epoch(session, run, reporter, stop)
            timer.restart()
            if log is not None:
                log.add(record)
            reporter.end_epoch(record)
            after_step()
    _mention_skipped(session.train_loader, "training", reporter)
    _mention_skipped(session.validation_loader, "validation", reporter)


def _close_epoch(
    session: Session, run: RunDirectory, reporter: Reporter, stop: StopRequest
) -> dict[str, Any]:
    """Validate, log and store a trained epoch; returns its record."""
    state, started = session.state, time.perf_counter()
    reporter.start_evaluation("validation", len(session.validation_loader.dataset))

    def on_batch(images: int) -> None:
        reporter.evaluated(images)
        if stop and session.ranks.world == 1:
            _stop(session, run, stop)

    with gathered(state.evaluated):
        result = session.task.validate(session, session.validation_loader, on_batch=on_batch)
    meter = state.meter.together(session.ranks, session.device)
    seconds = meter.seconds + time.perf_counter() - started
    record = {
        "kind": "epoch",
        "epoch": state.epoch + 1,
        "step": state.step,
        **meter.figures(accuracy=session.task.has_accuracy),
        **{f"validation_{name}": value for name, value in result.items()},
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
        "seconds": seconds,
        "peak_memory_gib": session.ranks.largest([peak_memory(session.device)], session.device)[0],
    }
    if not math.isfinite(result.get("loss", 0.0)):
        reporter.message(f"the validation loss of epoch {record['epoch']} is not finite")
    state.seconds, state.meter = state.seconds + seconds, Meter()
    if session.ranks.first:
        run.append(record)
    save(session, run)
    return record


def _stop(session: Session, run: RunDirectory, stop: StopRequest) -> None:
    """Store a checkpoint and raise what the signal asks for."""
    state = session.state
    save(session, run)
    where = f"epoch {state.epoch + 1}, step {state.step_in_epoch} of {state.steps_per_epoch}"
    raise stop.error(
        f"stopped by {stop.name} in {where}. A checkpoint of this moment is in {run.store.root}: "
        "the same command with --resume goes on from there, exactly."
    )


def _finish(session: Session, run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Evaluate the test images, once, and write what stays of the run."""
    state, ranks, task = session.state, session.ranks, session.task
    test_set = task.open_dataset("test")
    batch_size = micro_batch_size(session.config, ranks)
    loader = task.open_loader(state.model, test_set, ranks, batch_size=batch_size)
    reporter.start_evaluation("test", len(test_set))
    with gathered(state.evaluated):
        figures = task.test(session, run, loader, reporter)
    record = {
        "kind": "test",
        "epoch": state.epoch,
        **figures,
        "data": test_set.name,
        "skipped": len(loader.skipped),
        "seconds": state.seconds,
        "precision": session.precision,
        "machine": describe_machine(),
    }
    tensors, _ = gather_state(state, keep=ranks.first)
    if ranks.first:
        figures = task.figures(record)
        description = session.description
        save_model(
            state.evaluated,
            run.path,
            state=evaluated_weights(tensors),
            **{**description, "v2m": {**description["v2m"], "test": figures}},
        )
        run.append(record)
    _mention_skipped(loader, "test", reporter)
    ranks.barrier()
    return record


def _introduce(session: Session, reporter: Reporter) -> None:
    config, state = session.config, session.state
    parameters = sum(p.numel() for p in state.model.parameters())
    device = torch.cuda.get_device_name() if session.device.type == "cuda" else session.device.type
    processes = f" x {session.ranks.world}" if session.ranks.world > 1 else ""
    for problem in getattr(session.train_set, "problems", []):
        reporter.message(f"left out: {problem}")
    reporter.message(
        f"{state.model.pretrained_cfg['architecture']} ({parameters:,} parameters) on "
        f"{len(session.train_set):,} "
        f"images of {session.train_set.name}, {config.schedule.epochs} epochs of "
        f"{state.steps_per_epoch} steps of "
        f"{config.data.batch_size}, {session.precision} on {device}{processes}"
    )


def _mention_skipped(loader: Any, split: str, reporter: Reporter) -> None:
    if loader.skipped:
        count, first = len(loader.skipped), ", ".join(list(loader.skipped)[:3])
        more = ", ..." if count > 3 else ""
        reporter.message(
            f"{count} unreadable {split} image{'s' * (count > 1)} skipped: {first}{more}"
        )


def _report(
    session: Session, run: RunDirectory, reporter: Reporter, record: dict[str, Any]
) -> None:
    """Write the report, and say the result."""
    if session.task.reports and not (run.path / REPORT).exists():
        write_report(run.path)
    reporter.message(
        f"test {session.task.summary(record)} on {record['images']:,} images of {record['data']}, "
        f"after {clock(record['seconds'])} of training"
    )
    if session.task.reports:
        reporter.message(f"report: {run.path / REPORT}")
