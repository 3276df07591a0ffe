"""Whole models: inference, training steps and their memory, beside timm's compiled DeiT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import timm
import torch
from torch.nn import functional as F

import v2m
from v2m.engine.graphs import graphed
from v2m.models.registry import MODELS

from .measure import Item, Row, Setting, replayed

TINY, SMALL, HIER = "v2m_tiny_patch16_224", "v2m_small_patch16_224", "v2m_hier_small_224"
DEIT_T, DEIT_S = "deit_tiny_patch16_224", "deit_small_patch16_224"
# (name, way, size, batch); a way with "graph" replays a CUDA graph, of training the whole step;
# "captured" is the model alone, as with `run.cuda_graph`.
INFERENCE = (
    (DEIT_T, "compiled graph", 224, 128),
    (TINY, "eager graph", 224, 128),
    (TINY, "eager", 224, 128),
    (TINY, "compiled", 224, 128),
    (TINY, "compiled graph", 224, 128),
    (DEIT_S, "compiled graph", 224, 128),
    (SMALL, "eager graph", 224, 128),
    (HIER, "eager graph", 224, 128),
    (HIER, "compiled graph", 224, 128),
    (DEIT_T, "compiled graph", 1248, 8),
    (TINY, "eager graph", 1248, 8),
    (DEIT_T, "compiled graph", 2048, 4),
    (TINY, "eager graph", 2048, 4),
)
TRAINING = (
    (DEIT_T, "compiled", 224, 128),
    (DEIT_T, "compiled graph", 224, 128),
    (TINY, "eager graph", 224, 128),
    (TINY, "compiled graph", 224, 128),
    (TINY, "eager", 224, 128),
    (TINY, "captured", 224, 128),
    (DEIT_S, "compiled", 224, 128),
    (SMALL, "eager graph", 224, 128),
    (HIER, "eager graph", 224, 128),
    (HIER, "compiled", 224, 128),
    (HIER, "compiled captured", 224, 128),
    (HIER, "compiled graph", 224, 128),
    (DEIT_T, "compiled", 1248, 8),
    (TINY, "eager graph", 1248, 8),
    (TINY, "eager", 1248, 8),
    (DEIT_T, "compiled", 2048, 4),
    (TINY, "eager graph", 2048, 4),
    (TINY, "eager", 2048, 4),
)


def build(name: str, setting: Setting, size: int | None = None) -> tuple[torch.nn.Module, tuple]:
    """A model and the shape of its images; on a CPU a small one in its place."""
    keywords = {}
    if setting.tiny and name.startswith("deit"):
        name = "test_vit"
    elif setting.tiny:
        shallow = {"depths": (1, 1, 1, 1)} if "hier" in name or "vmamba" in name else {"depth": 1}
        keywords = shallow | ({} if name.endswith("_28") else {"img_size": 64})
    elif size is not None and size != 224:
        keywords = {"img_size": size}
    known = name in MODELS
    model = (v2m.create_model if known else timm.create_model)(name, **keywords)
    channels, height, _ = model.pretrained_cfg["input_size"]
    side = keywords.get("img_size", height)
    return model.to(setting.device), (channels, side, side)


def inference_items(setting: Setting) -> Iterator[Item]:
    for case in INFERENCE[:3] if setting.tiny else INFERENCE:
        yield "inference {} {} {} {}".format(*case), partial(inference, setting, *case)


def training_items(setting: Setting) -> Iterator[Item]:
    for case in TRAINING[2:3] if setting.tiny else TRAINING:
        yield "training {} {} {} {}".format(*case), partial(training, setting, *case)


def registered_items(setting: Setting) -> Iterator[Item]:
    """A training step of every model there is."""
    for name in list(MODELS)[::5] if setting.tiny else MODELS:
        batch = 64
        yield f"registered {name}", partial(training, setting, name, "eager graph", None, batch)


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """For this size alone: what was compiled before must not make it dynamic."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def _label(work: str, name: str, way: str, batch: int, shape: tuple) -> Row:
    return {"workload": work, "contestant": name, "way": way, "batch": batch, "size": shape[-1]}


def inference(setting: Setting, name: str, way: str, size: int, batch: int) -> Iterator[Row]:
    before = _allocated(setting)
    model, shape = build(name, setting, size)
    model.eval()
    batch = _batch(setting, way, batch)
    images = torch.randn(batch, *shape, device=setting.device)
    run = compiled(model) if "compiled" in way and not setting.tiny else model

    def forward():
        with torch.no_grad(), torch.autocast(setting.device, setting.dtype, cache_enabled=False):
            return run(images)

    out = forward()
    if not out.isfinite().all():
        raise ArithmeticError(f"{name}: the logits are not finite")
    call = replayed(forward) if "graph" in way and not setting.tiny else forward
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    time = setting.milliseconds(call, 200)
    yield _label("inference", name, way, batch, shape) | _rate(setting, way, batch, time, before)


def training(setting: Setting, name: str, way: str, size: int | None, batch: int) -> Iterator[Row]:
    """Forward, backward and AdamW, bfloat16 by autocast."""
    before = _allocated(setting)
    model, shape = build(name, setting, size)
    model.train()
    batch = _batch(setting, way, batch)
    run = compiled(model) if "compiled" in way and not setting.tiny else model
    autocast = partial(torch.autocast, setting.device, setting.dtype)
    if "captured" in way:
        run = graphed(run, (batch, *shape), torch.device(setting.device), autocast)
    cuda = setting.device != "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda, capturable=cuda)
    images = torch.randn(batch, *shape, device=setting.device)
    labels = torch.randint(10, (batch,), device=setting.device)

    def step():
        with autocast(cache_enabled="graph" not in way):
            loss = F.cross_entropy(run(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # or its graph would live on, and with it what forbids a capture

    for _ in range(1 if setting.dry or setting.tiny else 3):
        loss = step()
    if not torch.isfinite(loss):
        raise ArithmeticError(f"{name}: the loss is {float(loss)}")
    call = replayed(step) if "graph" in way and not setting.tiny else step
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    time = setting.milliseconds(call, 300 if size else 150)
    work = "training" if size else "registered"
    yield _label(work, name, way, batch, shape) | _rate(setting, way, batch, time, before)


def _batch(setting: Setting, way: str, batch: int) -> int:
    """Dry runs stand beside each other; only what torch.compile makes depends on the batch."""
    return 2 if setting.tiny or (setting.dry and "compiled" not in way) else batch


def _allocated(setting: Setting) -> int:
    return 0 if setting.device == "cpu" else torch.cuda.memory_allocated()


def _rate(setting: Setting, way: str, batch: int, time: float, before: int) -> Row:
    """before: bytes that were allocated already. The pool of a graph is in no statistic."""
    replays = "graph" in way or "captured" in way
    row: Row = {"ms": time, "images_per_second": 1e3 * batch / time}
    if setting.device != "cpu" and not replays:
        row["memory_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return row
