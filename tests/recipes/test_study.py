"""The study of docs/results.md: its models, its training loop, its table of runs."""

from __future__ import annotations

import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data import create_transform
from torch import nn

from v2m.data import SMALL_IMAGES, create_loader, load_dataset
from v2m.engine.config import MixConfig, ModelConfig, TrainConfig
from v2m.engine.distributed import Ranks
from v2m.engine.loop import optimiser_step
from v2m.engine.optim import undecayed_parameters
from v2m.engine.session import build_session
from v2m.errors import InputError, NonFiniteLossError
from v2m.evaluation import evaluate_classifier
from v2m.recipes import fashion_mnist, study_small
from v2m.recipes.study import BEST, VARIANTS, Variant, build_variant, shallow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import study
import study_plot
import study_runs
import study_train

CPU = torch.device("cpu")
TINY = Variant(title="tiny", keywords={"embed_dim": 8, "depth": 2, "d_state": 2, "patch_size": 14})
PLAIN = replace(SMALL_IMAGES, crop_padding=0, horizontal_flip=0.0, random_erasing=0.0)


def tiny_recipe(**sections) -> TrainConfig:
    config = study_small()
    short = {
        "data": replace(config.data, batch_size=50),
        "schedule": replace(config.schedule, epochs=2, warmup_epochs=0.5),
        "run": replace(config.run, limit_batches=3),
    }
    return replace(config, **{**short, **sections})


# The models ---------------------------------------------------------------------------------------


