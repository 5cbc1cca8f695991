"""Every attention backend against the softmax written out; libraries that need a Hopper GPU are stood in for."""

from __future__ import annotations

import itertools
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from train.common.errors import UserError
from train.config import Config
from train.model import attention_backends
from train.model.attention_backends import BACKENDS, causal_attention, load_library
from train.model.attention_choice import check_attention, choose_attention, use_attention
from train.model.documents import Documents
from train.model.gpt import GPT

CPU = torch.device("cpu")
ON_CPU = sorted(name for name, backend in BACKENDS.items() if backend.problem(CPU, torch.float64, 8, True) is None)


def heads(count: int, *, seed: int, length: int = 7, dim: int = 6) -> torch.Tensor:
    return torch.randn(2, length, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h // group].T / math.sqrt(q.shape[-1])
            weights = torch.where(allowed[b], scores.exp(), torch.zeros_like(scores))
            out[b, :, h] = weights / weights.sum(-1, keepdim=True) @ v[b, :, h // group]
    return out


class FlashLibrary(types.ModuleType):
    """The two functions of a FlashAttention release, by the formula: `(B, T, H, D)`, and pieces of one long row."""

    def __init__(self, *, with_sums: bool) -> None:
        super().__init__("flash")
        self.with_sums = with_sums

    def _result(self, output: torch.Tensor) -> object:
        return (output, output.sum(-1)) if self.with_sums else output

    def flash_attn_func(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> object:
        assert causal
        rows, length = q.shape[1], k.shape[1]
        allowed = torch.ones(q.shape[0], rows, length, dtype=torch.bool).tril(length - rows)
        return self._result(softmax_attention(q, k, v, allowed))

    def flash_attn_varlen_func(
        self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal
    ) -> object:  # fmt: skip
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        output = torch.full_like(q, math.nan)
        for begin, end in itertools.pairwise(cu_seqlens_q.tolist()):
            assert end - begin <= max_seqlen_q == max_seqlen_k
            piece = slice(int(begin), int(end))
            allowed = torch.ones(1, int(end - begin), int(end - begin), dtype=torch.bool).tril()
            output[piece] = softmax_attention(q[None, piece], k[None, piece], v[None, piece], allowed)[0]
        return self._result(output)


@pytest.fixture(params=[*ON_CPU, "fa3", "fa3 with sums"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    library = FlashLibrary(with_sums=request.param == "fa3 with sums")
    monkeypatch.setattr(attention_backends, "_library", lambda name, **_: library)
    return request.param.split()[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_softmax_over_the_past_in_groups(backend: str, kv_heads: int) -> None:
    q, k, v = heads(4, seed=0), heads(kv_heads, seed=1), heads(kv_heads, seed=2)
    allowed = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    found = causal_attention(q, k, v, backend=backend)
    torch.testing.assert_close(found, softmax_attention(q, k, v, allowed), rtol=0, atol=1e-12)


def test_documents_bound_attention(backend: str) -> None:
    ids = torch.full((2, 70), 5)
    ids[0, 0] = ids[0, 33] = ids[1, 2] = ids[1, 69] = 1
    q, k, v = (heads(count, seed=seed, length=70) for seed, count in enumerate((4, 2, 2)))
    documents = Documents.of(ids)
    found = causal_attention(q, k, v, documents=documents, backend=backend)
    torch.testing.assert_close(found, softmax_attention(q, k, v, documents.mask()[:, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("asks_for_groups", [False, True])
def test_pytorchs_flash_attention_takes_documents_by_length(
    asks_for_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(q, k, v, begins, key_begins, longest, longest_key, *, window_size):  # type: ignore[no-untyped-def]
        assert window_size == (-1, 0)
        return FlashLibrary(with_sums=False).flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=begins, cu_seqlens_k=key_begins, max_seqlen_q=longest, max_seqlen_k=longest_key, causal=True
        )  # fmt: skip

    def with_groups(*given, enable_gqa=False, window_size):  # type: ignore[no-untyped-def]
        assert enable_gqa
        return attend(*given, window_size=window_size)

    # the newer signature, and the older one
    library = types.SimpleNamespace(varlen_attn=with_groups if asks_for_groups else attend)
    monkeypatch.setattr(attention_backends.importlib, "import_module", lambda name, **_: library)
    monkeypatch.setattr(attention_backends, "_libraries", {})
    ids = torch.full((2, 70), 5)
    ids[0, 0] = ids[0, 33] = ids[1, 2] = ids[1, 69] = 1
    q, k, v = (heads(count, seed=seed, length=70).requires_grad_() for seed, count in enumerate((4, 2, 2)))
    documents = Documents.of(ids)
    found = causal_attention(q, k, v, documents=documents, backend="flash")
    wanted = softmax_attention(q, k, v, documents.mask()[:, 0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), (q, k, v)) for output in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_pytorchs_flash_attention_compiles_with_documents_into_one_graph() -> None:
    seen: list[str] = []

    def counted(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return causal_attention(q, k, v, documents=Documents(starts), backend="flash")

    load_library("flash")
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=counted, bw_compiler=counted))
    # tensors without data, as the kernel itself needs a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, 70, count, 16, dtype=torch.bfloat16, requires_grad=True) for count in (4, 2, 2))
        found = compiled(q, k, v, torch.zeros(2, 70, dtype=torch.bool))
        found.sum().backward()
        assert found.shape == q.shape and k.grad is not None and k.grad.shape == v.shape
    kernels = [name for name in seen if "varlen" in name]
    assert kernels == ["torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"]


def test_flash_takes_heads_that_are_too_large_for_its_lengths_by_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_library", lambda name, **_: pytest.fail("called with 257 dimensions"))
    monkeypatch.setattr(attention_backends, "_sdpa_by", lambda kernel: attention_backends._sdpa)
    query, key, value = (heads(count, seed=count, dim=257) for count in (4, 2, 2))
    ids = torch.tensor([[1, 5, 6, 1, 7, 8, 9], [1, 5, 6, 7, 8, 1, 9]])
    documents = Documents.of(ids)
    found = BACKENDS["flash"].run(query, key, value, documents)
    torch.testing.assert_close(found, BACKENDS["sdpa"].run(query, key, value, documents))


@pytest.mark.parametrize("masked", [False, True])
def test_fewer_queries_than_keys_are_the_last_ones(backend: str, masked: bool) -> None:
    q, k, v = (heads(count, seed=seed, length=9) for seed, count in enumerate((4, 2, 2)))
    documents = Documents.of(torch.tensor([[1, 5, 5, 5, 1, 5, 5, 1, 5], [5] * 9])) if masked else None
    whole = causal_attention(q, k, v, documents=documents, backend="math")
    last = causal_attention(q[:, 6:], k, v, documents=documents, backend=backend)
    torch.testing.assert_close(last, whole[:, 6:], rtol=0, atol=1e-12)


def test_repeated_heads_are_those_that_their_queries_share() -> None:
    q, k, v = (heads(count, seed=seed).transpose(1, 2) for seed, count in enumerate((6, 2, 2)))
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    repeated = (attention_backends.repeat_heads(tensor, 6) for tensor in (k, v))
    found = F.scaled_dot_product_attention(q, *repeated, attn_mask=allowed)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_queries_on_a_gpu_take_a_backend_that_supports_the_shapes(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, rows, count, 16, device="cuda", dtype=dtype) for rows, count in ((3, 4), (9, 2), (9, 2))
        )
        found = causal_attention(q, k, v)
        assert found.shape == q.shape and found.dtype == dtype and found.device == q.device


@pytest.mark.gpu
def test_fewer_queries_on_a_gpu_are_the_last_ones() -> None:
    q, k, v = (heads(count, seed=seed, length=96, dim=64).cuda() for seed, count in enumerate((4, 2, 2)))
    whole = causal_attention(q, k, v, backend="math")[:, 70:]
    attend = torch.compile(lambda q, k, v: causal_attention(q, k, v), fullgraph=True)
    for run in (causal_attention, attend):
        last = run(q[:, 70:].bfloat16(), k.bfloat16(), v.bfloat16())
        torch.testing.assert_close(last.double(), whole, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("masked", [False, True])
def test_a_backend_compiles_into_one_graph(name: str, masked: bool) -> None:
    documents = Documents.of(torch.tensor([[1, 5, 1, 5, 5]] * 2)) if masked else None
    q, k, v = (heads(count, seed=seed, length=5).float() for seed, count in enumerate((4, 2, 2)))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return causal_attention(q, k, v, documents=documents, backend=name)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), rtol=0, atol=1e-6)


def test_a_library_is_imported_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    name, module = "fa3", "flash_attn_interface"

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return causal_attention(q, k, v, backend="math")

    library = types.ModuleType(module)
    library.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, module, library)
    monkeypatch.setattr(attention_backends, "_libraries", {})
    # as on a rank that was only told which backend the first one had chosen
    use_attention(GPT(Config(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1)), name)
    q, k, v = (heads(count, seed=seed, length=5).float() for seed, count in enumerate((4, 2, 2)))
    attend = torch.compile(lambda q, k, v: causal_attention(q, k, v, backend=name), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(attend(q, k, v), causal_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_a_library_that_breaks_while_it_loads_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise AttributeError(f"{module} wants another torch")

    monkeypatch.setattr(attention_backends.importlib, "import_module", broken)
    monkeypatch.setattr(attention_backends, "_libraries", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    problem = BACKENDS[name].problem(torch.device("cuda"), torch.bfloat16, 64, True)
    assert "cannot be loaded: AttributeError: flash_attn" in problem and "wants another torch" in problem


def test_only_a_run_that_names_fa3_downloads_it_and_then_a_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Hub(types.ModuleType):
        # the library refuses a call without a version or a revision since 0.15; a version is a branch, which moves
        def get_kernel(self, repository: str, *, revision: str) -> None:
            asked.append((repository, revision))
            raise Exception("no route to the hub\nand a long trace")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "kernels", Hub("kernels"))
    monkeypatch.setattr(attention_backends, "_libraries", {})
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    problem = check_attention(Config(device="cuda"), cuda)["fa3"]
    assert asked == [] and problem.endswith("pip install kernels and set ATTENTION=fa3 to download it")
    with pytest.raises(UserError) as error:
        choose_attention(Config(device="cuda", attention="fa3"), cuda, 1)
    said = "attention: fa3 cannot run: kernels-community/flash-attn3 cannot be loaded: Exception: no route to the hub: inst"
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    ((repository, revision),) = asked
    assert repository == "kernels-community/flash-attn3" and re.fullmatch("[0-9a-f]{40}", revision)
    # as on a rank that was only told which backend the first one had chosen
    with pytest.raises(UserError, match="attention: fa3 cannot run: kernels-community"):
        load_library("fa3")
    # a GPU that cannot run it downloads nothing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="fa3 cannot run: needs a Hopper GPU"):
        check_attention(Config(device="cuda", attention="fa3"), cuda)
    assert len(asked) == 2


def test_unknown_backend_is_named() -> None:
    q = heads(2, seed=0)
    with pytest.raises(ValueError, match=r"'flash9'.*sdpa"):
        causal_attention(q, q, q, backend="flash9")


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "capability", "said"),
    [
        ("fa3", torch.float32, 64, (9, 0), "bfloat16 or float16, not float32"),
        ("flash", torch.bfloat16, 4, (9, 0), "multiple of 8, not 4"),
        ("fa3", torch.bfloat16, 64, (8, 0), "Hopper"),
        ("fa3", torch.bfloat16, 64, (9, 0), "install FlashAttention 3"),
        ("fa4", torch.bfloat16, 64, (9, 0), "pip install flash-attn-4"),
    ],
)
def test_what_a_gpu_backend_needs(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_backends, "_library", lambda name, **_: ImportError("No module named 'x'"))
    assert said in BACKENDS[name].problem(torch.device("cuda"), dtype, head_dim, True)


@pytest.mark.gpu
def test_every_backend_that_runs_agrees_with_the_formula_on_the_gpu() -> None:
    device = torch.device("cuda")
    config = Config(train_seq_len=512, device="cuda", document_masking=True)
    q, k, v = (
        torch.randn(2, 512, count, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for count in (8, 4, 4)
    )
    starts = torch.rand(2, 512, device=device) < 1 / 100
    for documents in (None, Documents(starts)):
        exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
        expected = causal_attention(*exact, documents=documents, backend="math")
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        for name, problem in check_attention(config, device).items():
            if problem is not None:
                continue
            found = causal_attention(q, k, v, documents=documents, backend=name)
            gradients = torch.autograd.grad(found.square().sum(), (q, k, v))
            for ours, truth in zip((found, *gradients), (expected, *wanted), strict=True):
                error = (ours.double() - truth).norm() / truth.norm()
                assert error < 0.02, (name, float(error))
    assert choose_attention(config, device, 2).name in BACKENDS


@pytest.mark.parametrize("length", [7, attention_backends._LONG_ON_CPU])
def test_short_sequences_in_bfloat16_are_computed_in_float32_on_a_cpu(length: int) -> None:
    query, key, value = (
        heads(count, seed=count, length=length, dim=8).bfloat16().requires_grad_() for count in (4, 2, 1)
    )
    value = value.expand(-1, -1, 2, -1)
    output = causal_attention(query, key, value)
    allowed = torch.ones(2, length, length, dtype=torch.bool).tril()
    exact = softmax_attention(query.double(), key.double(), value.double(), allowed)
    assert output.dtype == torch.bfloat16
    # rounded once, to bfloat16, where the sequence is short
    assert torch.equal(output, exact.bfloat16()) == (length < attention_backends._LONG_ON_CPU)
    torch.testing.assert_close(output.double(), exact, rtol=0.02, atol=0.02)
    output.float().square().sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.bfloat16
