"""Loaders: the same batches whatever loads them, every image once, bad ones reported."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from v2m.data import (
    SMALL_IMAGES,
    ArrayDataset,
    BadImageError,
    DataConfig,
    create_loader,
    load_dataset,
)
from v2m.errors import InputError

PLAIN = DataConfig(crop="center", horizontal_flip=0, random_erasing=0, color_jitter=0)
PLAIN = replace(PLAIN, auto_augment=None, crop_pct=1.0)
GREY = {"input_size": (1, 28, 28), "batch_size": 8}
CONFIGS = {
    "in memory": SMALL_IMAGES,
    "RandAugment": DataConfig(),
    "padded RandAugment": DataConfig(crop="padded", repeats=3),
}


def batches(loader, epoch: int = 0, first_batch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch, first_batch)
    return [(images.clone(), targets) for images, targets in loader]


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y)
    )


def numbered(count: int) -> ArrayDataset:
    """Image i is the number i in every pixel."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 4, 4))
    return ArrayDataset(
        name="numbers",
        images=images.copy(),
        targets=[0] * count,
        classes=["number"],
        mean=(0.0,),
        std=(1 / 255,),
    )


def seen(loader, epoch: int = 0, first_batch: int = 0) -> list[int]:
    found = batches(loader, epoch, first_batch)
    return [round(image.mean().item()) for images, _ in found for image in images]


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_number_of_workers_gives_the_same_batches(arrays, kind: str) -> None:
    epochs = []
    for workers in (0, 1, 2, 4):
        loader = create_loader(
            arrays, CONFIGS[kind], is_training=True, seed=5, num_workers=workers, **GREY
        )
        epochs.append([batches(loader, epoch) for epoch in (0, 1)])
    for other in epochs[1:]:
        assert same(epochs[0][0], other[0])
        assert same(epochs[0][1], other[1])
    assert not same(epochs[0][0], epochs[0][1])


def test_files_too_are_loaded_the_same_by_any_number_of_workers(make_folder) -> None:
    dataset = load_dataset(make_folder({"train/a": 9, "train/b": 7, "val/a": 1, "val/b": 1}))
    options = {"is_training": True, "input_size": (3, 16, 24), "batch_size": 4, "seed": 1}
    runs = [batches(create_loader(dataset, num_workers=n, **options), 2) for n in (0, 3)]
    assert same(*runs)
    assert runs[0][0][0].shape == (4, 3, 16, 24)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_loader_goes_on_where_another_stopped(arrays, kind: str, workers: int) -> None:
    build = lambda: create_loader(  # noqa: E731
        arrays, CONFIGS[kind], is_training=True, num_workers=workers, **GREY
    )
    loader = build()
    whole = [batches(loader, epoch) for epoch in range(3)]
    assert same(batches(build(), 2), whole[2])
    assert same(batches(build(), 1, first_batch=4), whole[1][4:])
    assert same(batches(loader, 0), whole[0])  # also backwards, on the same loader


@pytest.mark.parametrize("kind", CONFIGS)
def test_loading_does_not_touch_the_global_generators(arrays, kind: str) -> None:
    def draw() -> tuple:
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    def start() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    start()
    expected = draw()
    for workers in (0, 2):
        loader = create_loader(arrays, CONFIGS[kind], is_training=True, num_workers=workers, **GREY)
        start()
        first = batches(loader)
        assert draw() == expected
        assert same(first, batches(loader))  # and is not moved by them