def parameters(variant: Variant) -> int:
    return sum(p.numel() for p in build_variant(variant).parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_classify_and_have_equal_sizes(name):
    variant = VARIANTS[name]
    model = build_variant(variant)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    if variant.sized:
        assert parameters(variant) == pytest.approx(parameters(VARIANTS["corners"]), rel=0.033)


def test_shallow_variants_have_equal_sizes_too():
    sizes = [parameters(shallow(variant)) for variant in VARIANTS.values() if variant.sized]
    assert sizes == pytest.approx([sizes[0]] * len(sizes), rel=0.033)
    assert sizes[0] < 0.6 * parameters(VARIANTS["corners"])


def test_variants_of_one_scan_have_the_same_weights():
    """With the same seed they start from the very same weights: only the geometry differs."""
    states = []
    for name in ("corners", "release", "release_aligned", "corner"):
        torch.manual_seed(1)
        states.append(build_variant(VARIANTS[name]).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_cross_scan_replaces_every_mixer_and_keeps_the_rule_of_its_last_layer():
    torch.manual_seed(0)
    model = build_variant(VARIANTS["cross_scan"])
    mixers = [block.mixer for block in model.layers]
    assert {type(mixer).__name__ for mixer in mixers} == {"CrossScan2d"}
    assert mixers[0].d_state == model.config.d_state
    expected = 0.02 / len(mixers) ** 0.5
    assert mixers[0].out_proj.weight.std().item() == pytest.approx(expected, rel=0.1)
    names = undecayed_parameters(model)
    assert {"layers.0.mixer.A_logs", "layers.0.mixer.Ds"} <= names


def test_resnet_keeps_the_resolution_of_small_images():
    model = build_variant(VARIANTS["resnet18"])
    assert model.forward_features(torch.zeros(1, 1, 28, 28)).shape == (1, 512, 4, 4)


def test_the_best_recipe_is_a_variant():
    config = fashion_mnist()
    found = {**config.model.kwargs, "img_size": config.model.img_size[0]}
    assert any(
        found == variant.keywords and config.model.name == variant.model
        for variant in BEST.values()
    )


# Data and augmentation on the device --------------------------------------------------------------


@pytest.fixture(scope="module")
def part() -> study_train.Images:
    return study_train.load(study_small(), "validation", CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_split_is_that_of_the_library(part):
    expected = load_dataset("fashion-mnist-small", "validation", validation_fraction=0.1, seed=0)
    assert part.targets.tolist() == expected.targets
    assert (part.images[:, 0].numpy() == expected.images).all()
    transform = create_transform((1, 28, 28), mean=expected.mean, std=expected.std, crop_pct=1.0)
    wanted = transform(expected[3][0])
    torch.testing.assert_close(part.normalised(part.images[3]), wanted, rtol=1e-5, atol=1e-5)


def test_without_augmentation_images_are_themselves(part):
    chosen = torch.tensor([5, 0, 3])
    images = study_train.augmented(part, PLAIN, chosen, generator())
    torch.testing.assert_close(images, part.normalised(part.images[chosen]))


def pixel_ids(count: int = 200, side: tuple[int, int] = (5, 7)) -> study_train.Images:
    """Every pixel its own number from 1, no normalisation, so that 0 is padding alone."""
    ids = torch.arange(1, side[0] * side[1] + 1, dtype=torch.uint8).reshape(1, 1, *side)
    return study_train.Images(
        images=ids.repeat(count, 1, 1, 1),
        targets=torch.zeros(count, dtype=torch.int64),
        mean=torch.zeros(1, 1, 1),
        std=torch.full((1, 1, 1), 1 / 255),
        classes=1,
    )


def test_crops_and_flips_move_whole_images():
    ids = pixel_ids()
    config = replace(PLAIN, crop_padding=1, horizontal_flip=0.5)
    images = study_train.augmented(ids, config, torch.arange(200), generator()).round().long()
    original = nn.functional.pad(ids.images[0, 0].long(), (1, 1, 1, 1))
    crops = {
        (top, left, flip): (crop.flip(1) if flip else crop).flatten()
        for top in range(3)
        for left in range(3)
        for flip in (False, True)
        for crop in (original[top : top + 5, left : left + 7],)
    }
    seen = set()
    for image in images[:, 0].flatten(1):
        match = [key for key, crop in crops.items() if torch.equal(crop, image)]
        assert len(match) == 1
        seen.add(match[0])
    assert seen == set(crops)


def test_vertical_flips():
    ids = pixel_ids(count=1)
    config = replace(PLAIN, vertical_flip=1.0)
    image = study_train.augmented(ids, config, torch.zeros(1, dtype=torch.int64), generator())
    assert torch.equal(image.round().to(torch.uint8), ids.images.flip(2))


def test_erasing_is_one_rectangle_of_noise_in_its_share_of_the_images():
    ids = pixel_ids(count=400, side=(15, 17))
    config = replace(PLAIN, random_erasing=0.25)
    images = study_train.augmented(ids, config, torch.arange(400), generator())[:, 0]
    changed = (images - ids.images[:, 0]).abs() > 1e-3
    share = changed.flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.07)
    areas = []
    for mask in changed[changed.flatten(1).any(1)]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        areas.append(box.numel() / mask.numel())
    assert min(areas) < 0.06
    assert 0.25 < max(areas) < 0.4
    noise = images[changed]
    assert abs(noise.mean()) < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.1)


# Training -----------------------------------------------------------------------------------------


def test_a_run_learns_and_its_figures_are_those_of_the_library():
    config = tiny_recipe(run=replace(study_small().run, limit_batches=40))
    figures, curve, model = study_train.run(config, TINY, capture=False, test=True)
    assert [record["epoch"] for record in curve] == [1, 2]
    assert curve[1]["train_loss"] < curve[0]["train_loss"] < 2.4
    assert figures["validation_top1"] == curve[-1]["validation_top1"] > 0.2
    loader = create_loader(
        load_dataset("fashion-mnist-small", "test"),
        SMALL_IMAGES,
        is_training=False,
        input_size=(1, 28, 28),
        batch_size=100,
    )
    assert figures["test_top1"] == pytest.approx(evaluate_classifier(model, loader).top1, abs=1e-9)
    assert figures["parameters"] == parameters(TINY)
    assert not figures["captured"]


def test_its_steps_are_those_of_v2m_train(part):
    """The same batches through the library's own loop: losses and weights agree."""
    config = tiny_recipe(
        model=ModelConfig(name=TINY.model, kwargs=dict(TINY.keywords)),
        run=replace(tiny_recipe().run, device="cpu", limit_batches=4),
    )
    session = build_session(config, Ranks())
    trainer = study_train.prepare(
        config, TINY, study_train.load(config, "train", CPU), CPU, capture=False
    )
    library, own = session.state.model, trainer.model
    session.loop.network.train(), own.train()
    for _, batch in zip(range(8), session.train_loader):
        optimiser_step(session.loop, [batch])
        trainer.feed(*batch)
        trainer.take_step()
    theirs, ours = library.state_dict(), own.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert trainer.step_count == session.state.step == 8
    assert float(trainer.sums[0]) == pytest.approx(session.state.meter.loss, rel=1e-4)


def test_runs_repeat_and_depend_on_their_seed():
    def loss(seed: int) -> float:
        config = tiny_recipe(run=replace(tiny_recipe().run, seed=seed))
        return study_train.run(config, TINY, capture=False, test=False)[0]["train_loss"]

    assert loss(0) == loss(0) != loss(1)


def test_the_test_images_are_read_only_when_asked_for(monkeypatch):
    read = []
    load = study_train.load
    monkeypatch.setattr(
        study_train,
        "load",
        lambda config, split, device: read.append(split) or load(config, split, device),
    )
    figures, _, _ = study_train.run(tiny_recipe(), TINY, capture=False, test=False)
    assert read == ["train", "validation"]
    assert figures["test_top1"] is None


def test_mixed_labels_and_the_average_are_trained_and_evaluated(part):
    config = tiny_recipe(
        mix=MixConfig(mixup=0.2, cutmix=1.0, label_smoothing=0.1),
        ema=replace(tiny_recipe().ema, decay=0.9),
    )
    trainer = study_train.prepare(config, TINY, part, CPU, capture=False)
    record = trainer.epoch(part, generator())
    assert 2.0 < record["train_loss"] < 2.6
    assert trainer.targets.shape == (50, 10)
    assert trainer.evaluated is not trainer.model
    trained, averaged = trainer.model.head.weight, trainer.evaluated.head.weight
    assert 0 < (trained - averaged).abs().max() < 1


def test_the_rate_warms_up_and_falls(part):
    config = tiny_recipe()
    trainer = study_train.prepare(config, TINY, part, CPU, capture=False)
    rates = trainer.rates
    assert len(rates) == 6
    assert rates[0] < 1e-5 < rates[-1] < max(rates) <= config.optim.lr


def test_a_loss_that_is_not_finite_stops_the_run(part):
    trainer = study_train.prepare(tiny_recipe(), TINY, part, CPU, capture=False)
    with torch.no_grad():
        trainer.model.head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="the training loss is nan after 3 steps"):
        trainer.epoch(part, generator())


