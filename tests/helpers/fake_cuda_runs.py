"""Tests that run the model on a CUDA device whose tensors have no data.

`test_fake_cuda.py` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_cuda import CUDA, GRAPHS, Batches, Graph, empty, gpu_config, gpu_model, recorded_capture
from host_traffic import NoHostCopies
from model_systems import SYSTEMS, block_matrices
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.computed.fake_cuda import tensors_without_data
from benchmarks.computed.launches import launch_case, on_backend
from benchmarks.measure.common import relative_error
from golf_kernels import dispatch, operators
from golf_kernels.muon import Muon
from train.common.distributed import Ranks
from train.data.dataset import Dataset
from train.data.shards import write_shard
from train.evaluate import scoring
from train.evaluate.windows import group_windows, plan_windows
from train.loop import training_step
from train.model.attention_backends import causal_attention
from train.model.attention_choice import use_attention
from train.model.compile import write_out
from train.model.decoder import Decoder
from train.model.documents import Documents
from train.optimize.averaging import EMA, SWA
from train.optimize.groups import build_optimizers
from train.quantize.calibrate import collect_hessians, plain_graph
from train.quantize.tensors import matrices_to_calibrate

# a real cuDNN may refuse shapes this small
ATTENTION = ("sdpa", "flash", "math", *(["cudnn"] if torch.version.cuda is None else []))


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTensorMode]:
    with tensors_without_data() as mode:
        yield mode


@pytest.mark.parametrize(
    ("system", "changes"),
    [
        *((system, {}) for system in SYSTEMS),
        ("sp8192", {"document_masking": True, "qat": True, "matrix_bits": 6}),
    ],
)
def test_a_training_step_stays_on_the_gpu(system: str, changes: dict[str, Any]) -> None:
    config = gpu_config(system, **changes)
    model = gpu_model(config)
    optimizers = build_optimizers(model, config)
    ema, swa = EMA(model, 0.99), SWA(model, 1, 2.0)
    for recurrence in sorted({False, bool(config.recur_layers)}):
        for called in (frozenset(), frozenset(dispatch.describe())):
            write_out(model, called)
            with NoHostCopies():
                loss = training_step(optimizers, model, Batches(), recurrence, 1.0, 0.95)
                ema.update()
                swa.update(1, 1.0)
            assert loss.device == CUDA and loss.dtype == torch.float32 and loss.shape == ()
    for average in (ema, swa):
        assert {tensor.device for tensor in average.average().values()} == {CUDA}
        average.apply()
    moments = [moment for part in optimizers.state_dict().values() for of in part.values() for moment in of.values()]
    assert moments and {moment.device for moment in moments} == {CUDA}


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("masked", [False, True])
def test_every_attention_goes_forward_and_backward(backend: str, masked: bool) -> None:
    config = gpu_config("sp8192", document_masking=masked)
    model = gpu_model(config)
    use_attention(model, backend)
    ids = torch.zeros(2, 16, dtype=torch.int64, device=CUDA)
    model(ids, ids, recurrence=False).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.device == CUDA for gradient in gradients.values())
    with torch.no_grad():
        assert model.hidden(ids, recurrence=True, rows_from=11).shape == (2, 5, config.model_dim)


@torch.no_grad()
def test_a_text_grows_token_by_token() -> None:
    config = gpu_config("sp4096")
    decoder = Decoder(gpu_model(config).eval(), 3, 5, recurrence=True)
    for _ in range(5):
        logits = decoder.step(torch.zeros(3, 1, dtype=torch.int64, device=CUDA))
        assert logits.shape == (3, config.vocab_size) and logits.device == CUDA


def test_a_mask_on_a_gpu_meets_a_key_head_for_every_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.extend((query.shape, key.shape, value.shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = (empty(2, 9, count, 16) for count in (4, 2, 2))
    for documents in (Documents(empty(2, 9, dtype=torch.bool)), None):
        assert causal_attention(q, k, v, documents=documents).shape == q.shape
    assert seen == [(2, 4, 9, 16)] * 4 + [(2, 2, 9, 16)] * 2


@pytest.fixture
def no_host_copies(fake: FakeTensorMode) -> Iterator[None]:
    with NoHostCopies():
        yield


@pytest.mark.usefixtures("no_host_copies")
@pytest.mark.parametrize("name", [name for name in operators.declared() if name != "int6"])
def test_references_compute_on_a_gpu_what_their_fake_implementations_say(name: str) -> None:
    operator = operators.declared()[name]
    said = launch_case(operator, {}, empty)
    with on_backend("torch"):
        found = launch_case(operator, {}, empty)
    assert {result.device for result in (*said, *found)} == {CUDA}
    assert [(result.shape, result.dtype) for result in found] == [(result.shape, result.dtype) for result in said]


@torch.no_grad()
@pytest.mark.usefixtures("no_host_copies")
def test_int6_computes_on_a_gpu_what_it_says() -> None:
    # packing is left out, because it reads its codes on the host
    packed, scales = empty(27, dtype=torch.uint8), empty(5, dtype=torch.float16)
    codes = dispatch.run_on("torch", "int6_unpack", packed, 35)
    (values,) = dispatch.run_on("torch", "int6_dequantize", [packed], [scales], [7], torch.bfloat16)
    fake = dispatch.run_on("torch", "int6_fake_quantize", empty(5, 7, dtype=torch.float32), scales)
    assert [(r.device, r.dtype, tuple(r.shape)) for r in (codes, values, fake)] == [
        (CUDA, torch.int8, (35,)),
        (CUDA, torch.bfloat16, (5, 7)),
        (CUDA, torch.float32, (5, 7)),
    ]


@pytest.mark.usefixtures("no_host_copies")
def test_the_places_of_documents_are_on_the_gpu() -> None:
    # a library for documents of different lengths gets these offsets
    assert Documents(empty(2, 70, dtype=torch.bool)).offsets().device == CUDA


@pytest.mark.parametrize(
    ("system", "stride", "known"),
    [("sp4096", 4, True), ("sp8192", 4, False), ("sp8192", 0, False), ("sp2048", 4, False)],
)
@torch.no_grad()
def test_an_evaluation_is_captured_once_per_shape_and_never_asks(
    system: str, stride: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    GRAPHS.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded_capture)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = gpu_config(system, compile="on", eval_stride=stride)
    model = gpu_model(config).eval()
    tokens = np.full(203, 5, dtype=np.uint16)
    mask = np.zeros(202, dtype=bool) if known else None
    shares = stride > 0 and model.overlap_problem is None
    scorer = scoring._Scorer(
        model, tokens, np.full(202, 2, np.uint16), config, 16, bool(config.recur_layers), shares, mask
    )
    assert scorer.graphs
    plan = plan_windows(202, 16, stride)
    groups = group_windows(plan, 16, stride)
    scored = [list(scorer.score(windows, rows_from, 3)) for windows, rows_from in groups]
    assert sum(map(sum, scored)) == plan.scored
    # the first batch runs without a graph; the second is captured; it and all later ones are replays
    assert [graph.replays for graph in GRAPHS] == [len(counts) - 1 for counts in scored if len(counts) > 2]
    assert GRAPHS and scorer.nll_sum.device == scorer.byte_sum.device == CUDA


def test_batches_travel_as_16_bits_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    moved: list[tuple[torch.dtype, bool]] = []
    to = Tensor.to

    def watched(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if any(tensor is one for one in pinned):
            moved.append((tensor.dtype, options["non_blocking"]))
        return to(tensor, *arguments, **options)

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", watched)
    write_shard(tmp_path / "made_train_000000.bin", np.arange(1000, dtype=np.uint16) % 259)
    config = gpu_config("baseline", data_path=str(tmp_path))
    loader = Dataset(config).loader(Ranks(world_size=4, device=CUDA))
    for _ in range(2):
        batches = loader.next_batch()
        assert [part.device for batch in batches for part in batch] == [CUDA] * 4
        assert {(part.dtype, part.is_contiguous()) for batch in batches for part in batch} == {(torch.int64, True)}
    assert moved == [(torch.int16, True)] * 4


@torch.no_grad()
def test_calibration_sums_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: id(tensor))
    config = gpu_config("sp4096", compile="off")
    model = gpu_model(config)
    names = matrices_to_calibrate(model, config.replace(passthrough_max_elements=16))
    ids = torch.zeros(2, 16, dtype=torch.int64, device=CUDA)
    hessians = collect_hessians(model, [ids, ids], names, recurrence=True)
    assert sorted(hessians) == sorted(names)
    assert {(hessian.device, hessian.dtype) for hessian in hessians.values()} == {(CUDA, torch.float32)}
    plain = collect_hessians(plain_graph(model), [ids], names, recurrence=False)
    assert {hessian.device for hessian in plain.values()} == {CUDA}


@pytest.fixture
def eight_ranks(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Rank 0 of eight. The collectives move no data."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield Ranks(0, 0, 8, CUDA, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("system", ["sp2048", "sp8192"])
def test_eight_ranks_exchange_tensors_of_the_gpu(system: str, eight_ranks: Ranks) -> None:
    config = gpu_config(system)
    model = gpu_model(config)
    eight_ranks.copy_from(0, model.parameters())
    optimizers = build_optimizers(model, config, eight_ranks.group)
    for _ in range(2):
        training_step(optimizers, model, Batches(), False, 1.0, 0.95)
    assert optimizers.muon
    own = {parameter for group in optimizers.muon.param_groups for parameter in group["params"]}
    assert 0 < len(own) < len(block_matrices(model))
    assert {parameter.device for parameter in model.parameters()} == {CUDA}
    weights = [torch.nn.Parameter(empty(*shape, dtype=torch.float32)) for shape in ((8, 5), (3, 5, 8), (6, 6))]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    Muon(weights, process_group=eight_ranks.group).step()


def test_a_result_is_compared_where_the_truth_is() -> None:
    for got, want in ((empty(3), torch.zeros(3, dtype=torch.float64)), (torch.zeros(3), empty(3))):
        # this error means that the comparison asked for a number; two devices in one operation would raise another
        # error
        with pytest.raises(DataDependentOutputException):
            relative_error([got], [want])
