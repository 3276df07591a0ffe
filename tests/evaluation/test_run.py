"""What evaluation takes over from the run that left a model."""

import pytest

from v2m.evaluation import dense_run
from v2m.evaluation.run import stored_split


@pytest.mark.parametrize(
    "config", [None, [], {}, {"v2m": None}, {"v2m": {"training": {"data": {"split_seed": "x"}}}}]
)
def test_models_of_another_origin_say_nothing(config):
    assert stored_split(config) == {}


def test_dense_tasks_keep_aside_what_the_run_kept_aside(monkeypatch):
    settings = {"validation_fraction": 0.3, "split_seed": 5, "workers": 2}
    config = {"v2m": {"training": {"data": settings}}}
    asked = []

    class Stop(Exception):
        pass

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        raise Stop

    class Model:
        def to(self, device):
            return self

    monkeypatch.setattr(dense_run, "from_directory", lambda folder: Model())
    monkeypatch.setattr(dense_run, "read_dense_config", lambda folder: config)
    monkeypatch.setattr(dense_run, "load_segmentation", load)
    with pytest.raises(Stop):
        dense_run.evaluate_dense("run", "scenes", split="validation", device="cpu")
    assert asked == [
        (("scenes", "validation"), {"on_error": "raise", "validation_fraction": 0.3, "seed": 5})
    ]
