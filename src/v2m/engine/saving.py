"""When and how a run's state goes to its checkpoints, comes back, and is kept for inspection."""

from __future__ import annotations

import shutil
import sys
import time
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

try:
    import resource
except ImportError:  # Windows
    resource = None

from v2m.engine.checkpoint import gather_state, read_state, read_values, write_state
from v2m.engine.config import to_dict
from v2m.engine.loop import Batch
from v2m.engine.progress import Reporter
from v2m.engine.rundir import NON_FINITE, RunDirectory
from v2m.engine.session import Session
from v2m.engine.store import DamagedError
from v2m.errors import InputError

__all__ = ["Timer", "keep", "peak_memory", "restore", "save"]


class Timer:
    """Says when a checkpoint within an epoch is due.

    Args:
        minutes: since the last one; none for never.
    """

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint has just been stored."""
        self.last = time.monotonic()

    def due(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.last >= self.seconds


def save(session: Session, run: RunDirectory) -> None:
    """Store a checkpoint of this moment; collective. InputError if the disk does not take it."""
    state, ranks = session.state, session.ranks
    meter = state.meter.together(ranks, session.device)
    contents = gather_state(state, keep=ranks.first)
    if ranks.first:
        extra = {
            "position": state.position(meter),
            "config": to_dict(session.config),
            "data": _data(session),
        }
        write = partial(
            write_state,
            state=state,
            contents=contents,
            description=session.description,
            extra=extra,
        )
        try:
            run.store.save(state.step, write)
        except OSError as error:
            raise InputError(
                f"the checkpoint of step {state.step} cannot be written to {run.store.root}: "
                f"{error}. The one before is untouched: make room, then go on with --resume."
            ) from error
    ranks.barrier()


def restore(session: Session, run: RunDirectory, reporter: Reporter) -> None:
    """Take up the newest checkpoint that is whole."""
    state, ranks = session.state, session.ranks
    folder = run.store.newest(reporter.message)
    if folder is None:
        reporter.message(f"there is no checkpoint in {run.path} yet: starting at the first epoch")
    else:
        try:
            _check_data(read_values(folder).get("data"), session, run)
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


def _data(session: Session) -> dict[str, Any]:
    """What tells the training images from others."""
    return {"images": len(session.train_set), "classes": list(session.description["label_names"])}


def _check_data(then: dict[str, Any] | None, session: Session, run: RunDirectory) -> None:
    """InputError if a run's training images are not those it began with (none: not known)."""
    now = _data(session)
    if then is None or then == now:
        return
    changes = []
    if then["images"] != now["images"]:
        changes.append(f"{now['images']:,} images (then {then['images']:,})")
    before, after = then["classes"], now["classes"]
    if len(before) != len(after):
        changes.append(f"{len(after)} classes (then {len(before)})")
    changes += [
        f"class {i} is {new!r} (then {old!r})"
        for i, (old, new) in enumerate(zip(before, after))
        if old != new
    ][:3]
    raise InputError(
        f"--resume: the training data is not what the run in {run.path} began with: "
        f"{'; '.join(changes)}. Put it back, or begin another run with another --output."
    )


def keep(session: Session, run: RunDirectory, message: str, group: list[Batch]) -> str:
    """Keep the state and the batches of a step that went wrong; returns where, for the message.
    Collective."""
    folder, state = run.path / NON_FINITE, session.state
    contents = gather_state(state, keep=session.ranks.first)
    if session.ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        extra = {"position": state.position(state.meter), "message": message}
        write_state(folder, state, contents, description=session.description, extra=extra)
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


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has had, in GiB: on its GPU, else on the machine (0 where
    the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
