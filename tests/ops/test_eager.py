"""What the eager backend promises beyond the right numbers."""

import pytest
import torch

from helpers import random_case, relative_error, scan_inputs
from v2m.ops import selective_scan


@pytest.mark.parametrize("seed", range(300, 330))
def test_output_and_every_gradient_equal_the_reference(seed):
    inputs, options = random_case(seed, largest=9)
    results = {}
    for backend in ("reference", "eager"):
        given = {n: x.clone().requires_grad_() for n, x in inputs.items() if x is not None}
        y = selective_scan(**given, **options, backend=backend)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        results[backend] = {"y": y, **{name: x.grad for name, x in given.items()}}
    for name, expected in results["reference"].items():
        got = results["eager"][name]
        assert (got - expected).norm() <= 1e-12 * (1 + expected.norm()), (name, options)


def test_the_graph_of_the_backward_is_linear_in_the_length():
    """Indexing the grid inside the loop would add a node of the size of the grid every step."""

    def selects(length: int) -> tuple[int, int]:
        inputs = scan_inputs(torch.Generator().manual_seed(0), (1, 1, length, 2), 2)
        given = {n: x.requires_grad_() for n, x in inputs.items()}
        y = selective_scan(**given, axis=2, backend="eager")
        seen, stack, names = set(), [y.grad_fn], []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            names.append(node.name())
            stack += [function for function, _ in node.next_functions]
        assert not any("Select" in n or "Slice" in n or "Index" in n for n in names)
        return len(names)

    assert selects(64) < 2.5 * selects(32)


def test_it_exports():
    class Scan(torch.nn.Module):
        def forward(self, u, dt, A):
            return selective_scan(u, dt, A, axis=1)

    inputs = scan_inputs(torch.Generator().manual_seed(0), (1, 4, 3, 2), 2)
    arguments = tuple(inputs[name].float() for name in ("u", "dt", "A"))
    program = torch.export.export(Scan(), arguments)
    assert not any("v2m" in str(node.target) for node in program.graph.nodes)
    expected = selective_scan(*arguments, axis=1, backend="eager")
    assert relative_error(program.module()(*arguments), expected) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_an_exported_scan_stops_an_infinite_state_at_a_window(reverse):
    class Scan(torch.nn.Module):
        def forward(self, u):
            return selective_scan(u, u, -torch.ones(3, 2), axis=2, reverse=reverse, window=2)

    u = torch.zeros(1, 1, 6, 3)
    program = torch.export.export(Scan(), (u,), strict=False).module()
    u[0, 0, 2] = torch.inf
    y = program(u)
    assert not torch.isfinite(y[0, 0, 2]).any()
    assert torch.isfinite(y[0, 0, [0, 1, 4, 5]]).all()
    assert torch.equal(torch.isfinite(y), torch.isfinite(Scan()(u)))
