"""What a user can get wrong in `v2m train`: exit code 2, the key named, one message, no
traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2m.cli.main import main

NANO = "v2m_nano_patch4_28"
SMALL = "fashion-mnist-small"

# (override, what the message must name)
BAD_VALUES = [
    ("optim.lr=0", "optim.lr"),
    ("optim.lr=-1", "optim.lr"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr=nan", "optim.lr"),
    ("optim.lr=inf", "optim.lr"),
    ("optim.lr=", "optim.lr"),
    ("optim.lr_batch_size=0", "optim.lr_batch_size"),
    ("optim.weight_decay=-0.1", "optim.weight_decay"),
    ("optim.betas=0.9", "optim.betas"),
    ("optim.betas=0.9,1.0", "optim.betas"),
    ("optim.betas=0.9,x", "optim.betas"),
    ("optim.momentum=1", "optim.momentum"),
    ("optim.layer_decay=0", "optim.layer_decay"),
    ("optim.layer_decay=1.5", "optim.layer_decay"),
    ("optim.clip_norm=0", "optim.clip_norm"),
    ("optim.accumulation=0", "optim.accumulation"),
    ("optim.accumulation=1.5", "optim.accumulation"),
    ("optim.accumulation=3", "optim.accumulation"),
    ("optim.name=adamv", "optim.name"),
    ("optim.nmae=adamw", "optim.name"),
    ("schedule.epochs=0", "schedule.epochs"),
    ("schedule.epochs=-3", "schedule.epochs"),
    ("schedule.epochs=ten", "schedule.epochs"),
    ("schedule.epochs=2.5", "schedule.epochs"),
    ("schedule.warmup_epochs=-1", "schedule.warmup_epochs"),
    ("schedule.warmup_epochs=30", "schedule.warmup_epochs"),
    ("schedule.min_lr=-1", "schedule.min_lr"),
    ("schedule.warmup_lr=x", "schedule.warmup_lr"),
    ("schedule.cycles=2", "schedule.cycles"),
    ("ema.decay=1", "ema.decay"),
    ("ema.decay=0", "ema.decay"),
    ("ema.warmup=perhaps", "ema.warmup"),
    ("ema.warmup_power=2", "ema.warmup_power"),
    ("mix.mixup=-1", "mix.mixup"),
    ("mix.cutmix=much", "mix.cutmix"),
    ("mix.probability=1.1", "mix.probability"),
    ("mix.label_smoothing=1", "mix.label_smoothing"),
    ("augment.crop=round", "augment.crop"),
    ("augment.crop_scale=0.5,0.1", "augment.crop_scale"),
    ("augment.crop_padding=-1", "augment.crop_padding"),
    ("augment.horizontal_flip=2", "augment.horizontal_flip"),
    ("augment.auto_augment=rand-what", "augment.auto_augment"),
    ("augment.random_erasing=-0.1", "augment.random_erasing"),
    ("augment.repeats=0", "augment.repeats"),
    ("augment.crop_pct=0", "augment.crop_pct"),
    ("augment.mixup=1", "augment.mixup"),
    ("data.batch_size=0", "data.batch_size"),
    ("data.batch_size=100000", "data.batch_size"),
    ("data.batch_size=many", "data.batch_size"),
    ("data.workers=-1", "data.workers"),
    ("data.validation_fraction=0", "data.validation_fraction"),
    ("data.validation_fraction=1", "data.validation_fraction"),
    ("data.on_error=ignore", "data.on_error"),
    ("data.name=no-such-set", "no-such-set"),
    ("model.name=v2m_nano", "v2m_nano_patch4_28"),
    ("model.drop_path_rate=1", "model.drop_path_rate"),
    ("model.img_size=30,28", "30"),
    ("model.img_size=0", "model.img_size"),
    ("model.img_size=28,28,28", "model.img_size"),
    ("model.kwargs.scan=diagonal", "scan"),
    ("model.kwargs.dpeth=2", "dpeth"),
    ("model.kwargs=3", "model.kwargs"),
    ("model.kwargs.num_classes=3", "num_classes"),
    ("model.kwargs.num_classes=0", "num_classes"),
    ("model.kwargs.features_only=true", "features_only"),
    ("model.kwargs.in_chans=2", "in_chans"),
    ("model.kwargs.d_state=0", "d_state"),
    ("model.checkpoint=/no/such/file", "/no/such/file"),
    ("run.seed=-1", "run.seed"),
    ("run.device=tpu", "run.device"),
    ("run.precision=float8", "run.precision"),
    ("run.compile=2", "run.compile"),
    ("run.keep_checkpoints=1", "run.keep_checkpoints"),
    ("run.limit_batches=0", "run.limit_batches"),
    ("nonsense", "nonsense"),
    ("=3", "=3"),
    ("optim=3", "optim"),
    ("optimizer.lr=1", "optim.lr"),
]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2M_BACKEND", "eager")


def refuse(
    arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    code = main([*arguments, "--output", str(output)])
    captured = capsys.readouterr()
    assert code == 2
    assert named in captured.err
    assert captured.err.startswith("v2m: error: ")
    assert "Traceback" not in captured.err
    assert "Traceback" not in captured.out
    assert not output.exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize(("override", "named"), BAD_VALUES, ids=[o for o, _ in BAD_VALUES])
def test_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    arguments = ["train", NANO, "--data", SMALL, "--device", "cpu", "--set", override]
    refuse(arguments, tmp_path / "run", capsys, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--data", SMALL], "no model is named"),
        (["train", NANO], "no data set is named"),
        (["train", "v2m_giant", "--data", SMALL], "v2m_giant"),
        (["train", NANO, "--data", "/no/such/folder"], "/no/such/folder"),
        (["train", "--recipe", "dmeo"], "Did you mean 'demo'?"),
        (["train", NANO, "--data", SMALL, "--seed", "x"], "run.seed"),
        (["train", NANO, "--data", SMALL, "--resume", "--overwrite"], "exclude each other"),
        (
            ["train", "--recipe", "demo", "--set", "mix.mixup=1", "--set", "data.batch_size=9"],
            "mix",
        ),
    ],
)
def test_bad_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    refuse(arguments, tmp_path / "run", capsys, named)


@pytest.mark.parametrize("text", ["{", "[]", '{"optim": {"lr": 0}}', '{"optimus": {}}', "\x00"])
def test_a_damaged_configuration_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "train_config.json").write_text(text)
    command = ["train", "--recipe", "demo", "--output", str(tmp_path), "--resume"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "train_config.json cannot be read" in message
    assert "--overwrite" in message


def test_there_are_sixty_kinds() -> None:
    assert len({override for override, _ in BAD_VALUES}) >= 60
