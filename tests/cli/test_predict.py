"""`v2m predict` and `v2m.predict`: the numbers of a direct forward pass, and errors that help."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import v2m
from v2m.cli.main import main
from v2m.errors import InputError
from v2m.models import save_model
from v2m.ops.backend import use_backend
from v2m.predict import Predictor, find_images, predict

NAMES = ["cat", "dog", "[bold]owl[/]"]


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A grey model on a grid that is not square, with class names."""
    torch.manual_seed(0)
    model = v2m.create_model(
        "v2m_nano_patch4_28", embed_dim=16, depth=1, d_state=4, img_size=(12, 20), num_classes=3
    )
    with torch.no_grad():
        model.head.weight.mul_(50)
    return save_model(model, tmp_path_factory.mktemp("run"), label_names=NAMES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of several sizes and modes, in a folder and one below it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    random = np.random.default_rng(0)
    for index, (mode, size) in enumerate([("L", (20, 12)), ("RGB", (31, 45)), ("RGBA", (64, 20))]):
        channels = len(mode) if mode != "L" else 0
        shape = (*size[::-1], channels) if channels else size[::-1]
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("below" if index == 2 else ".") / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def expected(run, path):
    """Probabilities of a plain forward pass with timm's own preprocessing."""
    model = v2m.from_checkpoint(run)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(transform(Image.open(path).convert("L"))[None]).softmax(-1)[0].tolist()


def test_same_numbers_as_a_direct_forward(run, photos):
    predictions = predict(run, photos, top=3, batch_size=2, device="cpu")
    assert [p.path.name for p in predictions] == ["0.png", "1.png", "2.png"]
    for prediction in predictions[:2]:
        direct = expected(run, prediction.path)
        for index, label, value in zip(
            prediction.classes, prediction.labels, prediction.probabilities
        ):
            assert label == NAMES[index]
            assert value == pytest.approx(direct[index], abs=1e-6)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
        assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-12)
    assert predictions[0].probabilities != predictions[1].probabilities


def test_batch_size_changes_nothing(run, photos):
    one, many = (predict(run, photos, batch_size=size, device="cpu") for size in (1, 32))
    for a, b in zip(one, many):
        assert a.classes == b.classes
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_top_is_clipped_to_the_classes(run, photos):
    assert [len(p.classes) for p in predict(run, photos, top=99, device="cpu")] == [3, 3, 3]


def test_table_of_one_image(run, photos, capsys):
    assert main(["predict", str(run), str(photos / "0.png"), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)  # the markup in a class name is not obeyed
    assert text.count(" %") == 3


def test_table_of_a_folder(run, photos, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["predict", str(run), str(photos), "--top", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.count(" %") == 2 for line in lines[1:])


def test_csv_and_json_say_the_same(run, photos, tmp_path, capsys):
    output = tmp_path / "new" / "answers.csv"
    command = ["predict", str(run), str(photos), "--device", "cpu"]
    assert main([*command, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert main([*command, "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert [float(row["probability"]) for row in rows] == [
        guess["probability"] for record in records for guess in record["predictions"]
    ]
    assert [row["label"] for row in rows[:3]] == [g["label"] for g in records[0]["predictions"]]
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]


def test_a_folder_is_no_output(run, photos, tmp_path, capsys):
    command = ["predict", str(run), str(photos), "--device", "cpu", "--output", str(tmp_path)]
    assert main(command) == 2
    assert "is a folder: name a file in it" in " ".join(capsys.readouterr().err.split())


def test_corrupt_image_is_named(run, photos, tmp_path, capsys):
    good = (photos / "1.png").read_bytes()
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "half.png").write_bytes(good[: len(good) // 2])
    command = ["predict", str(run), str(tmp_path), "--device", "cpu", "--format", "json"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "half.png cannot be read as an image" in captured.err
    assert "Remove it, or pass --skip-bad" in captured.err
    assert captured.out == ""
    assert main([*command, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "1 of 2 images could not be read" in captured.err
    assert "half.png" in captured.err
    assert [record["path"] for record in json.loads(captured.out)] == [str(tmp_path / "good.png")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "PHOTOS"], "no model at nowhere"),
        (["PHOTOS", "PHOTOS"], "has no config.json"),
        (["RUN", "nowhere"], "no image or folder at nowhere"),
        (["RUN", "EMPTY"], "no image in"),
        (["RUN", "PHOTOS", "--top", "0"], "`top` must be at least 1; got 0"),
        (["RUN", "PHOTOS", "--batch-size", "-1"], "`batch_size` must be at least 1; got -1"),
        (["RUN", "PHOTOS", "--device", "gpu"], "cannot use device 'gpu': expected cpu, cuda, "),
        (["RUN", "PHOTOS", "--score", "0.5"], "--score is for detectors and segmenters"),
        (["RUN", "NOTES"], "is not an image of a known format"),
    ],
)
def test_bad_input(words, message, run, photos, tmp_path, capsys):
    places = {"RUN": run, "PHOTOS": photos, "EMPTY": tmp_path, "NOTES": photos / "notes.txt"}
    assert main(["predict", *(str(places.get(word, word)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_output_that_cannot_be_written(run, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "answers.csv")
    command = ["predict", str(run), str(photos), "--device", "cpu", "--output", output]
    assert main(command) == 2
    assert f"cannot write {output}" in capsys.readouterr().err


def test_weights_that_are_not_finite(photos, tmp_path):
    model = v2m.create_model("v2m_nano_patch4_28", embed_dim=16, depth=1, d_state=4, img_size=12)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"model's output for .*0\.png is not finite"):
        list(Predictor(model, device="cpu").predict([photos / "0.png"]))


def test_any_timm_model(photos, tmp_path):
    """A colour model of timm's own in its Hub schema, without class names."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=64).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    (prediction,) = predict(tmp_path, photos / "1.png", top=2, device="cpu")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        direct = model(transform(Image.open(photos / "1.png"))[None]).softmax(-1)[0]
    assert prediction.probabilities == pytest.approx(direct.topk(2).values.tolist(), abs=1e-6)
    assert prediction.labels == tuple(f"class {index}" for index in direct.topk(2).indices.tolist())


def test_find_images_sees_folders_below_and_any_case(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.JPG", "a/x.Png", "a/b/y.webp", "a/readme.md"):
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a/b/y.webp", "a/x.Png", "z.JPG"]


def test_a_link_to_nothing_is_named(run, photos, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes((photos / "0.png").read_bytes())
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    command = ["predict", str(run), str(tmp_path), "--device", "cpu", "--format", "csv"]
    assert main(command) == 2
    assert "b.png cannot be read as an image" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "1 of 2 images could not be read" in capsys.readouterr().err
