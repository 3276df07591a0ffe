"""A whole run: epochs, validation, checkpoints, and at the end the test images, once."""

from __future__ import annotations

import math
import os
import shutil
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from v2m.data import Loader, shuffle_patches
from v2m.engine.checkpoint import read_state, write_state
from v2m.engine.config import TrainConfig, to_dict
from v2m.engine.distributed import join_ranks
from v2m.engine.loop import Batch, train_epoch
from v2m.engine.progress import ConsoleReporter, Reporter, clock
from v2m.engine.rundir import NON_FINITE, PREDICTIONS, REPORT, RunDirectory
from v2m.engine.session import Session, build_session, open_dataset, open_loader
from v2m.engine.signals import StopRequest, stop_on_signals
from v2m.engine.state import Meter
from v2m.engine.store import DamagedError
from v2m.errors import InputError
from v2m.evaluation import ClassificationResult, evaluate_classifier, patch_size
from v2m.models.checkpoint import save_model
from v2m.visualize.machine import describe_machine
from v2m.visualize.report import write_report

SHUFFLE_SEED = 0


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
        The record of the test images: top1, top5, loss, shuffled_top1, ...

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
            if not (run.path / REPORT).exists():
                write_report(run.path)
            _say_result(reporter, run, finished)
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

    result = _evaluate(session, session.validation_loader, on_batch=on_batch)
    meter = state.meter.together(session.ranks, session.device)
    seconds = meter.seconds + time.perf_counter() - started
    record = {
        "kind": "epoch",
        "epoch": state.epoch + 1,
        "step": state.step,
        **meter.figures(),
        "validation_loss": result.loss,
        "validation_top1": result.top1,
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
        "seconds": seconds,
    }
    if session.device.type == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not math.isfinite(result.loss):
        reporter.message(f"the validation loss of epoch {record['epoch']} is not finite")
    state.seconds, state.meter = state.seconds + seconds, Meter()
    if session.ranks.first:
        run.append(record)
    _save(session, run)
    return record


def _evaluate(session: Session, loader: Loader, **keywords: Any) -> ClassificationResult:
    return evaluate_classifier(
        session.state.evaluated,
        loader,
        device=session.device,
        autocast=session.loop.autocast,
        limit_batches=session.config.run.limit_batches,
        **keywords,
    )


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
                f"{error}. "
                "The one before is untouched: make room, then go on with --resume."
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
            tensors |= {f"images/{index}": images.cpu(), f"targets/{index}": targets.cpu()}
        save_file(tensors, folder / "batch.safetensors")
    return f"The state before the step and the batch are kept in {folder}."


def _finish(session: Session, run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Evaluate the test images, once, and write what stays of the run."""
    state, ranks = session.state, session.ranks
    test_set = open_dataset(session.config, "test")
    loader = open_loader(session.config, state.model, test_set, ranks)
    reporter.start_evaluation("test", len(test_set))
    result = _evaluate(session, loader, on_batch=reporter.evaluated)
    shuffled = _shuffled_accuracy(session, loader, reporter)
    record = {
        "kind": "test",
        "epoch": state.epoch,
        **result.summary(),
        "shuffled_top1": shuffled,
        "data": test_set.name,
        "skipped": len(loader.skipped),
        "seconds": state.seconds,
        "precision": session.precision,
        "machine": describe_machine(),
    }
    if ranks.first:
        np.savez(run.path / PREDICTIONS, probabilities=result.probabilities, targets=result.targets)
        figures = {key: record[key] for key in ("top1", "top5", "shuffled_top1")}
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


def _shuffled_accuracy(session: Session, loader: Loader, reporter: Reporter) -> float | None:
    """Top-1 with the patches of each image in random order; None for a model without patches."""
    size = patch_size(session.state.evaluated)
    _, height, width = loader.input_size
    if size is None or height % size[0] or width % size[1]:
        return None
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    reporter.start_evaluation("test, patches shuffled", len(loader.dataset))
    result = _evaluate(
        session,
        loader,
        on_batch=reporter.evaluated,
        transform=lambda images: shuffle_patches(images, size, generator),
    )
    return result.top1


def _introduce(session: Session, reporter: Reporter) -> None:
    config, state = session.config, session.state
    parameters = sum(p.numel() for p in state.model.parameters())
    device = torch.cuda.get_device_name() if session.device.type == "cuda" else session.device.type
    processes = f" x {session.ranks.world}" if session.ranks.world > 1 else ""
    reporter.message(
        f"{state.model.pretrained_cfg['architecture']} ({parameters:,} parameters) on "
        f"{len(session.train_set):,} "
        f"images of {session.train_set.name}, {config.schedule.epochs} epochs of "
        f"{state.steps_per_epoch} steps of "
        f"{config.data.batch_size}, {session.precision} on {device}{processes}"
    )


def _mention_skipped(loader: Loader, reporter: Reporter) -> None:
    if loader.skipped:
        first = ", ".join(list(loader.skipped)[:3])
        reporter.message(f"{len(loader.skipped)} unreadable images were skipped: {first} ...")


def _say_result(reporter: Reporter, run: RunDirectory, record: dict[str, Any]) -> None:
    shuffled = record.get("shuffled_top1")
    ending = "" if shuffled is None else f" ({shuffled:.2%} with its patches shuffled)"
    reporter.message(
        f"test accuracy {record['top1']:.2%}{ending} on {record['images']:,} images of "
        f"{record['data']}, "
        f"after {clock(record['seconds'])} of training"
    )
    reporter.message(f"report: {run.path / REPORT}")
