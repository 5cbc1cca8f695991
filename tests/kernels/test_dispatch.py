"""Choice of a backend: preference, GOLF_BACKEND, fallbacks with their reasons."""

import logging
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from golf_kernels import dispatch, newton_schulz, xsa


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_members", {})
    monkeypatch.setattr(dispatch, "_logged", set())


def register(op, backend, *, problem=None, only_dtype=None):
    def supports(*args):
        if problem is not None:
            return problem
        if only_dtype is not None and args and args[0].dtype != only_dtype:
            return f"only {only_dtype}"
        return None

    dispatch.register(op, backend, lambda *args: (backend, *args), supports=supports)


def test_prefers_cpp_on_the_cpu_and_the_gpu_backends_on_cuda():
    for backend in ("torch", "triton", "cpp", "cuda"):
        register("op", backend)
    assert dispatch.choose("op", torch.zeros(1)).backend == "cpp"
    assert dispatch.choose("op", device="cuda").backend == "cuda"
    assert dispatch.choose("op", [torch.zeros(1)]).backend == "cpp"
    assert dispatch.available_backends("op") == ["cuda", "triton", "cpp", "torch"]


def test_call_runs_the_choice_and_run_on_the_backend_named():
    register("op", "torch")
    register("op", "cpp")
    tensor = torch.zeros(1)
    assert dispatch.call("op", tensor, 3) == ("cpp", tensor, 3)
    assert dispatch.run_on("torch", "op", tensor) == ("torch", tensor)
    with pytest.raises(dispatch.BackendError, match="op has no triton backend, only torch, cpp"):
        dispatch.run_on("triton", "op", tensor)


def test_falls_back_with_its_reason_and_logs_it_once(caplog):
    register("op", "torch")
    register("op", "cpp", only_dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="golf_kernels"):
        for _ in range(3):
            choice = dispatch.choose("op", torch.zeros(1, dtype=torch.float64))
    assert choice == ("torch", "cpp: only torch.float32")
    assert [record.getMessage() for record in caplog.records] == ["op: falling back from cpp: only torch.float32"]


def test_a_backend_for_another_device_is_no_fallback(caplog):
    register("op", "torch")
    register("op", "cuda", problem="no GPU")
    assert dispatch.choose("op", torch.zeros(1)) == ("torch", "default on cpu")
    assert not caplog.records


def test_a_triton_kernel_runs_only_where_it_is_named(monkeypatch, caplog):
    for backend in ("torch", "triton"):
        register("op", backend)
    assert dispatch.choose("op", device="cuda") == ("torch", "triton: not chosen: python -m golf_kernels tune")
    monkeypatch.setenv("GOLF_BACKEND", "op=triton")
    assert dispatch.choose("op", device="cuda") == ("triton", "forced by GOLF_BACKEND")
    monkeypatch.setenv("GOLF_BACKEND", "op=triton?")
    assert dispatch.choose("op", device="cuda") == ("triton", "preferred by GOLF_BACKEND")