def test_recipes_that_the_loop_cannot_follow(part):
    config = tiny_recipe(optim=replace(tiny_recipe().optim, accumulation=2))
    with pytest.raises(InputError, match="trains by AdamW, without accumulation"):
        study_train.prepare(config, TINY, part, CPU, capture=False)
    config = tiny_recipe(data=replace(tiny_recipe().data, batch_size=2000))
    with pytest.raises(InputError, match=r"data\.batch_size = 2000 is more than 1000 images"):
        study_train.prepare(config, TINY, part, CPU, capture=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["corners", "full_state", "vim", "cross_scan", "deit", "resnet18"])
def test_captured_steps_are_the_steps(name):
    """Six steps in one graph each against six steps launch by launch, in float32."""
    device = torch.device("cuda")
    losses = []
    for capture in (False, True):
        config = tiny_recipe(run=replace(tiny_recipe().run, precision="float32"))
        part = study_train.load(config, "train", device)
        trainer = study_train.prepare(config, VARIANTS[name], part, device, capture=capture)
        draws = torch.Generator(device).manual_seed(0)
        losses.append([trainer.epoch(part, draws)["train_loss"] for _ in range(2)])
        assert trainer.captured == capture
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# The table of runs --------------------------------------------------------------------------------


@pytest.fixture
def workplace(monkeypatch, tmp_path) -> Path:
    """Two tiny variants, threads for workers, and a count of the runs made in `made`."""
    for module in (study, study_runs):
        monkeypatch.setattr(module, "workers", lambda count: ThreadPoolExecutor(1))
    tiny = {"corners": TINY, "corner": replace(TINY, title="other")}
    for module in (study, study_runs, study_plot):
        monkeypatch.setattr(module, "VARIANTS", tiny)
    return tmp_path / "study_tiny"


