from __future__ import annotations

import torch

from train.model.smear import PositionSmearGate, SmearGate, predecessor

STARTS = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])


def values(dim: int = 16) -> torch.Tensor:
    return torch.randn(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_published_gate_starts_as_half_and_half_and_leaks_across_documents() -> None:
    x, gate = values(), SmearGate(16).double()
    expected = 0.5 * x
    expected[:, 1:] += 0.5 * x[:, :-1]
    torch.testing.assert_close(gate(x), expected, rtol=0, atol=1e-14)


def test_published_gate_equals_the_formula_with_and_without_documents() -> None:
    torch.manual_seed(0)
    x, gate = values(), SmearGate(16).double()
    gate.gate.data.normal_()
    g = torch.sigmoid(gate.gate)
    for starts in (None, STARTS):
        for row in range(2):
            for t in range(5):
                alone = t == 0 or (starts is not None and starts[row, t])
                before = torch.zeros(16, dtype=torch.float64) if alone else x[row, t - 1]
                expected = (1 - g) * x[row, t] + g * before
                torch.testing.assert_close(gate(x, starts)[row, t], expected, rtol=0, atol=1e-13)


def test_document_gate_starts_as_the_identity_and_can_be_trained() -> None:
    x, gate = values(), PositionSmearGate(16).double()
    assert torch.equal(gate(x, STARTS), x)
    gate(x, STARTS).square().sum().backward()
    assert gate.scale.grad.abs() > 0


def test_document_gate_equals_the_formula_and_never_looks_into_the_document_before() -> None:
    torch.manual_seed(0)
    x, gate = values(), PositionSmearGate(16).double()
    gate.gate.data.normal_()
    gate.scale.data.fill_(0.7)
    assert gate.gate.shape == (1, 12)
    for row in range(2):
        for t in range(5):
            g = 0.7 * torch.sigmoid((gate.gate[0] * x[row, t, :12]).sum())
            alone = t == 0 or STARTS[row, t]
            expected = x[row, t] if alone else x[row, t] + g * x[row, t - 1]
            torch.testing.assert_close(gate(x, STARTS)[row, t], expected, rtol=0, atol=1e-13)


def test_narrow_models_gate_on_what_they_have() -> None:
    assert PositionSmearGate(8).gate.shape == (1, 8)


def test_predecessor_is_zero_where_documents_begin() -> None:
    x = torch.arange(1.0, 11.0).reshape(2, 5, 1)
    assert predecessor(x).squeeze(-1).tolist() == [[0, 1, 2, 3, 4], [0, 6, 7, 8, 9]]
    assert predecessor(x, STARTS).squeeze(-1).tolist() == [[0, 1, 2, 0, 4], [0, 0, 7, 8, 9]]


def test_gates_pass_gradcheck() -> None:
    x = values(4).requires_grad_()
    published, document = SmearGate(4).double(), PositionSmearGate(4).double()
    gate, scale = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.tensor(0.4, dtype=torch.float64)
    scale.requires_grad_()
    call = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda x, g: call(published, {"gate": g}, (x,)), (x, gate))
    assert torch.autograd.gradcheck(
        lambda x, g, s: call(document, {"gate": g[None], "scale": s}, (x, STARTS)), (x, gate, scale)
    )
