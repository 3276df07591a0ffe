"""The 2-D mixer: the published numbers, its symmetry, its initialisation."""

import copy
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from helpers import available_backends, device_of, fill_deterministically, relative_error
from v2m.errors import InputError
from v2m.layers import SCANS, Mixer2d
from v2m.ops import use_backend

GOLDEN = {
    "v2m_release_mixer": ("", "release"),
    "v2m_corners_mixer": ("m.", "corners"),
}


@pytest.fixture(scope="module")
def golden_files(request):
    folder = request.config.rootpath / "tests" / "golden"
    return {name: load_file(folder / f"{name}.safetensors") for name in GOLDEN}


@pytest.mark.parametrize("name", list(GOLDEN))
@pytest.mark.parametrize("backend", available_backends())
def test_output_and_every_gradient_of_the_published_code(golden_files, name, backend):
    golden, (prefix, scan) = golden_files[name], GOLDEN[name]
    device = device_of(backend)
    parameters = {
        key.removeprefix("param/" + prefix): value
        for key, value in golden.items()
        if key.startswith("param/")
    }
    mixer = Mixer2d(32, scan=scan).to(device)
    mixer.load_state_dict(parameters)  # strictly: published names and shapes, no more and no less
    tokens = golden["input"].to(device, copy=True).requires_grad_()
    grid = tokens if tokens.dim() == 4 else tokens.unflatten(1, (6, 6))  # row-major tokens
    with use_backend(backend):
        output = mixer(grid).reshape(tokens.shape)
        output.backward(golden["cotangent"].to(device))

    got = {"output": output, "grad/input": tokens.grad}
    got |= {f"grad/{prefix}{name}": p.grad for name, p in mixer.named_parameters()}
    expected = {key for key in golden if key.startswith("grad/")} | {"output"}
    assert got.keys() == expected
    errors = {key: relative_error(value, golden[key]) for key, value in got.items()}
    assert max(errors.values()) <= 1e-5, errors


def grid_and_mixer(scan, shape=(2, 4, 6, 16)):
    mixer = fill_deterministically(Mixer2d(16, d_state=4, scan=scan).double())
    generator = torch.Generator().manual_seed(0)
    return mixer, torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("axis", [1, 2])
def test_corners_commute_with_flips_of_the_image(axis):
    mixer, grid = grid_and_mixer("corners")
    torch.testing.assert_close(mixer(grid.flip(axis)), mixer(grid).flip(axis), rtol=1e-12, atol=0)


def test_corners_do_not_commute_with_transposition():
    """Rows come first."""
    mixer, grid = grid_and_mixer("corners", (2, 5, 5, 16))
    assert relative_error(mixer(grid.transpose(1, 2)), mixer(grid).transpose(1, 2)) > 1e-2


@pytest.mark.parametrize("scan", ["corner", "release_aligned", "release"])
@pytest.mark.parametrize("axis", [1, 2])
def test_the_other_scans_do_not_commute_with_flips(scan, axis):
    mixer, grid = grid_and_mixer(scan, (2, 5, 5, 16))
    assert relative_error(mixer(grid.flip(axis)), mixer(grid).flip(axis)) > 1e-3


def test_opposite_corners_commute_with_turning_the_image_upside_down_only():
    mixer, grid = grid_and_mixer("opposite_corners")
    turned = mixer(grid.flip(1, 2)).flip(1, 2)
    torch.testing.assert_close(turned, mixer(grid), rtol=1e-12, atol=0)
    assert relative_error(mixer(grid.flip(1)).flip(1), mixer(grid)) > 1e-3


@pytest.mark.parametrize("scan", [name for name in SCANS if name != "release"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (3, 5)])
def test_any_grid(scan, size):
    mixer, grid = grid_and_mixer(scan, (2, *size, 16))
    y = mixer(grid)
    assert y.shape == grid.shape
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def reach(mixer, size, pixel):
    """Where the result changes when one pixel of the input does."""
    grid = torch.randn(1, *size, 16, dtype=torch.float64)
    changed = grid.clone()
    changed[0, *pixel] += 1
    return (mixer(grid) != mixer(changed))[0].any(-1)


@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (4, 6), (1, 5)])
def test_an_impulse_reaches_exactly_the_quadrant_of_a_single_direction(pixel):
    mixer, _ = grid_and_mixer("corner")
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[pixel[0] :, pixel[1] :] = True
    assert torch.equal(reach(mixer, (5, 7), pixel), expected)