def test_a_variant_of_a_backend_runs_only_where_it_is_named(monkeypatch):
    register("op", "torch")
    dispatch.register("op", "triton", lambda *args: "usual", variants={"big": lambda *args: "big"})
    assert dispatch.available_backends("op", "cuda") == ["triton", "torch"]
    monkeypatch.setenv("GOLF_BACKEND", "op=triton/big")
    assert dispatch.choose("op", device="cuda") == ("triton/big", "forced by GOLF_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.choose("op", torch.zeros(1)) == ("torch", "triton/big: named, but takes tensors on cuda, found cpu")
    assert dispatch.run_on("triton/big", "op") == "big" and dispatch.run_on("triton", "op") == "usual"
    assert dispatch.may_run("op", "triton", "op=triton/big?") and not dispatch.may_run("op", "triton/big", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.call("op", torch.zeros(1)) == "big"
    monkeypatch.setenv("GOLF_BACKEND", "op=triton/small")
    with pytest.raises(dispatch.BackendError, match="no triton/small backend, only triton, triton/big, torch"):
        dispatch.choose("op", device="cuda")
    monkeypatch.setenv("GOLF_BACKEND", "op=triton/small?")
    assert dispatch.choose("op", device="cuda").backend == "torch"


def test_a_preferred_backend_that_cannot_run_is_left_for_the_next(monkeypatch, caplog):
    register("op", "torch")
    register("op", "cpp", only_dtype=torch.float32)
    monkeypatch.setenv("GOLF_BACKEND", "op=cpp?")
    assert dispatch.choose("op", torch.zeros(1)) == ("cpp", "preferred by GOLF_BACKEND")
    wide = torch.zeros(1, dtype=torch.float64)
    assert dispatch.choose("op", wide).backend == "torch"
    assert "falling back from cpp: only torch.float32" in caplog.text
    monkeypatch.setenv("GOLF_BACKEND", "op=cpp")
    with pytest.raises(dispatch.BackendError, match=r"forces cpp for op, which cannot run: only torch\.float32"):
        dispatch.choose("op", wide)


def test_a_kernel_that_lost_on_the_gpu_does_not_keep_cpp_from_cpu_tensors(monkeypatch):
    for backend in ("torch", "cpp", "cuda"):
        register("op", backend)
    monkeypatch.setenv("GOLF_BACKEND", "op=torch?")
    assert dispatch.choose("op", torch.zeros(1)) == ("cpp", "default on cpu")
    assert dispatch.choose("op", device="cuda") == ("torch", "preferred by GOLF_BACKEND")
    monkeypatch.setenv("GOLF_BACKEND", "op=torch")
    assert dispatch.choose("op", torch.zeros(1)).backend == "torch"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch", {"int6_pack": "torch", "mlp": "torch"}),
        ("int6=torch", {"int6_pack": "torch", "mlp": "cpp"}),
        ("mlp=torch,int6=cpp", {"int6_pack": "cpp", "mlp": "torch"}),
        (" torch , int6_pack = cpp ", {"int6_pack": "cpp", "mlp": "torch"}),
        ("int6=cpp,int6_pack=torch", {"int6_pack": "torch", "mlp": "cpp"}),
    ],
)
def test_the_environment_forces(monkeypatch, value, expected):
    for op in ("int6_pack", "mlp"):
        register(op, "torch")
        register(op, "cpp")
    register("int6_unpack", "torch")
    dispatch.set_members("int6", ["int6_pack", "int6_unpack"])
    monkeypatch.setenv("GOLF_BACKEND", value)
    assert {op: dispatch.choose(op, torch.zeros(1)).backend for op in expected} == expected


@pytest.mark.parametrize("value", ["gpu", "op=gpu", "=torch", "op=", "torch,,op=torch"])
def test_an_unreadable_environment_is_refused(monkeypatch, value):
    register("op", "torch")
    monkeypatch.setenv("GOLF_BACKEND", value)
    with pytest.raises(dispatch.BackendError, match="expected a backend"):
        dispatch.choose("op", torch.zeros(1))


def test_a_misspelt_operator_is_refused_with_the_nearest(monkeypatch):
    register("newton_schulz", "torch")
    monkeypatch.setenv("GOLF_BACKEND", "newton_shulz=torch")
    with pytest.raises(dispatch.BackendError, match="did you mean 'newton_schulz'"):
        dispatch.choose("newton_schulz", torch.zeros(1))
    with pytest.raises(dispatch.BackendError, match="unknown operator 'newton'"):
        dispatch.choose("newton")


