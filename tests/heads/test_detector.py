"""Faster R-CNN and Mask R-CNN: losses, boxes in the image's own pixels, files."""

import copy

import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

from helpers import relative_error
from v2m.errors import InputError
from v2m.heads import Detector, DetectorConfig, from_directory
from v2m.models import save_model

SMALL = {
    "num_classes": 2,
    "min_size": 64,
    "max_size": 128,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "pyramid_channels": 16,
    "box_channels": 32,
    "mask_channels": 8,
}


def detector(model: tuple[str, dict], **changes) -> Detector:
    name, keywords = model
    config = DetectorConfig(backbone=name, backbone_kwargs=keywords, **{**SMALL, **changes})
    return Detector(config)


def targets(masks: bool) -> list[dict[str, torch.Tensor]]:
    first = {"boxes": torch.tensor([[8.0, 8, 40, 30]]), "labels": torch.tensor([1])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    if masks:
        first["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        first["masks"][0, 8:30, 8:40] = 1
        empty["masks"] = torch.zeros(0, 64, 80, dtype=torch.uint8)
    return [first, empty]


@pytest.mark.parametrize("masks", [True, False])
def test_losses_reach_every_parameter(family, masks):
    model = detector(family, masks=masks).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    losses = model(images, targets(masks))
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert set(losses) == names | ({"loss_mask"} if masks else set())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
    assert model.pretrained_cfg["architecture"] == ("mask_rcnn" if masks else "faster_rcnn")


def test_results_are_in_the_pixels_of_the_image(hierarchical):
    model = detector(hierarchical, score_threshold=0.0).eval()
    image = torch.rand(3, 50, 90)
    with torch.no_grad():
        (found,) = model([image])
    assert found["masks"].shape[1:] == (1, 50, 90)
    assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) > 0
    assert (found["boxes"][:, 2::2] <= 90).all()
    assert (found["boxes"][:, 3::2] <= 50).all()
    assert set(found["labels"].tolist()) <= {0, 1}
    assert (found["scores"].diff() <= 0).all()


def test_the_backbone_is_told_where_each_image_ends(hierarchical):
    model = detector(hierarchical).eval()
    seen = []
    model.body.register_forward_hook(lambda _module, _inputs, maps: seen.append(maps))
    images = [torch.rand(3, 64, 128), torch.rand(3, 128, 64)]
    with torch.no_grad():
        model(images)
        for index, image in enumerate(images):
            model([image])
            for x, y in zip(seen[0], seen[-1]):
                h, w = y.shape[2:]
                assert x.shape[2:] != y.shape[2:]
                assert relative_error(x[index, :, :h, :w], y[0]) <= 1e-5


@pytest.mark.parametrize("masks", [True, False])
def test_saved_and_read_back(plain, tmp_path, masks):
    model = detector(plain, masks=masks, mean=(0.4, 0.5, 0.6)).eval()
    save_model(model, tmp_path, label_names=["cat", "dog"], v2m={"task": "detect"})
    again = from_directory(tmp_path)
    assert again.config == model.config
    assert again.pretrained_cfg["label_names"] == ["cat", "dog"]
    image = torch.rand(3, 60, 70)
    with torch.no_grad():
        for key, value in model([image])[0].items():
            assert torch.equal(value, again([image])[0][key]), key


def test_weight_decay_leaves_the_scans_alone(plain):
    model = detector(plain)
    exempt = model.no_weight_decay()
    assert "network.backbone.body.model.pos_embed" in exempt
    assert any(name.endswith("A_log") for name in exempt)
    assert exempt <= {name for name, _ in model.named_parameters()}


def test_a_copy_works_by_itself(hierarchical):
    model = detector(hierarchical, score_threshold=0.0).eval()
    twin = copy.deepcopy(model)
    images = [torch.rand(3, 64, 128), torch.rand(3, 128, 64)]
    with torch.no_grad():
        for a, b in zip(model(images), twin(images)):
            assert torch.equal(a["boxes"], b["boxes"])


def test_errors(hierarchical, tmp_path):
    with pytest.raises(InputError, match="one size for each of 5 levels"):
        detector(hierarchical, anchor_sizes=(8, 16))
    with pytest.raises(InputError, match="`min_size` must be a whole number of at least 1"):
        detector(hierarchical, min_size=0)
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnet18", "model_args": {}, "pretrained_cfg": {}}'
    )
    with pytest.raises(InputError, match="holds a resnet18, no detector or segmenter"):
        from_directory(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"architecture": "mask_rcnn", "model_args": {"backbon": 1}, "pretrained_cfg": {}}'
    )
    with pytest.raises(InputError, match="Did you mean 'backbone'"):
        from_directory(tmp_path)


