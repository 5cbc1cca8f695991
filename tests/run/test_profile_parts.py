"""The model's parts in a profile: ranges of a plain model, ranges that compiled code opens, and whose a kernel is."""

from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn
from torch._functorch import config as autograd_config
from torch._inductor import config, debug
from torch._inductor.codegen import common
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from train.run.profile_parts import KernelRanges, module_of, name_compiled_kernels, named_ranges, part_of
from train.run.profiling import breakdown, kernel_times, new_trace, part_times

CPU = torch.device("cpu")


@pytest.fixture
def own_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which no model was compiled, and to which a code generator's changes do not last."""
    common.init_backend_registration()
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(common.device_codegens, device, common.device_codegens[device])
    torch._dynamo.reset()
    name_compiled_kernels.cache_clear()
    with config.patch({"trace.provenance_tracking_level": 0}), autograd_config.patch(enable_autograd_cache=True):
        yield
    name_compiled_kernels.cache_clear()
    torch._dynamo.reset()


def test_ranges_end_with_their_context_and_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(2, 2), Broken())
    with new_trace(CPU) as trace, named_ranges(model):
        with pytest.raises(RuntimeError, match="broken"):
            model(torch.ones(1, 2))
        model[0](torch.ones(1, 2))
    assert {event.key: event.count for event in trace.key_averages()}["0"] == 2
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def two_products() -> nn.Module:
    """Products alone: Inductor asks no C++ compiler."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(7, 6, bias=False), nn.Linear(6, 5, bias=False))
    return nn.Sequential(nn.Linear(8, 7, bias=False), inner)


def ranges_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The user's ranges of one forward and backward pass, in their order, each with what was multiplied in it."""
    model(x).sum().backward()
    with new_trace(CPU) as trace:
        model(x).sum().backward()
    found = []
    for event in trace.events():
        if event.name == "aten::mm":
            around = event.cpu_parent
            while around is not None and not (around.is_user_annotation and not around.name.startswith(("#", "T"))):
                around = around.cpu_parent
            found.append("" if around is None else around.name)
    return found


def test_compiled_kernels_get_their_parts_names_forward_and_backward(own_code_generator: None) -> None:
    model, x = two_products(), torch.randn(4, 8, requires_grad=True)
    plain = torch.compile(model, fullgraph=True, dynamic=False)
    assert set(ranges_of(plain, x)) == {""}
    # neither Dynamo's code nor the compile cache's may come back
    torch._dynamo.reset()
    assert name_compiled_kernels("cpu") is None
    assert name_compiled_kernels("cpu") is None
    named = torch.compile(model, fullgraph=True, dynamic=False)
    found = ranges_of(named, x)
    assert found[:3] == ["0", "1.0", "1.1"]
    backward = found[3:]
    assert [name for number, name in enumerate(backward) if backward[:number].count(name) == 0] == [
        "1.1 backward", "1.0 backward", "0 backward",
    ]  # fmt: skip
    assert len(backward) == 6
    x.grad = None
    named(x).square().sum().backward()
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.gpu
def test_a_gpus_kernels_are_counted_by_part(own_code_generator: None) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Sequential(nn.GELU(), nn.Linear(512, 512))).cuda()
    assert name_compiled_kernels("cuda") is None
    named, x = torch.compile(model, fullgraph=True, dynamic=False), torch.randn(4096, 512, device="cuda")
    named(x).sum().backward()
    with new_trace(torch.device("cuda")) as trace:
        named(x).sum().backward()
        torch.cuda.synchronize()
    times = breakdown(part_times(trace), 1, str)
    whole = sum(microseconds for _, microseconds in kernel_times(trace)) / 1e3
    assert sum(times.values()) == pytest.approx(whole)
    assert {"0", "1.1", "1.1 backward"} <= set(times) and times["elsewhere"] < whole / 2


def test_without_a_profiler_no_range_is_opened() -> None:
    ranges = KernelRanges()
    ranges.part("blocks.0")
    assert ranges._range is None
    with new_trace(CPU) as trace:
        ranges.part("blocks.0")
        ranges.part("blocks.1")
        ranges.part("")
    assert [event.name for event in trace.events() if event.is_user_annotation] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("owner", "lacking"),
    [
        (common, "device_codegens"), (PythonWrapperCodegen, "write_provenance_debug_handle"),
        (debug, "_inductor_triton_kernel_to_post_grad_node_info"),
    ],
)  # fmt: skip
def test_another_code_generator_is_a_reason_and_no_crash(
    own_code_generator: None, owner: object, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = common.device_codegens["cpu"]
    with monkeypatch.context() as patch:
        patch.delattr(owner, lacking)
        problem = name_compiled_kernels("cpu")
    assert problem and torch.__version__ in problem and lacking in problem
    assert common.device_codegens["cpu"] is before and config.trace.provenance_tracking_level == 0


def made_nodes(*described: tuple[str, str, bool]) -> list[fx.Node]:
    """Nodes of a graph: module's name, "forward" or "backward", and whether it is a view."""
    graph = fx.Graph()
    nodes = []
    for module, direction, view in described:
        target = torch.ops.aten.view.default if view else torch.ops.aten.mul.Tensor
        nodes.append(node := graph.call_function(target))
        if module:
            stack = {"root": ("L['self']", nn.Module), "leaf": (f"L['self'].{module}", nn.Module)}
            node.meta["nn_module_stack" if direction == "forward" else "fwd_nn_module_stack"] = stack
    return nodes


@pytest.mark.parametrize(
    ("described", "part"),
    [
        ([("blocks.3.mlp", "forward", False)], "blocks.3.mlp"),
        ([("blocks.3.mlp", "backward", False)], "blocks.3.mlp"),
        # a view of the last part's result is no work of that part, unless there is no other name
        ([("blocks.3", "forward", False), ("blocks.2.mlp", "forward", True)], "blocks.3"),
        ([("", "forward", False), ("blocks.2.mlp", "forward", True)], "blocks.2.mlp"),
        ([("blocks.3", "forward", False), ("blocks.3.mlp", "forward", False)], "blocks.3"),
        ([("blocks.1", "forward", False), ("blocks.10.mlp", "forward", False)], "blocks.1 + blocks.10.mlp"),
        ([("skips", "forward", False), ("", "forward", False), ("head", "backward", False)], "head + skips"),
        ([(name, "forward", False) for name in ("ve", "skips", "head", "smear")], "head + 3 more"),
        ([("", "forward", False)], "model"),
        ([], "model"),
    ],
)
def test_a_kernel_belongs_to_the_parts_whose_arithmetic_it_does(
    described: list[tuple[str, str, bool]], part: str
) -> None:
    assert part_of(made_nodes(*described)) == part


def test_the_name_of_the_variable_that_held_the_model_is_no_part() -> None:
    (node,) = made_nodes(("blocks.0", "forward", False))
    assert module_of(node) == "blocks.0"
    node.meta["nn_module_stack"] = {"root": ("L['published']", nn.Module)}
    assert module_of(node) == ""