def words(directory: Path, *more: str) -> list[str]:
    every = ("all", "--recipe", "study_small", "--epochs", "2", "--seeds", "2")
    return [*every, "--limit-batches", "1", "--output", str(directory), *more]


def rows_of(directory: Path) -> list[dict[str, str]]:
    with open(directory / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_study_goes_on_where_it_stopped(workplace, monkeypatch, capsys):
    rates = ("--learning-rates", "1e-3", "2e-3")
    assert study.main(words(workplace, *rates, "--minutes", "0")) == 1
    assert capsys.readouterr().out.count("not started, out of time") == 4
    made = []
    perform = study_runs.perform
    monkeypatch.setattr(study_runs, "perform", lambda job: made.append(job.key) or perform(job))
    assert study.main(words(workplace, *rates)) == 0
    rows = rows_of(workplace)
    assert [row["stage"] for row in rows] == ["tune"] * 4 + ["final"] * 4
    assert len(made) == len(set(made)) == 8
    assert all((row["test_top1"] == "") == (row["stage"] == "tune") for row in rows)
    assert {row["epochs"] for row in rows} == {"1", "2"}
    for name in ("corners", "corner"):
        tuned = {r["lr"]: float(r["validation_top1"]) for r in rows[:4] if r["variant"] == name}
        used = {row["lr"] for row in rows[4:] if row["variant"] == name}
        assert len(used) == 1
        assert tuned[used.pop()] == max(tuned.values())

    kept = [
        row
        for row in rows
        if (row["stage"], row["variant"], row["seed"]) != ("final", "corner", "1")
    ]
    study_runs.write_rows(workplace / "runs.csv", study_runs.COLUMNS, kept)
    made.clear()
    assert study.main(words(workplace, *rates)) == 0
    assert [key[:3] for key in made] == [("final", "corner", "1")]
    again = {tuple(row[k] for k in study.KEY): row["test_top1"] for row in rows_of(workplace)}
    assert again == {tuple(row[k] for k in study.KEY): row["test_top1"] for row in rows}

    page, images = workplace / "page.md", workplace / "images"
    page.write_text("# Results\n\n<!-- study_tiny -->\nold\n<!-- end of study_tiny -->\n\nAfter.\n")
    arguments = [str(workplace), "--page", str(page), "--images", str(images)]
    assert study_plot.main(arguments) == study_plot.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("# Results\n\n<!-- study_tiny -->\n| model |")
    assert text.endswith("<!-- end of study_tiny -->\n\nAfter.\n")
    assert text.count("| tiny |") == 2
    assert "old" not in text
    assert (images / "study_tiny.png").stat().st_size > 10_000


def test_a_run_that_fails_is_named_and_the_others_go_on(workplace, monkeypatch, capsys):
    perform = study_runs.perform

    def fails(job):
        if (job.variant, job.seed) == ("corners", 1):
            raise RuntimeError("out of memory")
        return perform(job)

    monkeypatch.setattr(study_runs, "perform", fails)
    assert study.main(words(workplace, "--learning-rates", "1e-3")) == 1
    assert (
        "missing: final corners 1 0.001 2: RuntimeError: out of memory" in capsys.readouterr().out
    )
    assert len(rows_of(workplace)) == 3


def test_the_number_of_epochs_follows_the_slowest(workplace, monkeypatch):
    arguments = study.parse(words(workplace, "--run-seconds", "40"))
    arguments.epochs = None
    workplace.mkdir()
    monkeypatch.setattr(study, "LEAST_EPOCHS", 5)
    speed = [
        {"variant": "corners", "way": "eager", "ms_per_step": "9000", "error": ""},
        {"variant": "corners", "way": "captured", "ms_per_step": "20", "error": ""},
        {"variant": "corner", "way": "eager", "ms_per_step": "55", "error": ""},
        {"variant": "corner", "way": "captured", "ms_per_step": "", "error": "no"},
    ]
    plan = study.make_plan(arguments, speed)
    assert plan["captured"] == ["corners"]
    assert plan["left_out"] == []
    assert plan["epochs"] == 5  # of 140 steps of 0.055 s, in nine tenths of 40 s: 4, but 5 at least
    assert study.make_plan(arguments, []) == plan  # what was decided stays


def test_variants_that_are_too_slow_or_fail_are_left_out(workplace):
    arguments = study.parse(words(workplace, "--run-seconds", "40"))
    workplace.mkdir()
    row = {"variant": "corner", "way": "eager", "ms_per_step": "", "error": "out of memory"}
    speed = [{**row, "variant": "corners", "ms_per_step": "20", "error": ""}, row]
    assert study.make_plan(arguments, speed)["left_out"] == ["corner"]
    (workplace / "plan.json").unlink()
    speed[1] = {**row, "ms_per_step": "1000", "error": ""}
    plan = study.make_plan(arguments, speed)
    assert (plan["left_out"], plan["epochs"]) == (["corner"], 2)


def test_messages(workplace, capsys):
    with study.only_one(workplace):
        assert study.main(words(workplace)) == 2
    assert "another process is writing to" in capsys.readouterr().err
    (workplace / "plan.json").write_text('{"recipe": "study", "epochs": 1}')
    (workplace / "speed.csv").write_text("variant,way,error\ncorners,eager,\ncorner,eager,\n")
    assert study.main(words(workplace)) == 2
    assert "holds the study of recipe 'study', not of 'study_small'" in capsys.readouterr().err
    assert study_plot.main([str(workplace)]) == 2
    assert "has no run that counts yet" in capsys.readouterr().err


def test_the_best_is_trained_tested_once_and_saved(workplace, monkeypatch):
    monkeypatch.setattr(study, "BEST", {"tiny": TINY})
    monkeypatch.setattr(study_plot, "BEST", {"tiny": TINY})
    monkeypatch.setattr(study, "get_recipe", lambda name: tiny_recipe())
    common = ["best", "--variant", "tiny", "--output", str(workplace), "--limit-batches", "4"]
    assert study.main([*common, "--no-test", "--epochs", "1", "--set", "optim.lr=1e-3"]) == 0
    assert not (workplace / "model.safetensors").exists()
    assert study.main([*common, "--minutes", "0.02"]) == 0
    trial, best = rows_of(workplace)
    assert (trial["stage"], trial["lr"], trial["test_top1"]) == ("trial", "0.001", "")
    assert best["stage"] == "best"
    assert 0 < float(best["test_top1"]) < 1
    assert int(best["epochs"]) >= 1
    assert (workplace / "model.safetensors").exists()
    assert len(study_plot.best_table(workplace)) == 4


@pytest.mark.slow
def test_workers_are_processes(tmp_path):
    directory = tmp_path / "study"
    more = ("--variants", "deit", "corner", "--learning-rates", "1e-3", "--at-once", "2")
    assert study.main(words(directory, *more, "--threads", "1")) == 0
    assert len(rows_of(directory)) == 4
