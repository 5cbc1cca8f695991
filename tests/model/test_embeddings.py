from __future__ import annotations

import pytest
import torch
from model_systems import narrow_config

from train.config import Config
from train.model.embeddings import BigramHash, TokenEmbedding, ValueEmbedding, bigram_hash, lookup, trigram_hash
from train.model.gpt import GPT
from train.model.parameters import mflop_per_token

# (token, predecessor) → row of a table of 2,048 rows
PUBLISHED = {
    (0, 0): 0, (1, 1): 11, (1, 2): 450, (2, 1): 435, (1023, 1023): 977, (1023, 0): 1290, (0, 1023): 1757,
    (17, 400): 1071, (940, 939): 297, (500, 700): 1181,
}  # fmt: skip


def test_bigram_rows_are_the_published_ones() -> None:
    ids = torch.tensor([[before, token] for token, before in PUBLISHED])
    assert bigram_hash(ids, 2048)[:, 1].tolist() == list(PUBLISHED.values())
    assert bigram_hash(ids, 2048)[:, 0].tolist() == [2047] * len(PUBLISHED)


def test_bigram_rows_of_the_largest_vocabulary_stay_inside_the_table() -> None:
    ids = torch.randint(0, 65536, (4, 200), generator=torch.Generator().manual_seed(0))
    rows = bigram_hash(ids, 4096)
    assert rows.min() >= 0 and rows[:, 1:].max() < 4095 and (rows[:, 0] == 4095).all()
    before, token = int(ids[2, 10]), int(ids[2, 11])
    assert rows[2, 11].item() == ((36313 * token) ^ (27191 * before)) % 4095


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_trigram_rows_follow_the_formula(length: int) -> None:
    ids = torch.randint(0, 65536, (2, length), generator=torch.Generator().manual_seed(length))
    rows = trigram_hash(ids, 512)
    assert rows.shape == ids.shape
    for row, tokens in zip(rows.tolist(), ids.tolist(), strict=True):
        expected = [
            511 if t < 2 else ((36313 * tokens[t]) ^ (27191 * tokens[t - 1]) ^ (51497 * tokens[t - 2])) % 511
            for t in range(length)
        ]
        assert row == expected


def test_trigrams_add_rows_of_the_same_table_and_no_parameter() -> None:
    torch.manual_seed(0)
    bigram = BigramHash(31, 3, 4, 2, orthogonal=True, dtype=torch.float32).double()
    both = BigramHash(31, 3, 4, 2, orthogonal=True, dtype=torch.float32, trigram=True).double()
    with torch.no_grad():
        bigram.embedding.copy_(torch.randn(31, 3))
    both.load_state_dict(bigram.state_dict())
    ids = torch.tensor([[7, 8, 9, 7]])
    added = bigram.scale * (bigram.embedding[trigram_hash(ids, 31)] @ bigram.proj.T)
    expected = bigram(ids, torch.float64) + added
    torch.testing.assert_close(both(ids, torch.float64), expected, rtol=0, atol=1e-13)


def test_lookup_gathers_gradients_in_the_wider_dtype() -> None:
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(300, dtype=torch.long)
    rows = lookup(table, ids, torch.float32)
    assert rows.dtype == torch.float32
    rows.sum().backward()
    # a running sum in bfloat16 would stop at 256
    assert table.grad[0].item() == 300 and table.grad[1].item() == 0
    assert lookup(table.detach().double(), ids, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_token_embedding_returns_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(20, 8, dtype)
    ids = torch.tensor([[3, 3, 19]])
    assert embedding.weight.dtype == dtype
    assert torch.equal(embedding(ids, torch.float32), embedding.weight.float()[ids])


def test_bigram_adds_nothing_at_first_and_its_table_learns() -> None:
    torch.manual_seed(0)
    bigram = BigramHash(64, 8, 16, 8, orthogonal=True, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, 3]])
    out = bigram(ids, torch.float32)
    assert out.shape == (1, 3, 16) and out.count_nonzero() == 0
    out.sum().backward()
    touched = bigram_hash(ids, 64).flatten()
    assert bigram.embedding.grad[touched].abs().sum() > 0
    # gain 1/√(2·8) on orthonormal columns of the 16 × 8 projection, rounded to bfloat16
    gram = bigram.proj.detach().T @ bigram.proj.detach()
    torch.testing.assert_close(gram, torch.eye(8) / 16, rtol=0, atol=1e-3)


def test_bigram_projection_is_not_zero_without_orthogonal_init() -> None:
    assert BigramHash(64, 8, 16, 8, orthogonal=False, dtype=torch.float32).proj.count_nonzero() > 100


