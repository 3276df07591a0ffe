"""What several test files need: independent float64 loops, deterministic weights, small models."""

import importlib.util
import zlib

import numpy as np
import torch
from torch import Tensor, nn

import v2m
from v2m.ops.backend import is_available

SCAN_ARGUMENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def available_backends() -> list[str]:
    """The backends that can run here: the compiled ones where their code and compiler are."""
    names = ["reference", "eager"]
    if importlib.util.find_spec("v2m.ops.library") is not None:
        names += ["cpu"] * is_available("cpu")
        names += ["triton"] * (is_available("triton") and torch.cuda.is_available())
    return names


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in float64 on the CPU."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))


def scan_loops(u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window) -> np.ndarray:
    """The selective scan written down a second time: numpy, float64, one line after another."""
    y = np.zeros(u.shape)
    batch, height, width, _ = u.shape
    length, lines = (height, width) if axis == 1 else (width, height)
    for b in range(batch):
        for line in range(lines):
            h, cell = np.zeros(A.shape), None
            for p in range(length)[::-1] if reverse else range(length):
                at = (b, p, line) if axis == 1 else (b, line, p)
                if window is not None and p // window != cell:
                    h, cell = np.zeros(A.shape), p // window
                step = dt[at] + (0 if dt_bias is None else dt_bias)
                step = np.logaddexp(0, step) if softplus else step
                B_p = np.ones(A.shape[1]) if B is None else B[at]
                C_p = np.ones(A.shape[1]) if C is None else C[at]
                h = np.exp(step[:, None] * A) * h + np.outer(step * u[at], B_p)
                y[at] = h @ C_p + (0 if D is None else D * u[at])
                if z is not None:
                    y[at] *= z[at] / (1 + np.exp(-z[at]))
    return y


def scan_inputs(
    generator: torch.Generator,
    shape: tuple[int, int, int, int],
    states: int,
    *,
    without: tuple[str, ...] = (),
    softplus: bool = True,
) -> dict[str, Tensor | None]:
    """Random float64 arguments of `selective_scan` of a usual size; those `without` are None."""
    batch, height, width, channels = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    dt = normal(*shape) - 1.0
    inputs = {
        "u": normal(*shape),
        "dt": dt if softplus else torch.nn.functional.softplus(dt),
        "A": -torch.exp(0.5 * normal(channels, states)),
        "B": normal(batch, height, width, states),
        "C": normal(batch, height, width, states),
        "D": normal(channels),
        "z": normal(*shape),
        "dt_bias": 0.3 * normal(channels),
    }
    if not softplus:
        inputs["dt_bias"] = inputs["dt_bias"].abs()
    return {name: None if name in without else value for name, value in inputs.items()}


def random_case(seed: int, largest: int = 4) -> tuple[dict[str, Tensor | None], dict]:
    """Random arguments and options of `selective_scan`: lines and columns, odd sizes, windows,
    both axes and senses, optional inputs left out.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    height, width = pick(
        [(1, pick(range(1, 2 * largest))), (pick(range(1, 2 * largest)), 1)]
        + [(pick(range(2, largest + 1)), pick(range(2, largest + 1))) for _ in range(3)]
    )
    shape = (pick([1, 2]), height, width, pick([1, 2, 3]))
    options = {
        "axis": pick([1, 2]),
        "reverse": pick([False, True]),
        "window": pick([None, None, 1, 2, 3, 50]),
        "softplus": pick([True, True, False]),
    }
    left_out = tuple(name for name in ("B", "C", "D", "z", "dt_bias") if pick([0, 0, 1]))
    inputs = scan_inputs(
        generator, shape, pick([1, 2, 4]), without=left_out, softplus=options["softplus"]
    )
    return inputs, options


def fill_deterministically(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that depend on its name, shape and the seed alone.

    numpy's generators are stable across versions, torch's are not. Nothing is left at a zero or a
    one, and dt stays in the range it has in practice.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = np.random.Generator(np.random.Philox([seed, zlib.crc32(name.encode())]))
            values = random.random(tuple(parameter.shape), dtype=np.float32)
            values = (values - np.float32(0.5)) * np.float32(12**0.5)  # mean 0, variance 1
            leaf = name.split(".")[-1]
            if leaf in ("A_log", "A_2_log", "A_b_log", "A_logs"):
                values = np.log(np.arange(1, values.shape[-1] + 1)) + 0.1 * values
            elif leaf == "dt_projs_bias" or ("dt_proj" in name and leaf == "bias"):
                values = 0.5 * values - 4.0
            elif leaf in ("D", "D_2", "D_b", "Ds") or ("norm" in name and leaf == "weight"):
                values = 1.0 + 0.1 * values
            elif leaf in ("bias", "pos_embed", "cls_token"):
                values = 0.1 * values
            else:
                values /= np.float32(np.prod(values.shape[1:]) ** 0.5)
            parameter.copy_(torch.from_numpy(np.asarray(values)).to(parameter.dtype))
    return model


def small(name: str, **keywords) -> nn.Module:
    """A registered model cut down to 2 layers of 32 on a 4 x 4 grid, or to four thin stages."""
    return v2m.create_model(name, **{**small_size(name), **keywords})


def small_size(name: str) -> dict:
    if "patch" not in name:
        return {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "img_size": 32}
    return {"embed_dim": 32, "depth": 2, "img_size": 16 if "patch4" in name else 64}


def images_for(model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    """Normal random images of the model's own size, in its dtype."""
    config = model.config
    height, width = config.img_size if size is None else size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, config.in_chans, height, width, generator=generator)
    return images.to(next(model.parameters()))


def golden_case(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A registered model at its full size with deterministic weights, and one small image."""
    with torch.device("meta"):
        model = v2m.create_model(name)
    model.to_empty(device="cpu")
    patch = getattr(model.config, "patch_size", 16)
    shape = (1, model.config.in_chans, 4 * patch, 3 * patch)
    random = np.random.Generator(np.random.Philox([1, zlib.crc32(name.encode())]))
    images = torch.from_numpy(random.standard_normal(shape)).to(dtype)
    return fill_deterministically(model).to(dtype).eval(), images
