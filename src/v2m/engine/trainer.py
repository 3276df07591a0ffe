"""A whole run: epochs, validation, checkpoints, and at the end the test images, once."""

from __future__ import annotations

import math
import os
import shutil
import time
from functools import partial
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from v2m.engine.checkpoint import read_state, write_state
from v2m.engine.config import TrainConfig, to_dict
from v2m.engine.distributed import join_ranks
from v2m.engine.loop import Batch, train_epoch
from v2m.engine.progress import ConsoleReporter, Reporter, clock
from v2m.engine.rundir import NON_FINITE, REPORT, RunDirectory
from v2m.engine.session import Session, build_session, micro_batch_size
from v2m.engine.signals import StopRequest, stop_on_signals
from v2m.engine.state import Meter
from v2m.engine.store import DamagedError
from v2m.errors import InputError
from v2m.models.checkpoint import save_model
from v2m.visualize.machine import describe_machine
from v2m.visualize.report import write_report


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
    with join_ranks(config.run.device) as ranks, stop_on_signals() as stop:
        run = RunDirectory(output, keep=config.run.keep_checkpoints)
        goes_on = run.check(config, resume=resume, overwrite=overwrite)
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
        return finished


def _train(
    session: Session, run: RunDirectory, reporter: Reporter, stop: StopRequest, *, goes_on: bool
) -> None:
    """All epochs that are left."""
    state, loop, epochs = session.state, session.loop, session.config.schedule.epochs
    _introduce(session, reporter)
    if goes_on:
        _restore(session, run, reporter)
    loop.keep_for_inspection = partial(_keep, session, run)

    def after_step() -> None:
        if session.ranks.largest([float(bool(stop))], session.device)[0]:
            _stop(session, run, stop)

    while state.epoch < epochs:
        session.train_loader.set_epoch(
            state.epoch, state.step_in_epoch * session.config.optim.accumulation
        )
        reporter.start_epoch(state.epoch + 1, state.steps_per_epoch, state.step_in_epoch)
        train_epoch(loop, session.train_loader, reporter=reporter, after_step=after_step)
        record = _close_epoch(session, run, reporter, stop)
        reporter.end_epoch(record)
        after_step()
    _mention_skipped(session.train_loader, reporter)


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
    }
    if session.device.type == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not math.isfinite(result.get("loss", 0.0)):
        reporter.message(f"the validation loss of epoch {record['epoch']} is not finite")
    state.seconds, state.meter = state.seconds + seconds, Meter()
    if session.ranks.first:
        run.append(record)
    _save(session, run)
    return record


def _save(session: Session, run: RunDirectory) -> None:
    """Store a checkpoint of this moment; collective."""
    state = session.state
    meter = state.meter.together(session.ranks, session.device)
    if session.ranks.first:
        extra = {"position": state.position(meter), "config": to_dict(session.config)}
        write = partial(write_state, state=state, description=session.description, extra=extra)
        try:
            run.store.save(state.step, write)
        except OSError as error:
            raise InputError(
                f"the checkpoint of step {state.step} cannot be written to {run.store.root}: "
                f"{error}. The one before is untouched: make room, then go on with --resume."
            ) from error
    session.ranks.barrier()


def _restore(session: Session, run: RunDirectory, reporter: Reporter) -> None:
    """Take up the newest checkpoint that is whole."""
    state, ranks = session.state, session.ranks
    folder = run.store.newest(reporter.message)
    if folder is None:
        reporter.message(f"there is no checkpoint in {run.path} yet: starting at the first epoch")
    else:
        try:
            values = read_state(folder, state)
            state.move_to(values["position"], first_rank=ranks.first)
        except DamagedError as error:
            raise InputError(f"--resume: {error}. Pass --overwrite to start anew.") from error
        session.loop.schedule.step_update(state.step)
        done = f"after epoch {state.epoch}"
        if state.step_in_epoch:
            done += f" and {state.step_in_epoch} steps of {state.steps_per_epoch}"
        reporter.message(f"going on {done}, from {folder}")
    ranks.barrier()
    if ranks.first:
        run.forget_after(state.epoch)


def _stop(session: Session, run: RunDirectory, stop: StopRequest) -> None:
    """Store a checkpoint and raise what the signal asks for."""
    state = session.state
    _save(session, run)
    where = f"epoch {state.epoch + 1}, step {state.step_in_epoch} of {state.steps_per_epoch}"
    raise stop.error(
        f"stopped by {stop.name} in {where}. A checkpoint of this moment is in {run.store.root}: "
        "the same command with --resume goes on from there, exactly."
    )


def _keep(session: Session, run: RunDirectory, message: str, group: list[Batch]) -> str:
    """Keep the state and the batches of a step that went wrong; returns where, for the message."""
    folder = run.path / NON_FINITE
    if session.ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        extra = {"position": session.state.position(session.state.meter), "message": message}
        write_state(folder, session.state, description=session.description, extra=extra)
        tensors = {}
        for index, (images, targets) in enumerate(group):
            tensors |= _flat(f"images/{index}", images) | _flat(f"targets/{index}", targets)
        save_file(tensors, folder / "batch.safetensors")
    return f"The state before the step and the batch are kept in {folder}."


def _flat(name: str, value: Any) -> dict[str, torch.Tensor]:
    """Nested lists and dicts of tensors as one dict of named ones."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().cpu().contiguous()}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in _flat(f"{name}/{key}", part).items()}


def _finish(session: Session, run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Evaluate the test images, once, and write what stays of the run."""
    state, ranks, task = session.state, session.ranks, session.task
    test_set = task.open_dataset("test")
    batch_size = micro_batch_size(session.config, ranks)
    loader = task.open_loader(state.model, test_set, ranks, batch_size=batch_size)
    reporter.start_evaluation("test", len(test_set))
    record = {
        "kind": "test",
        "epoch": state.epoch,
        **task.test(session, run, loader, reporter),
        "data": test_set.name,
        "skipped": len(loader.skipped),
        "seconds": state.seconds,
        "precision": session.precision,
        "machine": describe_machine(),
    }
    if ranks.first:
        figures = task.figures(record)
        description = session.description
        save_model(
            state.evaluated,
            run.path,
            **{**description, "v2m": {**description["v2m"], "test": figures}},
        )
        run.append(record)
    _mention_skipped(loader, reporter)
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


def _mention_skipped(loader: Any, reporter: Reporter) -> None:
    if loader.skipped:
        first = ", ".join(list(loader.skipped)[:3])
        reporter.message(f"{len(loader.skipped)} unreadable images were skipped: {first} ...")


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
