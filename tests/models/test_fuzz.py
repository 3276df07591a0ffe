"""Mutated files: whatever the bytes, an InputError or a model, never anything else.

Seeded, so that a failure can be repeated: the seed is in the name of the test.
"""

import copy
import json
import random

import pytest
import torch

import v2m
from helpers import small
from v2m.errors import InputError
from v2m.models import save_model

SEEDS = range(6)
PER_SEED = 40
JUNK = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**40,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "v2m",
    "hf-hub:a/b",
    [],
    [1],
    [1, 2, 3],
    [[0]],
    {},
    {"a": 1},
    "\ud800",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = small("v2m_nano_patch4_28", embed_dim=8, d_state=2, depth=1)
    return save_model(model, folder, label_names=[str(i) for i in range(10)])


def try_to_load(source) -> bool:
    """Whether it loaded; anything but an InputError escapes and fails the test."""
    try:
        model = v2m.from_checkpoint(source)
    except InputError:
        return False
    assert isinstance(model, torch.nn.Module)
    return True


def mutate(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(["flip", "flips", "cut", "insert", "zero", "repeat", "length"])
    data = bytearray(data)
    at = rng.randrange(min(len(data), rng.choice([16, 600, len(data)])))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "flips":
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "repeat":
        data += data[at:]
    else:
        data[:8] = rng.choice([0, 1, 2**31, 2**63, len(data)]).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_safetensors(saved, tmp_path, seed):
    original = (saved / "model.safetensors").read_bytes()
    rng, path = random.Random(seed), tmp_path / "model.safetensors"
    results = []
    for _ in range(PER_SEED):
        path.write_bytes(mutate(original, rng))
        results.append(try_to_load(path))
    assert not all(results)


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_bytes_of_the_configuration(saved, tmp_path, seed):
    original = (saved / "config.json").read_bytes()
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    rng = random.Random(seed)
    results = []
    for _ in range(PER_SEED):
        (tmp_path / "config.json").write_bytes(mutate(original, rng))
        results.append(try_to_load(tmp_path))
    assert not all(results)


def leaves(config, path=()):
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_junk_at_every_place_of_the_configuration(saved, tmp_path, junk):
    original = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    for path in leaves(original):
        if path[0] == "label_names" and len(path) > 1 and path[1] > 0:
            continue
        config = copy.deepcopy(original)
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = junk
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            try_to_load(tmp_path)
        except Exception as error:
            pytest.fail(f"{path} = {junk!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_pickles(tmp_path, seed):
    torch.save({"model": {"pos_embed": torch.zeros(1, 4, 8)}, "epoch": 3}, tmp_path / "x.pth")
    original, rng, path = (tmp_path / "x.pth").read_bytes(), random.Random(seed), tmp_path / "y.pth"
    for _ in range(PER_SEED):
        path.write_bytes(mutate(original, rng))
        assert not try_to_load(path)
