"""The report of a run: all of it in one file, and honest about what is not there."""

import base64
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import v2m
from pages import Page
from v2m.cli.main import main
from v2m.data import ArrayDataset, load_dataset
from v2m.engine.config import DatasetConfig, TrainConfig, to_dict
from v2m.engine.rundir import CONFIG, METRICS, PREDICTIONS
from v2m.errors import InputError
from v2m.models import create_model, save_model
from v2m.ops.backend import use_backend
from v2m.visualize import write_report
from v2m.visualize.fields import _compare, token_grid
from v2m.visualize.results import Results, wilson_interval

NAMES = [*(f"thing {index}" for index in range(9)), "<b>&co"]
COUNT = 80


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


def write_run(folder, *, classes=10, img_size=28, names=NAMES):
    """What training leaves behind, in small."""
    torch.manual_seed(0)
    model = v2m.create_model(
        "v2m_nano_patch4_28",
        embed_dim=16,
        depth=2,
        d_state=4,
        num_classes=classes,
        img_size=img_size,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(model, folder, label_names=names)
    config = TrainConfig(data=DatasetConfig(name="fashion-mnist-small"))
    (folder / CONFIG).write_text(json.dumps(to_dict(config)))
    random = np.random.default_rng(0)
    targets = np.array(load_dataset("fashion-mnist-small", "test").targets[:COUNT])
    probabilities = random.dirichlet(np.full(classes, 0.3), COUNT).astype(np.float32)
    probabilities[np.arange(COUNT), targets] += 0.5
    probabilities /= probabilities.sum(1, keepdims=True)
    np.savez(folder / PREDICTIONS, probabilities=probabilities, targets=targets)
    epoch = {"train_loss": 1.0, "train_accuracy": 0.6, "validation_loss": 1.1, "lr": 1e-3}
    records = [
        {"kind": "epoch", "epoch": n, **epoch, "validation_top1": 0.5 + n / 10, "seconds": 65.0}
        for n in (1, 2, 3)
    ]
    machine = {"Python": "3.11.0", "processor": "abacus, 1 core", "accelerator": "none"}
    records.append({"kind": "test", "shuffled_top1": 0.25, "machine": machine})
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run):
    with use_backend("eager"):
        return write_report(run, field_images=2, device="cpu").read_text(encoding="utf-8")


def test_every_section_and_nothing_from_outside(text):
    page = Page(text)
    for section in ("accuracy", "curves", "confusion", "examples", "fields", "use", "run"):
        assert section in page.ids
        assert f"#{section}" in page.sources  # in the table of contents
    assert "missing" not in page.ids
    assert len(page.ids) == len(set(page.ids))
    assert all(source[0] == "#" or source.startswith("data:image/") for source in page.sources)
    assert all(source[1:] in page.ids for source in page.sources if source[0] == "#")
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_pictures_can_be_decoded(text):
    pictures = re.findall(r"data:image/(png|jpeg);base64,([^\"]+)\"", text)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for _, data in pictures]
    assert sizes.count((28, 28)) >= 10 + 4  # right and wrong examples, and the four fields
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        ElementTree.fromstring(figure.replace("xlink:", ""))


def test_figures_are_those_of_the_predictions(run, text):
    with np.load(run / PREDICTIONS) as arrays:
        probabilities, targets = arrays["probabilities"], arrays["targets"]
    right = int((probabilities.argmax(1) == targets).sum())
    page = Page(text).text.replace("\xa0", " ")
    assert f"{100 * right / COUNT:.1f} %" in page
    low, high = wilson_interval(right, COUNT)
    assert f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in page
    assert "it gets 25.0 % right instead of" in page
    assert f"Of {COUNT - right} mistakes the most frequent" in page
    assert "3 epochs in 3 min 15 s; 80.0 % of the validation images at the end" in page
    assert "on augmented images" in page
    assert "abacus, 1 core" in page
    assert "optim.lr" in page


def test_names_are_escaped(text):
    assert "<b>&co" not in text
    assert "&lt;b&gt;&amp;co" in text


def test_fields_tell_the_scans_apart(text):
    page = Page(text).text
    assert "trained with “corners”" in page
    assert page.count("release") >= 3
    assert "that costs the lower right quarter most" in page


