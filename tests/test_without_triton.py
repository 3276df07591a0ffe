"""Without Triton and without numba everything works, on the eager backend.

Both are blocked from import in a fresh interpreter, in the two ways in which they can be missing.
"""

import subprocess
import sys
import textwrap

import pytest

BLOCKS = {
    "none in sys.modules": """
        import sys
        sys.modules["triton"] = None
        sys.modules["numba"] = None
    """,
    "a finder that refuses": """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("triton", "numba"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
    """,
}
PROGRAM = """
    import torch
    import v2m
    from v2m.models import save_model
    from v2m.ops.backend import explain_backend

    assert explain_backend(None, "cpu")[0] == "eager"
    assert explain_backend(None, "cuda")[0] == "eager"

    torch.manual_seed(0)
    model = v2m.create_model("v2m_nano_patch4_28")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses

    save_model(model, "run", label_names=list("abcdefghij"))
    with torch.no_grad():
        assert torch.equal(v2m.from_checkpoint("run")(images), model.eval()(images))

    for name, package in (("cpu", "numba"), ("triton", "triton")):
        try:
            with v2m.ops.use_backend(name):
                model(images)
        except v2m.InputError as error:
            assert f"needs the package {package}" in str(error)
        else:
            raise AssertionError(name)

    from PIL import Image
    Image.new("L", (28, 28), 128).save("grey.png")
    from v2m.cli.main import main
    assert main(["predict", "run", "grey.png"]) in (0, None)
    assert not {"triton", "numba"} & {n for n, m in sys.modules.items() if m is not None}
    print("done")
"""


@pytest.mark.parametrize("how", list(BLOCKS))
def test_import_training_and_prediction(how, tmp_path):
    code = textwrap.dedent(BLOCKS[how]) + textwrap.dedent(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("done")
    assert "%" in result.stdout or "0." in result.stdout  # the prediction's probabilities
