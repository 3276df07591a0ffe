"""A predictor that serves for long: the same answers for every request, and no more memory."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import v2m
from helpers import fill_deterministically
from v2m.models import save_model
from v2m.predict import Predictor

SIDES = (8, 9, 16, 23, 28, 40, 64)
MEGABYTE = 2**20


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    model = v2m.create_model(
        "v2m_nano_patch4_28", img_size=8, embed_dim=8, depth=2, d_state=2, in_chans=1, num_classes=5
    )
    fill_deterministically(model)
    return Predictor.load(save_model(model, tmp_path / "model"), device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Images of many sizes, modes and formats."""
    generator = random.Random(0)
    paths = []
    for number in range(60):
        mode = generator.choice(["L", "RGB", "RGBA", "CMYK", "P"])
        size = generator.choice(SIDES), generator.choice(SIDES)
        image = Image.frombytes("L", size, generator.randbytes(size[0] * size[1])).convert(mode)
        suffix = "jpg" if mode in ("L", "RGB", "CMYK") and number % 2 else "tiff"
        paths.append(tmp_path / f"{number}.{suffix}")
        image.save(paths[-1])
    return paths


@pytest.fixture
def bad(tmp_path: Path, images: list[Path]) -> list[Path]:
    """What is no image, in several ways."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    contents = {
        "empty.png": b"",
        "text.jpg": b"hello",
        "cut.png": file.getvalue()[:60],
        "noise.png": random.Random(1).randbytes(500),
        "cut.jpg": next(p for p in images if p.suffix == ".jpg").read_bytes()[:100],
    }
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_bytes(contents[path.name])
    return [*paths, tmp_path / "absent.png", tmp_path]


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def serve(predictor: Predictor, images: list[Path], bad: list[Path], requests: int) -> list[int]:
    """Random requests, each answer compared with that of the image alone; the memory after each
    twentieth of them."""
    expected = {
        path: next(predictor.predict([path], top=5, batch_size=1)).probabilities for path in images
    }
    generator, memory, wrong, refused = random.Random(0), [], 0, 0
    for request in range(requests):
        size = round(64 ** (generator.random() ** 2))  # 1 to 64, the small ones more often
        batch = generator.choices(images, k=size)
        spoiled = generator.random() < 0.01
        if spoiled:
            batch.insert(generator.randrange(len(batch) + 1), generator.choice(bad))
        skipped: list[tuple[Path, str]] = []
        answers = list(predictor.predict(batch, top=5, batch_size=64, skipped=skipped))
        refused += len(skipped)
        assert [path for path, _ in skipped] == [path for path in batch if path in bad]
        assert [answer.path for answer in answers] == [path for path in batch if path not in bad]
        for answer in answers:
            one, other = torch.tensor(answer.probabilities), torch.tensor(expected[answer.path])
            wrong += not torch.allclose(one, other, atol=1e-5)
        if (request + 1) % (requests // 20) == 0:
            memory.append(resident())
    assert wrong == 0
    assert refused > 0 or requests < 1000
    return memory


def assert_flat(memory: list[int]) -> None:
    """After a fifth of the requests it grows no more than by a hundredth, or some megabytes."""
    settled, after = max(memory[2:6]), max(memory[-4:])
    print(f"memory: {settled / MEGABYTE:.1f} MiB, at the end {after / MEGABYTE:.1f} MiB")
    assert after - settled < max(4 * MEGABYTE, settled / 100)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks into /proc")
@pytest.mark.parametrize("requests", [40, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests(
    predictor: Predictor,
    images: list[Path],
    bad: list[Path],
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("V2M_BACKEND", "eager")
    before = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    assert_flat(serve(predictor, images, bad, requests))
    after = predictor.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