def test_bigram_equals_the_formula_and_passes_gradcheck() -> None:
    torch.manual_seed(0)
    bigram = BigramHash(5, 3, 4, 2, orthogonal=True, dtype=torch.float32).double()
    ids = torch.tensor([[7, 8, 9], [9, 7, 7]])
    leaves = [torch.randn_like(weight, requires_grad=True) for weight in bigram.parameters()]
    names = [name for name, _ in bigram.named_parameters()]

    def run(*weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(bigram, dict(zip(names, weights, strict=True)), (ids, torch.float64))

    table, proj, scale = (dict(zip(names, leaves, strict=True))[name] for name in ("embedding", "proj", "scale"))
    expected = scale * (table[bigram_hash(ids, 5)] @ proj.T)
    torch.testing.assert_close(run(*leaves), expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(run, leaves)


def test_without_projection_the_rows_themselves_are_added() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[7, 8, 9]])
    bigram = BigramHash(5, 4, 4, 2, project=False, orthogonal=True, dtype=torch.float32).double()
    values = ValueEmbedding(16, 4, 4, (0, 1), project=False, orthogonal=True, dtype=torch.float32).double()
    assert [name for name, _ in bigram.named_parameters()] == ["embedding", "scale"]
    assert [name for name, _ in values.named_parameters()] == ["embedding", "scale", "layer_scales"]
    torch.nn.init.normal_(bigram.embedding)
    expected = 0.05 * bigram.embedding[bigram_hash(ids, 5)]
    # the scales start as bfloat16 values
    torch.testing.assert_close(bigram(ids, torch.float64), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(values(ids, torch.float64), 0.1 * values.embedding[ids], rtol=2e-3, atol=0)


@pytest.mark.parametrize(("embed_proj", "projections"), [("always", 2), ("needed", 0)])
def test_equal_widths_need_no_projection(embed_proj: str, projections: int) -> None:
    equal = narrow_config("sp8192", bigram_vocab_size=41, bigram_dim=32, ve_dim=16, embed_proj=embed_proj)
    assert (equal.bigram_dim, equal.ve_dim) == (equal.model_dim, equal.kv_dim)
    other = equal.replace(bigram_dim=16, ve_dim=32)
    for config, expected in ((equal, projections), (other, 2)):
        names = [name for name, _ in GPT(config).named_parameters() if name.endswith(".proj")]
        assert len(names) == expected
    # a file without the setting has projections
    assert Config.from_dict({"bigram_dim": 32}).embed_proj == "always"
    difference = mflop_per_token(equal.replace(embed_proj="always"), recurrence=False) - mflop_per_token(
        equal, recurrence=False
    )
    assert difference == pytest.approx(0 if projections else 6 * (32 * 32 + 16 * 16) / 1e6)


def test_value_embedding_is_shared_and_scaled_by_layer() -> None:
    torch.manual_seed(0)
    ve = ValueEmbedding(20, 6, 4, (2, 5), orthogonal=True, dtype=torch.float32).double()
    ve.layer_scales.data.copy_(torch.tensor([2.0, -3.0]))
    ids = torch.tensor([[3, 4, 19]])
    shared = ve(ids, torch.float64)
    torch.testing.assert_close(shared, ve.scale * (ve.embedding[ids] @ ve.proj.T), rtol=0, atol=1e-14)
    assert ve.scale.item() == pytest.approx(0.1, rel=2**-8)
    assert torch.equal(ve.of_layer(2, shared), 2 * shared)
    assert torch.equal(ve.of_layer(5, shared), -3 * shared)
    assert ve.of_layer(3, shared) is None


def test_value_embedding_starts_as_published() -> None:
    torch.manual_seed(0)
    ve = ValueEmbedding(3000, 8, 4, (0,), orthogonal=True, dtype=torch.bfloat16)
    assert ve.embedding.detach().float().std().item() == pytest.approx(0.01, rel=2e-2)
    proj = ve.proj.detach()
    torch.testing.assert_close(proj @ proj.T, torch.eye(4), rtol=0, atol=2e-2)
    assert ValueEmbedding(30, 8, 4, (0,), orthogonal=False, dtype=torch.bfloat16).proj.count_nonzero() == 0


def test_value_embedding_passes_gradcheck() -> None:
    torch.manual_seed(0)
    ve = ValueEmbedding(5, 3, 4, (1,), orthogonal=True, dtype=torch.float32).double()
    names = [name for name, _ in ve.named_parameters()]
    leaves = [torch.randn_like(weight, requires_grad=True) for weight in ve.parameters()]
    ids = torch.tensor([[0, 4, 4]])

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ve = ve

        def forward(self) -> torch.Tensor:
            return self.ve.of_layer(1, self.ve(ids, torch.float64))

    def run(*weights: torch.Tensor) -> torch.Tensor:
        named = {f"ve.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Layer(), named, ())

    assert torch.autograd.gradcheck(run, leaves)
