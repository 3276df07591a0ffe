"""Sharded models compute what whole ones do, whatever their structure. (Several ranks: see
test_distributed.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from helpers import small
from v2m.engine.config import RunConfig, TrainConfig
from v2m.engine.distributed import Ranks
from v2m.engine.session import _network
from v2m.engine.sharding import as_shards, blocks, gathered, shard, whole
from v2m.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MODELS = {
    "v2m_nano_patch4_28": 2,
    "v2m_local_tiny_patch16_224": 2,
    "v2m_hier_small_224": 5,
    "vim_tiny_patch16_224": 2,
    "vmamba_tiny_224": 5,
}


def build(name: str) -> torch.nn.Module:
    return small(name, drop_rate=0.0) if name in MODELS else timm.create_model(name)


@pytest.mark.parametrize("name", [*MODELS, "test_vit"])
def test_a_sharded_model_gives_the_same_results_and_gradients(name: str) -> None:
    model = build(name)
    assert len(blocks(model)) == MODELS.get(name, 6)
    sharded = deepcopy(model)
    shard(sharded, Ranks(), CPU)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert sum(isinstance(m, FSDPModule) for m in sharded.modules()) == len(blocks(model)) + 1
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    if name in MODELS:
        images = torch.randn(2, model.config.in_chans, *model.config.img_size)
    for network in (model.train(), sharded.train()):
        network(images).square().mean().backward()
    others = dict(sharded.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        gradient = whole(others[parameter_name].grad)
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7), parameter_name
    with gathered(sharded), torch.inference_mode():
        assert not any(isinstance(p, DTensor) for p in sharded.parameters())
        expected = model.eval()(images)
        assert torch.allclose(sharded.eval()(images), expected, rtol=1e-5, atol=1e-6)
        assert not any(isinstance(p, DTensor) for p in sharded.parameters()), "it stays gathered"
    assert all(isinstance(p, DTensor) for p in sharded.parameters())


def test_marks_on_parameters_stay() -> None:
    model = small("v2m_nano_patch4_28")
    model.pos_embed._no_weight_decay = True
    shard(model, Ranks(), CPU)
    assert model.pos_embed._no_weight_decay


def test_whole_tensors_and_shards_are_turned_into_each_other() -> None:
    model = small("v2m_nano_patch4_28")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model, Ranks(), CPU)
    after = model.state_dict()
    assert all(torch.equal(whole(after[name]), value) for name, value in before.items())
    doubled = as_shards({name: 2 * value for name, value in before.items()}, after)
    assert all(isinstance(value, DTensor) for value in doubled.values())
    model.load_state_dict(doubled)
    found = model.state_dict()
    assert all(torch.equal(whole(found[name]), 2 * value) for name, value in before.items())
    step = torch.tensor(3.0)
    assert as_shards({"step": step}, after)["step"] is step


def test_on_a_cpu_it_needs_the_eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2M_BACKEND", "cpu")
    config = TrainConfig(run=RunConfig(parallel="fsdp"))
    with pytest.raises(InputError, match=r"fsdp is for GPUs; on a CPU .* V2M_BACKEND=eager"):
        _network(config, build("test_vit"), None, CPU, Ranks(world=2), 4, nullcontext)