def test_an_impulse_reaches_every_pixel_from_four_corners():
    mixer, _ = grid_and_mixer("corners")
    assert reach(mixer, (5, 7), (2, 3)).all()


def test_an_impulse_under_release_lands_on_the_wrong_pixels():
    """Left-down quadrants at (i, j), seen transposed, and two mirrored ones (see test_core)."""
    mixer, _ = grid_and_mixer("release")
    side, (i, j) = 6, (4, 2)
    quadrant = torch.zeros(4, side, side, dtype=torch.bool)
    quadrant[0, i:, j:] = quadrant[1, i:, j:] = True
    quadrant[2, i:, : j + 1] = True  # row from right, column down
    quadrant[3, : i + 1, j:] = True  # column up, row from left
    seen = quadrant[0] | quadrant[1] | quadrant[2].flip(0) | quadrant[3].flip(1)
    reached = reach(mixer, (side, side), (i, j))
    # The gate is local and comes before the mirrors: the pixel itself is in every quadrant above.
    assert torch.equal(reached, seen.T)
    assert not torch.equal(reached, seen)


def test_release_needs_a_square_grid():
    mixer, _ = grid_and_mixer("release")
    message = (
        'scan="release" needs a square grid, since the published code adds a transposed result to'
        ' its input; got 3 x 5 tokens. Use square images, or scan="corners", which takes any size.'
    )
    with pytest.raises(InputError, match=re.escape(message)):
        mixer(torch.randn(1, 3, 5, 16, dtype=torch.float64))


def test_an_unknown_scan_names_the_known_ones():
    message = "`scan` must be one of corners, corner, opposite_corners, release_aligned, release"
    for wrong in ("spiral", ["corners"], None):
        with pytest.raises(InputError, match=message):
            Mixer2d(16, scan=wrong)


@pytest.mark.parametrize("repeat", range(3))
def test_initialisation(repeat):
    torch.manual_seed(repeat)
    mixer = Mixer2d(64, d_state=16)
    for suffix in ("", "_2"):
        A_log, dt_proj = getattr(mixer, f"A{suffix}_log"), getattr(mixer, f"dt_proj{suffix}")
        expected = torch.log(torch.arange(1.0, 17.0)).expand(128, 16)
        assert torch.equal(A_log, expected)
        assert torch.equal(getattr(mixer, f"D{suffix}"), torch.ones(128))
        dt = torch.nn.functional.softplus(dt_proj.bias.detach().double())
        assert dt.min() >= 0.999e-3
        assert dt.max() <= 1.001e-1
        # log-uniform: the mean logarithm is the middle, within 5 standard errors
        middle, spread = math.log(1e-2), math.log(100) / math.sqrt(12 * 128)
        assert abs(float(dt.log().mean()) - middle) < 5 * spread
        bound = 4**-0.5  # R = 4
        assert dt_proj.weight.abs().max() <= bound
        assert dt_proj.weight.abs().max() > 0.9 * bound
    assert mixer.in_proj.bias is None
    assert mixer.out_proj.bias is None
    assert mixer.x_proj.bias is None
    assert mixer.x_proj_2.bias is None
    assert mixer.dt_proj.in_features == 4


def test_sizes_follow_the_keywords():
    mixer = Mixer2d(20, d_state=3, d_conv=2, expand=3, dt_rank=5, scan="corner")
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes["in_proj.weight"] == (120, 20)
    assert shapes["conv1d_2.weight"] == (60, 1, 2)
    assert shapes["x_proj.weight"] == (8, 60)
    assert shapes["dt_proj_2.weight"] == (60, 5)
    assert shapes["A_2_log"] == (60, 3)
    assert shapes["out_proj.weight"] == (20, 60)
    assert Mixer2d(20, d_state=3).dt_proj.in_features == 2  # ceil(20 / 16)


def test_autocast_keeps_the_state_in_float32():
    """Under bf16 autocast the result is near the float32 one, parameters and gradients float32."""
    mixer, grid = grid_and_mixer("corners")
    mixer, grid = mixer.float(), grid.float()
    expected = mixer(grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(grid)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 3e-2
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mixer.parameters())


def test_a_copy_is_independent():
    mixer, grid = grid_and_mixer("corners")
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        twin.A_log.add_(1)
    assert not torch.equal(mixer(grid), twin(grid))
    assert "scan='corners'" in repr(mixer)
