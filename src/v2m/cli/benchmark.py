"""`v2m benchmark`: speed and memory of models on this machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "run"]

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m benchmark` to the command line."""
    parser = subparsers.add_parser(
        "benchmark",
        help="time models on this machine",
        description="Time inference or training steps of models side by side: the median of "
        "several rounds, in which the models take turns. On a CUDA device also the most memory "
        "that was allocated.",
        epilog="example: v2m benchmark v2m_tiny_patch16_224 deit_tiny_patch16_224 --batch 32",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names that v2m or timm knows")
    parser.add_argument("--batch", type=int, default=8, help="images a batch (8)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (the model's own)")
    parser.add_argument("--train", action="store_true", help="time training steps, not inference")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of autocast (bfloat16 on CUDA)")
    parser.add_argument("--backend", help="force a backend of the scan")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (10)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Time the models in turn and print a table; 0, or InputError for what cannot be timed."""
    import torch

    from v2m.ops import use_backend
    from v2m.ops.backend import BACKENDS

    for option in ("batch", "rounds", "size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option} must be at least 1; got {value}.")
    device = _device(args.device)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    if args.backend not in (None, *BACKENDS):
        raise InputError(f"--backend must be one of {', '.join(BACKENDS)}; got {args.backend!r}.")
    with use_backend(args.backend):
        steps = {model: _step(model, args, device, dtype) for model in args.models}
        for step in steps.values():  # kernels are compiled here
            step()
        times: dict[str, list[float]] = {model: [] for model in steps}
        memory = dict.fromkeys(steps, 0)
        for _ in range(args.rounds):
            for model, step in steps.items():
                seconds, most = _timed(step, device)
                times[model].append(seconds)
                memory[model] = max(memory[model], most)
    work = "training" if args.train else "inference"
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"{work}, batch {args.batch}, {name}, {device}"
    for heading in ("model", "ms", "images/s", "memory"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model, seconds in times.items():
        median = statistics.median(seconds)
        most = f"{memory[model] / 1e9:.2f} GB" if memory[model] else "-"
        table.add_row(model, f"{1e3 * median:.1f}", f"{args.batch / median:.1f}", most)
    Console().print(table)
    return 0


def _device(asked: str | None):
    import torch

    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise InputError(
            f"--device {asked!r} cannot be used here: {line} Try --device cpu."
        ) from None
    return device


def _step(name: str, args: argparse.Namespace, device, dtype) -> Callable[[], None]:
    """One batch of inference, or one training step, of a new model."""
    import torch

    import v2m

    keywords = {} if args.size is None else {"img_size": args.size}
    try:
        model = v2m.create_model(name, **keywords)
    except TypeError as error:  # a model of timm that has no such keyword
        raise InputError(f"{name} takes no --size: {error}.") from None
    model = model.to(device).train(args.train)
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    if args.size is not None:
        height = width = args.size
    images = torch.randn(args.batch, channels, height, width, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def infer() -> None:
        with torch.inference_mode(), autocast:
            model(images)

    if not args.train:
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.zeros(args.batch, dtype=torch.long, device=device)

    def train() -> None:
        with autocast:
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def _timed(step: Callable[[], None], device) -> tuple[float, int]:
    """Seconds of one call, and the most bytes allocated on a CUDA device meanwhile."""
    import torch

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait()
    start = time.perf_counter()
    step()
    wait()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