def test_fields_that_differ_little_are_not_told_apart():
    corners = np.ones((28, 28))
    deaf = corners.copy()
    deaf[16:, 16:] = 0
    found = [
        _compare({"corners": corners, "release": release}, (7, 7)) for release in (corners, deaf)
    ]
    assert "changes little" in found[0]
    assert "deaf to the lower right quarter" in found[1]


def test_missing_pieces_are_said(tmp_path):
    write_run(tmp_path)
    for name in (METRICS, PREDICTIONS, CONFIG):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path, field_images=2, device="cpu").read_text(encoding="utf-8"))
    assert {"fields", "use", "run", "missing"} <= set(page.ids)
    assert not {"accuracy", "curves", "confusion", "examples"} & set(page.ids)
    assert "the folder has no train_config.json" in page.text
    assert "the folder has no record of the epochs" in page.text
    assert f"the folder has no {PREDICTIONS}" in page.text
    assert "images of noise" in page.text


def test_grid_that_is_not_square_has_no_release(tmp_path):
    run = write_run(tmp_path, img_size=(12, 28))
    page = Page(write_report(run, field_images=2, device="cpu").read_text(encoding="utf-8"))
    assert "this model's is 3 x 7" in page.text
    assert "fields" in page.ids


@pytest.mark.parametrize("size", [(28, 28), (30, 52), (32, 64)])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("v2m_hier_small_224", {"dims": [8, 8], "depths": [1, 1]}),
        ("v2m_nano_patch4_28", {"dynamic_img_pad": True}),
    ],
)
def test_the_grid_is_the_models_own(name, kwargs, size):
    model = create_model(name, in_chans=1, **kwargs)
    images = torch.randn(1, 1, *size)
    (features,) = model.forward_intermediates(
        images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
    )
    assert token_grid(model, images) == features.shape[-2:]


def test_many_classes_show_those_with_most_mistakes(tmp_path):
    run = write_run(tmp_path, classes=25, names=None)
    text = write_report(run, field_images=2, device="cpu").read_text(encoding="utf-8")
    assert "Shown are the 20 of 25 classes with most mistakes" in text
    assert len(re.findall(r'<td class="(?:hit|miss)', text)) == 20 * 20
    assert "class 3" in text


def test_another_data_set_and_place(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 300, 200, 3), dtype=np.uint8)
    targets = load_dataset("fashion-mnist-small", "test").targets[:COUNT]
    dataset = ArrayDataset(
        name="noise", images=pixels, targets=targets, classes=NAMES, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    output = tmp_path / "new" / "page.html"
    assert write_report(run, output=output, dataset=dataset, field_images=2, examples=2) == output
    text = output.read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)\"", text)
    assert len(pictures) == 4
    for data in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (149, 224)


def test_images_in_another_order_are_not_shown(run, tmp_path):
    dataset = load_dataset("fashion-mnist-small", "test")
    backwards = dataset.subset(range(len(dataset) - 1, -1, -1))
    output = write_report(run, output=tmp_path / "page.html", dataset=backwards, field_images=2)
    page = Page(output.read_text(encoding="utf-8"))
    assert "examples" not in page.ids
    assert "cannot be put side by side" in page.text


def test_command(run, tmp_path, capsys):
    output = tmp_path / "page.html"
    command = ["report", str(run), "--output", str(output), "--device", "cpu"]
    assert main([*command, "--field-images", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert output.stat().st_size > 10_000
    assert main([*command, "--field-images", "0"]) == 2
    assert "`field_images` must be at least 1; got 0" in capsys.readouterr().err


def test_what_cannot_be_used(run, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report to"):
        write_report(run, output=tmp_path / "file" / "page.html", field_images=2)
    broken = write_run(tmp_path / "broken")
    (broken / PREDICTIONS).write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match=rf"{PREDICTIONS} cannot be read"):
        write_report(broken)


def test_results_by_hand():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    results = Results(probabilities=probabilities, targets=np.array([0, 2, 2, 1]))
    assert results.answers.tolist() == [0, 1, 2, 0]
    assert results.accuracy() == 0.5
    assert results.accuracy(2) == 1.0
    assert results.confusion().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert results.surest_mistakes(5) == [1, 3]
    assert results.first_right(5) == [0, 2]
    assert results.confidence() == pytest.approx(0.55)


def test_wilson_interval_of_a_textbook_case():
    """81 of 263, 95 %: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    low, high = wilson_interval(81, 263)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
