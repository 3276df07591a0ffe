"""Augmentations keep boxes, masks and classes on what they belong to; loaders repeat themselves."""

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from shapes import write_classes, write_coco
from v2m.data.ade20k import IGNORED, load_segmentation
from v2m.data.dense_loaders import create_dense_loader
from v2m.data.dense_transforms import (
    detection_evaluation,
    detection_training,
    segmentation_evaluation,
    segmentation_training,
)
from v2m.data.detection import load_detection
from v2m.errors import InputError

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def reddish(image: torch.Tensor) -> torch.Tensor:
    """Where the discs are: their colour is (200, 40, 40), nothing else comes near."""
    return (image[0] > 0.6) & (image[1] < 0.35)


@pytest.mark.parametrize("flips", [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_boxes_and_masks_stay_on_their_objects(tmp_path, flips):
    dataset = load_detection(write_coco(tmp_path, 6))
    transform = detection_training([96, 160], 160, horizontal_flip=flips[0], vertical_flip=flips[1])
    sizes = set()
    for index in range(len(dataset)):
        image, target = transform(*dataset[index])
        sizes.add(tuple(image.shape[1:]))
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        found = reddish(image)
        discs = target["masks"][target["labels"] == 0].bool().any(0)
        agree = (found & discs).sum() / (found | discs).sum().clamp_min(1)
        assert agree > 0.9 or not discs.any()
        for box, mask in zip(target["boxes"], target["masks"].bool()):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.allclose(box, torch.tensor(edges).float(), atol=2.0)
    assert sizes <= {(96, 96), (160, 160)}


def test_longer_side_is_bounded(tmp_path):
    dataset = load_detection(write_coco(tmp_path, 1))
    image, target = dataset[0]
    wide = image.resize((128, 64))
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(64, 128))
    target = {"boxes": boxes, "labels": target["labels"][:0]}
    resized, _ = detection_training([800], 1333, horizontal_flip=0.5)(wide, target)
    assert resized.shape == (3, 666, 1333)


def test_evaluation_changes_nothing(tmp_path):
    dataset = load_detection(write_coco(tmp_path, 1))
    image, target = detection_evaluation()(*dataset[0])
    assert image.shape == (3, 64, 64)
    assert torch.equal(target["boxes"], dataset[0][1]["boxes"].as_subclass(torch.Tensor))


def training(size=(48, 48), ratio=(0.5, 2.0), **changes):
    keywords = {"largest_class": 0.75, "horizontal_flip": 0.5, "distortion": 0.0, **IDENTITY}
    return segmentation_training(size, ratio=ratio, **{**keywords, **changes})


def test_classes_stay_on_their_pixels(tmp_path):
    dataset = load_segmentation(write_classes(tmp_path, 6))
    transform, padded = training(), 0
    for draw in range(4):
        for index in range(len(dataset)):
            torch.manual_seed(10 * draw + index)
            image, classes = transform(*dataset[index])
            assert image.shape == (3, 48, 48)
            assert classes.shape == (48, 48)
            assert set(classes.unique().tolist()) <= {0, 1, 2, IGNORED}
            padded += bool((classes == IGNORED).any())
            found, discs = reddish(image), classes == 1
            assert (found ^ discs).sum() <= 0.2 * discs.sum() + 12
    assert 0 < padded < 24  # ratios below 1 leave room, those above do not


def test_no_class_fills_a_crop_if_it_can_be_helped(tmp_path):
    dataset = load_segmentation(write_classes(tmp_path, 4))
    shares = {}
    for largest in (0.75, 1.0):
        transform, shares[largest] = training((16, 16), (4.0, 4.0), largest_class=largest), []
        for draw in range(40):
            torch.manual_seed(draw)
            _, classes = transform(*dataset[draw % 4])
            shares[largest].append((classes == 0).float().mean().item())
    within = {k: sum(s <= 0.75 for s in v) for k, v in shares.items()}
    assert within[0.75] > within[1.0] + 10


def test_distortion_and_normalisation(tmp_path):
    dataset = load_segmentation(write_classes(tmp_path, 1))
    image, classes = segmentation_evaluation((0.5,) * 3, (0.25,) * 3)(*dataset[0])
    plain, _ = segmentation_evaluation(**IDENTITY)(*dataset[0])
    assert torch.allclose(image, (plain - 0.5) / 0.25)
    assert classes.dtype == torch.int64
    transform = training((64, 64), (1.0, 1.0), distortion=1.0, horizontal_flip=0.0)
    assert not torch.equal(transform(*dataset[0])[0], plain)


def test_distortion_of_detection_keeps_red_red(tmp_path):
    """Colours change, channels are not exchanged, boxes and masks are left alone."""
    dataset = load_detection(write_coco(tmp_path, 1))
    image, target = dataset[0]
    plain = Image.new("RGB", image.size, (180, 60, 60))
    transform = detection_training([64], 64, horizontal_flip=0.0, distortion=1.0)
    colours = set()
    for _ in range(20):
        changed, after = transform(plain, target)
        red, green, blue = changed[:, 0, 0].tolist()
        assert red > max(green, blue)
        colours.add((red, green, blue))
        assert torch.equal(after["boxes"], target["boxes"].as_subclass(torch.Tensor))
        assert torch.equal(after["masks"], target["masks"].as_subclass(torch.Tensor))
    assert len(colours) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_repeats_itself_and_goes_on(tmp_path, workers):
    dataset = load_detection(write_coco(tmp_path, 6))
    transform = detection_training([64, 96], 128, horizontal_flip=0.5)

    def loader(count: int):
        return create_dense_loader(
            dataset, transform, is_training=True, batch_size=2, seed=3, num_workers=count
        )

    reference, other = loader(0), loader(workers)
    reference.set_epoch(1)
    expected = list(reference)
    assert len(expected) == len(reference) == 3
    other.set_epoch(1, first_batch=1)
    for (images, targets), (again, others) in zip(expected[1:], other):
        assert all(torch.equal(a, b) for a, b in zip(images, again))
        for a, b in zip(targets, others):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_evaluation_loader_says_which_image_it_is(tmp_path):
    dataset = load_segmentation(write_classes(tmp_path, 3))
    transform = segmentation_evaluation(**IDENTITY)
    for rank in range(2):
        loader = create_dense_loader(
            dataset, transform, is_training=False, batch_size=2, rank=rank, world_size=2,
            num_workers=0,
        )  # fmt: skip
        found = [index for _, targets in loader for index, _ in targets]
        assert found == list(range(rank, 3, 2))


@pytest.mark.parametrize("is_training", [True, False])
def test_unusable_images_are_errors_or_counted(tmp_path, is_training):
    root = write_classes(tmp_path, 4)
    (root / "annotations/training/002.png").write_bytes(b"nothing")
    transform = training() if is_training else segmentation_evaluation(**IDENTITY)

    def loader(on_error: str):
        dataset = load_segmentation(root, on_error=on_error)
        return create_dense_loader(
            dataset, transform, is_training=is_training, batch_size=2, num_workers=0,
            stacked=is_training,
        )  # fmt: skip

    with pytest.raises(InputError, match=r"002.png cannot be read as a map of classes"):
        list(loader("raise"))
    skipping = loader("skip")
    counts = [len(images) for images, _ in skipping]
    assert counts == ([2, 2] if is_training else [2, 1])
    assert list(skipping.skipped) == ["images/training/002.png"]