def test_workers_can_be_started_by_spawn(make_folder) -> None:
    dataset = load_dataset(make_folder({"a": 6, "b": 6}))
    loader = create_loader(
        dataset, is_training=True, input_size=(3, 16, 16), batch_size=4, num_workers=0
    )
    workers = pickle.loads(pickle.dumps(loader._source))
    workers = DataLoader(
        workers.dataset,
        batch_sampler=workers.batch_sampler,
        collate_fn=workers.collate_fn,
        worker_init_fn=pickle.loads(pickle.dumps(loader._source.worker_init_fn)),
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert same(batches(loader), [(images, targets) for images, targets, _ in workers])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_does_not_show_in_the_next(arrays, workers: int) -> None:
    loader = create_loader(arrays, DataConfig(), is_training=True, num_workers=workers, **GREY)
    whole = batches(loader, 1)
    loader.set_epoch(0)
    for _ in loader:
        break
    assert same(batches(loader, 1), whole)
    loader.close()
    assert same(batches(loader, 1), whole)


def test_training_shows_every_image_once_an_epoch_in_a_new_order() -> None:
    loader = create_loader(
        numbered(50), PLAIN, is_training=True, input_size=(1, 4, 4), batch_size=5
    )
    orders = [seen(loader, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all(a != b for a, b in pairwise(orders))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_an_epoch_in_two_pieces_shows_every_image_once(stop: int) -> None:
    options = {"is_training": True, "input_size": (1, 4, 4), "batch_size": 5}
    loader = create_loader(numbered(50), PLAIN, **options)
    before = seen(loader, 3)[: 5 * stop]
    after = seen(create_loader(numbered(50), PLAIN, **options), 3, first_batch=stop)
    assert sorted(before + after) == list(range(50))


def test_evaluation_shows_all_in_order() -> None:
    loader = create_loader(
        numbered(53), PLAIN, is_training=False, input_size=(1, 4, 4), batch_size=10
    )
    assert len(loader) == 6
    assert seen(loader) == list(range(53))


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_ranks_share_the_batches_of_one(arrays, repeats: int) -> None:
    config = replace(SMALL_IMAGES, repeats=repeats)
    options = {"is_training": True, "input_size": (1, 28, 28), "seed": 2}
    alone = batches(create_loader(arrays, config, batch_size=8, **options), 1)
    ranks = [
        batches(create_loader(arrays, config, batch_size=4, rank=r, world_size=2, **options), 1)
        for r in (0, 1)
    ]
    for step, (images, targets) in enumerate(alone):
        for rank in (0, 1):
            assert torch.equal(images[rank::2], ranks[rank][step][0])
            assert torch.equal(targets[rank::2], ranks[rank][step][1])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_evaluate_every_image_once(world_size: int) -> None:
    found = [
        seen(
            create_loader(
                numbered(20),
                PLAIN,
                is_training=False,
                input_size=(1, 4, 4),
                batch_size=4,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert sorted(i for part in found for i in part) == list(range(20))


def test_repeated_augmentation_shows_a_third_three_times() -> None:
    config = replace(PLAIN, repeats=3, horizontal_flip=0.5)
    loader = create_loader(
        numbered(60), config, is_training=True, input_size=(1, 4, 4), batch_size=6
    )
    counts = Counter(seen(loader))
    assert len(counts) == 20
    assert set(counts.values()) == {3}


def test_repeats_are_augmented_each_in_its_own_way(arrays) -> None:
    for config in (replace(SMALL_IMAGES, repeats=2), DataConfig(repeats=2)):
        loader = create_loader(arrays, config, is_training=True, num_workers=0, **GREY)
        images, targets = next(iter(loader))
        assert torch.equal(targets[0::2], targets[1::2])
        assert not torch.equal(images[0::2], images[1::2])


def damaged(make_folder, on_error: str, split: str = "train"):
    folder = make_folder(
        {"train/a": 6, "train/b": 6, "test/a": 5, "test/b": 5, "val/a": 1, "val/b": 1}
    )
    for name in ("train/a/002.png", "train/b/005.png", "test/a/004.png"):
        (folder / name).write_bytes(b"broken")
    return load_dataset(folder, split, on_error=on_error)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_bad_image_is_named(make_folder, workers: int, is_training: bool) -> None:
    loader = create_loader(
        damaged(make_folder, "raise"),
        is_training=is_training,
        input_size=(3, 16, 16),
        batch_size=4,
        num_workers=workers,
    )
    with pytest.raises(BadImageError, match=r"train/[ab]/00[25]\.png is not an image") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_in_training_and_counted(make_folder, workers: int) -> None:
    loader = create_loader(
        damaged(make_folder, "skip"),
        is_training=True,
        input_size=(3, 16, 16),
        batch_size=4,
        num_workers=workers,
    )
    for epoch in range(2):
        assert [len(targets) for _, targets in batches(loader, epoch)] == [4, 4, 4]
    assert sorted(loader.skipped) == ["a/002.png", "b/005.png"]
    assert "a/002.png is not an image" in loader.skipped["a/002.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_of_evaluation_and_counted(make_folder, workers: int) -> None:
    dataset = damaged(make_folder, "skip", "test")
    loader = create_loader(
        dataset, is_training=False, input_size=(3, 16, 16), batch_size=5, num_workers=workers
    )
    found = batches(loader)
    assert [targets.tolist() for _, targets in found] == [[0] * 4, [1] * 5]
    assert list(loader.skipped) == ["a/004.png"]


def test_a_folder_of_bad_images_only_is_an_error(make_folder) -> None:
    folder = make_folder({"a": 6, "b": 6})
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    for is_training in (True, False):
        loader = create_loader(
            load_dataset(folder, on_error="skip"),
            is_training=is_training,
            input_size=(3, 16, 16),
            batch_size=2,
            num_workers=0,
        )
        with pytest.raises(InputError, match=r"not one image of .* is readable"):
            list(loader)


def test_colour_and_grey_follow_the_model(make_folder, arrays) -> None:
    options = {"is_training": False, "batch_size": 4, "num_workers": 0}
    dataset = load_dataset(make_folder({"a": 6, "b": 6}))
    loader = create_loader(dataset, input_size=(1, 16, 16), **options)
    images, _ = next(iter(loader))
    assert images.shape == (4, 1, 16, 16)
    assert len(loader.mean) == 1
    images, _ = next(iter(create_loader(arrays, input_size=(3, 32, 40), **options)))
    assert images.shape == (4, 3, 32, 40)
    assert torch.equal(images[:, 0], images[:, 2])


def test_default_normalisation_is_the_data_sets() -> None:
    dataset = load_dataset("fashion-mnist-small", "train")
    loader = create_loader(
        dataset, PLAIN, is_training=False, input_size=(1, 28, 28), batch_size=500
    )
    images = torch.cat([images for images, _ in loader])
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 61}, "batch_size 61 is more than the 60 training images: make it at most"),
        ({"batch_size": 40, "world_size": 2}, "batch_size 40 on 2 ranks is more than the 60"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"input_size": (4, 28, 28)}, r"input_size must be \(C, H, W\) with 1 or 3 channels"),
        ({"input_size": (28, 28)}, r"input_size must be \(C, H, W\)"),
        ({"mean": (0.1, 0.2)}, "one number for each of the 1 channels"),
        ({"std": (0.0,)}, "std above 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1; got 2"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0; got -1"),
    ],
)
def test_sizes_that_do_not_fit(arrays, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_loader(arrays, SMALL_IMAGES, is_training=True, **{**GREY, **options})


def test_epochs_that_do_not_exist(arrays) -> None:
    loader = create_loader(arrays, SMALL_IMAGES, is_training=True, **GREY)
    with pytest.raises(InputError, match="first_batch from 0 to 7; got 0 and 8"):
        loader.set_epoch(0, 8)
    with pytest.raises(InputError, match="epoch must be at least 0"):
        loader.set_epoch(-1)


def test_arrays_that_are_not_images() -> None:
    with pytest.raises(InputError, match=r"must be uint8 .* got float32 of shape \(2, 4, 4\)"):
        replace(numbered(2), images=np.zeros((2, 4, 4), np.float32))
    with pytest.raises(InputError, match="2 images but 3 targets"):
        replace(numbered(2), targets=[0, 0, 0])


def test_items_of_an_array_are_pictures(arrays) -> None:
    image, target = arrays[5]
    assert isinstance(image, Image.Image)
    assert (np.asarray(image) == arrays.images[5]).all()
    assert target == 2


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux's signals")
def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_main_process(make_folder) -> None:
    dataset = load_dataset(make_folder({"a": 20, "b": 20}))
    loader = create_loader(
        dataset, is_training=True, input_size=(3, 16, 16), batch_size=2, num_workers=2
    )
    iterator, found = iter(loader), []
    found.append(next(iterator))
    workers = [process.pid for process in loader._source._iterator._workers]
    kill = "import os, signal, sys; [os.kill(int(p), signal.SIGTERM) for p in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", kill, *map(str, workers)], check=True)
    time.sleep(0.2)
    found += list(iterator)
    assert len(found) == len(loader)
    processes = loader._source._iterator._workers
    processes[0].terminate()  # as the main process does
    processes[0].join(timeout=10)
    assert processes[0].exitcode == 0