@pytest.mark.parametrize("shape", [(3, 1, 300), (3, 300, 2)], ids=str)
def test_an_image_that_would_vanish_is_refused(hierarchical, shape):
    model = detector(hierarchical).eval()
    with pytest.raises(InputError, match=r"less than a pixel.*`max_size` 128"):
        model([torch.rand(shape)])
    with torch.no_grad():
        assert len(model([torch.rand(3, 4, 400)])) == 1  # one pixel is left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "key 'architecture' must be a str"),
        ("{", "is not valid JSON"),
        ('{"architecture": "upernet", "model_args": {}}', "key 'pretrained_cfg' must be a dict"),
        (
            '{"architecture": "upernet", "model_args": {"num_classes": 2}, "pretrained_cfg": {},'
            ' "label_names": ["a"]}',
            "one name for each class",
        ),
        (
            '{"architecture": "upernet", "model_args": {"num_classes": 2}, "pretrained_cfg": {}}',
            "missing",
        ),
        (
            '{"architecture": "upernet", "pretrained_cfg": {}, "model_args": {"num_classes": 2,'
            ' "backbone": "hf-hub:someone/model"}}',
            "the backbone: unknown model 'hf-hub:someone/model'",
        ),
        (
            '{"architecture": "upernet", "pretrained_cfg": {}, "model_args": {"num_classes": 2,'
            ' "backbone": "resnet18", "backbone_kwargs": {"pretrained": true}}}',
            "must describe the model alone; got the key 'pretrained'",
        ),
    ],
)
def test_damaged_descriptions(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        from_directory(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        from_directory(tmp_path / "nowhere")


def test_with_a_resnet_it_is_torchvisions_own_model():
    """The baseline of the benchmarks: the same tensors, and the same answers with them."""
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=64
    ).eval()
    config = DetectorConfig(backbone="resnet50", num_classes=2, min_size=32, max_size=64)
    with torch.device("meta"):
        ours = Detector(config).eval()
    state = {
        f"network.{name}".replace("body.", "body.model.").replace(".fpn.", ".neck."): value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(state, assign=True)
    images = [torch.rand(3, 32, 40)]
    with torch.no_grad():
        for ours_found, theirs_found in zip(ours(images), theirs(images)):
            assert len(theirs_found["boxes"]) > 0
            assert torch.equal(ours_found["labels"], theirs_found["labels"] - 1)
            for key in ("boxes", "scores", "masks"):
                assert torch.allclose(ours_found[key], theirs_found[key], atol=1e-4), key


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_are_computed_in_full_precision_under_autocast(hierarchical, masks):
    """In bfloat16 a coordinate of 400 would be a multiple of 2."""
    model = detector(hierarchical, masks=masks, min_size=448, max_size=480)
    seen = {}

    def anchors(_module, _inputs, output):
        seen["anchors"] = output[0]

    def regions(_module, inputs):
        seen["regions"] = inputs[1][0]

    model.network.rpn.anchor_generator.register_forward_hook(anchors)
    model.network.roi_heads.box_roi_pool.register_forward_pre_hook(regions)
    box = torch.tensor([[401.0, 301.0, 447.0, 361.0]])
    target = {"boxes": box, "labels": torch.tensor([1])}
    if masks:
        target["masks"] = torch.zeros(1, 448, 480, dtype=torch.uint8)
        target["masks"][0, 301:361, 401:447] = 1
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 448, 480)], [target])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    low = dict(seen)
    model([torch.rand(3, 448, 480)], [target])
    assert torch.equal(low["anchors"], seen["anchors"])
    assert (low["regions"] == box).all(1).any()  # the annotated box itself, among the regions
    assert (low["regions"] != low["regions"].bfloat16().float()).any()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 448, 480)])
    assert all(found[k].dtype == torch.float32 for k in found if k != "labels")
    assert (found["boxes"] != found["boxes"].bfloat16().float()).any()