def test_forcing_what_cannot_run_raises_with_the_reason(monkeypatch):
    register("op", "torch")
    register("op", "cpp", only_dtype=torch.float32)
    register("op", "cuda", problem="not built: no nvcc")
    register("op", "triton")
    monkeypatch.setenv("GOLF_BACKEND", "op=cuda")
    with pytest.raises(dispatch.BackendError, match="not built: no nvcc"):
        dispatch.choose("op", torch.zeros(1))
    monkeypatch.setenv("GOLF_BACKEND", "op=cpp")
    with pytest.raises(dispatch.BackendError, match=r"only torch\.float32"):
        dispatch.choose("op", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv("GOLF_BACKEND", "op=triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", torch.zeros(1)).backend == "triton"


def test_forcing_a_gpu_backend_leaves_cpu_tensors_alone(monkeypatch, caplog):
    # int6 fake-quantizes on the GPU while a run trains, and packs on the CPU when it ends
    for backend in ("torch", "cpp", "cuda", "triton"):
        register("op", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for forced in ("cuda", "triton"):
        monkeypatch.setenv("GOLF_BACKEND", f"op={forced}")
        backend, reason = dispatch.choose("op", torch.zeros(1))
        assert backend == "cpp" and reason == f"{forced}: named, but takes tensors on cuda, found cpu"
        assert f"op: falling back from {forced}: takes tensors on cuda" in caplog.text
        assert dispatch.choose("op", device="cuda").backend == forced


def test_cuda_tensors_do_not_take_a_forced_cpu_backend(monkeypatch):
    for backend in ("torch", "cpp", "cuda"):
        register("op", backend)
    monkeypatch.setenv("GOLF_BACKEND", "op=cpp")
    with FakeTensorMode():
        assert dispatch.choose("op", torch.empty(1, device="cuda")).backend == "cuda"


def test_validate_finds_what_a_late_call_would(monkeypatch):
    register("early", "torch")
    register("early", "cpp")
    register("late", "torch")
    monkeypatch.setenv("GOLF_BACKEND", "cpp")
    assert dispatch.choose("early", torch.zeros(1)).backend == "cpp"
    with pytest.raises(dispatch.BackendError, match="late has no cpp backend, only torch"):
        dispatch.validate()
    monkeypatch.setenv("GOLF_BACKEND", "cpp,late=torch")
    dispatch.validate()


def test_describe_says_why_not():
    register("op", "torch")
    register("op", "cuda", problem="no GPU")
    assert dispatch.describe() == {"op": {"cuda": "no GPU", "torch": "available"}}
    assert dispatch.available_backends("op") == ["torch"]


def test_no_backend_for_the_device_raises():
    register("op", "cuda")
    with pytest.raises(dispatch.BackendError, match="no backend runs on cpu"):
        dispatch.choose("op", torch.zeros(1))
    with pytest.raises(ValueError, match="expected one of cuda"):
        dispatch.register("op", "opencl", lambda: None)


def test_autocast_does_not_reach_into_an_operator(monkeypatch):
    monkeypatch.undo()
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    plain = newton_schulz([matrix])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(newton_schulz([matrix])[0], plain)
        assert (matrix @ matrix.T).dtype == torch.bfloat16


def test_forward_mode_is_refused_and_gives_no_derivative_of_zero(monkeypatch):
    monkeypatch.undo()
    output, value = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 1, 4)
    for derivative in (torch.func.jvp, lambda function, x, t: torch.func.jacfwd(function)(*x)):
        with pytest.raises(RuntimeError, match="xsa has no forward-mode derivative"):
            derivative(lambda x: xsa(x, value), (output,), (output,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        xsa(torch.autograd.forward_ad.make_dual(output, output), value)
    assert xsa(output, value).shape == output.shape


def test_what_keeps_triton_kernels_from_running(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.triton_problem() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.triton_problem() == "PyTorch finds no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, plain, with_tma in (
        ((7, 5), "8.0", "9.0 for TMA"),
        ((8, 0), None, "9.0 for TMA"),
        ((8, 9), None, "9.0 for TMA"),
        ((9, 0), None, None),
        ((12, 0), None, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        for tma, needed in ((False, plain), (True, with_tma)):
            said = f"its Triton kernels need compute capability {needed}, this GPU has {capability[0]}.{capability[1]}"
            assert dispatch.triton_problem(tma=tma) == (said if needed else None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'triton>=3.6'" in dispatch.triton_problem()


def test_a_triton_kernel_may_run_only_where_it_is_named():
    for backend in ("torch", "triton", "cuda"):
        register("op", backend)
    answers = {
        text: [dispatch.may_run("op", backend, text) for backend in ("torch", "triton", "cuda")]
        for text in ("", "triton", "op=triton?", "op=cuda", "triton,op=torch")
    }
    # what is forced does not keep tensors elsewhere from the others
    usual, all_of_them = [True, False, True], [True, True, True]
    assert list(answers.values()) == [usual, all_of_them, all_of_them, usual, usual]
    with pytest.raises(dispatch.BackendError, match="cannot read 'op=fast'"):
        dispatch.may_run("op", "triton", "op=fast")


@pytest.mark.parametrize("before", [None, "", "op=cpp"])
def test_forcing_for_a_while(monkeypatch, before):
    register("op", "torch")
    register("op", "cpp")
    monkeypatch.delenv("GOLF_BACKEND", raising=False)
    if before is not None:
        monkeypatch.setenv("GOLF_BACKEND", before)
    with dispatch.forced("op=torch"):
        assert dispatch.choose("op", torch.zeros(1)) == ("torch", "forced by GOLF_BACKEND")
    with pytest.raises(dispatch.BackendError, match="op has no cuda backend"), dispatch.forced("op=cuda"):
        dispatch.choose("op", torch.zeros(1))
    assert os.environ.get("GOLF_BACKEND") == before
    with dispatch.forced(""):
        assert dispatch.choose("op", torch.zeros(1)) == ("cpp", "default on cpu")
