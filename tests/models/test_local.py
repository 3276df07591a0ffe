"""Local windows, the channel gate, the class token and the hand-over of the whole state."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import v2m
from helpers import fill_deterministically, images_for, small
from v2m.errors import InputError
from v2m.layers import SCANS, ChannelGate, Mixer2d
from v2m.models import MODELS, V2M
from v2m.models.table import model_row
from v2m.ops.core import Direction, PassWeights, causal_conv
from v2m.ops.full_state import full_state_core

LOCAL = ("v2m_local_tiny_patch16_224", "v2m_local_small_patch16_224")


@pytest.mark.parametrize(
    ("name", "parameters", "gflops", "deviation"),
    [(LOCAL[0], 8e6, 1.8e9, 0.10), (LOCAL[1], 28e6, 5.4e9, 0.05)],
)
def test_published_sizes(name, parameters, gflops, deviation):
    """One structure for both rows: T stays 9 % below the published parameters."""
    row = model_row(name)
    assert row.parameters == pytest.approx(parameters, rel=deviation)
    assert row.multiply_adds == pytest.approx(gflops, rel=0.12)


@pytest.mark.parametrize("name", LOCAL)
def test_every_layer_has_both_kinds_of_directions(name):
    config = V2M(**{**MODELS[name][1], "embed_dim": 16}).config
    assert config.depth == 20
    assert {width for row in config.windows for width in row} == {0, 2, 7}
    assert all(0 in row and any(row) for row in config.windows)
    for layer, following in zip(config.windows, config.windows[1:]):
        assert [bool(w) for w in layer] == [not w for w in following]


def test_rows_of_windows_are_repeated_over_the_depth():
    model = v2m.create_model(LOCAL[0], embed_dim=16, depth=6, img_size=32)
    widths = [[d.second.window for d in block.mixer.directions] for block in model.layers]
    assert widths[:4] == [list(row) for row in model.config.windows]
    assert widths[4:] == widths[:2]


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_windows_confine_the_scans(window):
    """Without convolution taps on the past, a pixel reaches its own window of a 5 x 8 grid alone:
    a size that is no multiple of any of these windows.
    """
    mixer = fill_deterministically(Mixer2d(4, d_state=2, d_conv=1, windows=(window,) * 4)).double()
    x = torch.randn(1, 5, 8, 4, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    for i, j in ((0, 0), (2, 5), (4, 7)):
        (grad,) = torch.autograd.grad(y[0, i, j].sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        rows = torch.arange(5) // window == i // window
        columns = torch.arange(8) // window == j // window
        assert torch.equal(reached, rows[:, None] & columns[None, :])


def test_wide_windows_are_the_whole_grid():
    whole = fill_deterministically(Mixer2d(8))
    wide = fill_deterministically(Mixer2d(8, windows=(50, 50, 0, 50)))
    x = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(wide(x), whole(x))


def test_channel_gate_is_its_formula():
    gate = fill_deterministically(ChannelGate(16))
    x = torch.randn(2, 3, 5, 16)
    mean = F.layer_norm(x, (16,), gate.norm.weight, gate.norm.bias).mean((1, 2))
    hidden = F.gelu(mean @ gate.reduce.weight.T + gate.reduce.bias)
    opened = torch.sigmoid(hidden @ gate.expand.weight.T + gate.expand.bias)
    assert hidden.shape == (2, 2)
    torch.testing.assert_close(gate(x), x * opened[:, None, None, :])


def test_gated_mixer_gates_each_direction():
    """An open gate changes nothing; with the gate of the windows shut, those directions vanish."""
    windows = (0, 2, 2, 0)
    gated = fill_deterministically(Mixer2d(8, windows=windows, channel_gate=True))
    plain = Mixer2d(8, windows=windows)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "gate" not in k})
    x = torch.randn(2, 5, 5, 8)
    with torch.no_grad():
        for gate, bias in ((gated.gate, 50.0), (gated.window_gate, 50.0)):
            gate.expand.weight.zero_()
            gate.expand.bias.fill_(bias)
        torch.testing.assert_close(gated(x), plain(x))
        gated.window_gate.expand.bias.fill_(-200.0)
        kept = tuple(plain.directions[k] for k in (0, 3))
        plain.directions = kept
        torch.testing.assert_close(gated(x), plain(x) / 2)


@pytest.mark.parametrize("windows", [None, (2, 2, 2, 2), (0, 2, 0, 2)])
def test_there_is_no_gate_that_nothing_goes_through(windows):
    mixer = fill_deterministically(Mixer2d(8, windows=windows, channel_gate=True))
    mixer(torch.randn(2, 5, 5, 8)).square().sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    assert mixer.multiply_adds(25) > Mixer2d(8, windows=windows).multiply_adds(25)


def test_local_models_take_any_grid():
    model = small(LOCAL[0], num_classes=5, windows=((0, 7, 2, 0),))
    for size in ((16, 16), (48, 80), (144, 32)):
        logits = model(images_for(model, size=size))
        assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_windows_must_fit_the_scan():
    with pytest.raises(InputError, match="of 4 whole numbers, one a direction"):
        V2M(depth=1, windows=((2, 7),))
    with pytest.raises(InputError, match="`windows` must have a row for each layer"):
        V2M(depth=1, windows=())
    with pytest.raises(InputError, match="`windows` must have one width for each of the 4"):
        Mixer2d(8, windows=(2,))
    with pytest.raises(InputError, match="`channel_gate` must be True or False; got 'yes'"):
        V2M(depth=1, channel_gate="yes")


# The class token ---------------------------------------------------------------------------------


def test_class_tokens_stand_in_a_row_and_head_reads_them():
    model = small("v2m_tiny_patch16_224", class_token=True, global_pool="token").eval()
    images = images_for(model, size=(80, 48))
    features = model.forward_features(images)
    assert features.shape == (2, 6, 3, 32)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 2].mean(1))
    _, (feature_map,) = model.forward_intermediates(images, indices=1, output_fmt="NHWC", norm=True)
    assert torch.equal(feature_map, features[:, [0, 1, 3, 4, 5]])


def test_class_token_sees_every_pixel():
    """In one layer the row in the middle is reached from above and below, left and right."""
    model = small("v2m_tiny_patch16_224", class_token=True, global_pool="token", depth=1).eval()
    fill_deterministically(model)
    images = images_for(model, batch=1, size=(64, 96)).requires_grad_(True)
    model(images).sum().backward()
    patches = F.avg_pool2d(images.grad.abs(), 16)
    assert (patches > 0).all()


def test_class_token_needs_a_grid_that_may_grow():
    with pytest.raises(InputError, match="class_token=True puts a row into the grid"):
        V2M(depth=1, class_token=True, scan="release")
    with pytest.raises(InputError, match=r'`global_pool` is "token", but the model has no class'):
        V2M(depth=1, global_pool="token")
    with pytest.raises(InputError, match="the model has no class token to read"):
        small("v2m_tiny_patch16_224").reset_classifier(3, "token")


# N, scans and the whole state --------------------------------------------------------------------


@pytest.mark.parametrize("states", [1, 2, 5, 16])
@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_with_every_state_size(scan, states):
    model = small("v2m_tiny_patch16_224", scan=scan, d_state=states, depth=1, num_classes=3)
    logits = model(images_for(model))
    logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def full_state_loops(u, z, first: PassWeights, second: PassWeights, direction: Direction):
    """One direction of the reduced Roesser model: float64 loops over pixels, numpy alone."""

    def softplus(x):
        return np.logaddexp(0, x)

    def silu(x):
        return x / (1 + np.exp(-x))

    height, width, inner = u.shape
    states, rank = first.A_log.shape[1], first.dt_proj.shape[1]
    A1, A2 = -np.exp(first.A_log), -np.exp(second.A_log)
    columns = range(width)[::-1] if direction.first.reverse else range(width)
    rows = range(height)[::-1] if direction.second.reverse else range(height)
    back, up = (-1 if direction.first.reverse else 1), (-1 if direction.second.reverse else 1)
    taps = first.conv_weight.shape[1]
    y = np.zeros((height, width, inner))
    h2 = np.zeros((height, width, inner, states))
    for i in rows:
        h1 = np.zeros((inner, states))
        for j in columns:
            convolved = first.conv_bias.copy()
            for tap in range(taps):
                source = j - back * (taps - 1 - tap)
                if 0 <= source < width:
                    convolved += first.conv_weight[:, tap] * u[i, source]
            u1 = silu(convolved)
            p1, p2 = first.x_proj @ u1, second.x_proj @ u1
            dt1 = softplus(first.dt_proj @ p1[:rank] + first.dt_bias)
            dt2 = softplus(second.dt_proj @ p2[:rank] + second.dt_bias)
            h1 = np.exp(dt1[:, None] * A1) * h1 + np.outer(dt1 * u1, p1[rank:])
            above = h2[i - up, j] if 0 <= i - up < height else np.zeros((inner, states))
            h2[i, j] = np.exp(dt2[:, None] * A2) * above + h1
            y[i, j] = (h2[i, j] @ p2[rank:] + first.D * u1) * silu(z[i, j])
    return y


@pytest.mark.parametrize("scan", ["corner", "opposite_corners", "corners"])
def test_whole_state_against_independent_loops(scan):
    mixer = fill_deterministically(Mixer2d(4, d_state=3, hand_over="state", scan=scan)).double()
    first, second = mixer.pass_weights(""), mixer.pass_weights("_2")
    u, z = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 4, 8).double()
    got = full_state_core(u, z, first, second, mixer.directions)
    arrays = [
        PassWeights(*(None if w is None else w.detach().numpy() for w in weights))
        for weights in (first, second)
    ]
    for b in range(2):
        expected = sum(
            full_state_loops(u[b].numpy(), z[b].numpy(), *arrays, direction)
            for direction in mixer.directions
        )
        expected = expected * 2 / len(mixer.directions)
        np.testing.assert_allclose(got[b].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_whole_state_without_decay_is_a_running_sum():
    """exp(dt A) = 1 in both passes: h2 is the sum of dt1 B1 u1 over the quadrant."""
    mixer = fill_deterministically(Mixer2d(4, d_state=1, hand_over="state", scan="corner")).double()
    with torch.no_grad():
        mixer.A_log.fill_(-100.0)
        mixer.A_2_log.fill_(-100.0)
        mixer.D.zero_()
    first, second = mixer.pass_weights(""), mixer.pass_weights("_2")
    u = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    y = full_state_core(u, None, first, second, mixer.directions) / 2
    u1 = F.silu(causal_conv(u, first.conv_weight, first.conv_bias, 2, False))
    dt1, B1 = (u1 @ first.x_proj.T).split([1, 1], dim=-1)
    dt1 = F.softplus(dt1 @ first.dt_proj.T + first.dt_bias)
    quadrant = (dt1 * B1 * u1).cumsum(1).cumsum(2)
    torch.testing.assert_close(y, quadrant * (u1 @ second.x_proj.T)[..., 1:])


def test_whole_state_trains_windows_and_all():
    model = small(
        "v2m_tiny_patch16_224",
        hand_over="state",
        windows=((0, 2, 0, 2),),
        depth=1,
        d_state=4,
        num_classes=3,
    )
    names = [name for name, _ in model.named_parameters()]
    assert not any("conv1d_2" in name or name.endswith("D_2") for name in names)
    model(images_for(model)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(InputError, match="`hand_over` must be one of sum, state; got 'all'"):
        V2M(depth=1, hand_over="all")
