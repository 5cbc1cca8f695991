"""Muon and Newton-Schulz on DTensors take the steps of plain tensors."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from muon_truth import Launches, assert_close, parameters, set_gradients, train

from golf_kernels import Muon, newton_schulz

# 7 rows and 5 columns are uneven on two ranks; of one row, the second rank has nothing
SHAPES = ((7, 12), (12, 5), (6, 10), (1, 4), (3, 6, 10))
OPTIONS = {"lr": 0.02, "row_normalize": True, "normuon": True}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(parameters(SHAPES))

    def forward(self, gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def run_rank(rank, ranks, store, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    def whole(tensors):
        return [t.detach().full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]

    mesh = init_device_mesh("cpu", (ranks,))
    model = fully_shard(Model(), mesh=mesh)
    optimizer = Muon(model.parameters(), **OPTIONS)
    plain = parameters(SHAPES)
    with Launches() as launches:
        for step in range(3):
            set_gradients(plain, step)
            optimizer.zero_grad()
            model([p.grad for p in plain]).backward()
            optimizer.step()
    found = {"fsdp": whole(model.parameters()), "sizes": launches.sizes}
    state = optimizer.state_dict()["state"]
    assert all(isinstance(entry["momentum_buffer"], DTensor) for entry in state.values())
    found["moments"] = whole(entry["second_moment"] for entry in state.values())

    # placements that fully_shard does not choose, and a plain tensor beside them
    placements = [Shard(1), Shard(1), Replicate(), Shard(0), Shard(2)]
    mixed = [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [q])) for p, q in zip(plain, placements, strict=True)
    ]
    for param, start in zip(mixed, parameters(SHAPES), strict=True):
        param.data = distribute_tensor(start.detach(), mesh, param.placements)
    beside = parameters(SHAPES)[0]
    optimizer = Muon([*mixed, beside], **OPTIONS)
    for step in range(3):
        set_gradients(plain, step)
        for param, grad in zip(mixed, plain, strict=True):
            param.grad = distribute_tensor(grad.grad, mesh, param.placements)
        beside.grad = plain[0].grad
        optimizer.step()
    found["mixed"], found["beside"] = whole(mixed), beside.detach()
    found["directions"] = whole(newton_schulz([p.detach() for p in mixed]))
    if ranks == 2:
        hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        param = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), hybrid, [Replicate(), Shard(0)]))
        with pytest.raises(ValueError, match=r"params\[0\]: .* one dimension, found 2 \(replicas, shards\)"):
            Muon([param])
        with pytest.raises(ValueError, match=r"matrices\[0\]: .* one dimension, found 2 \(replicas, shards\)"):
            newton_schulz([param.detach()])
    with pytest.raises(ValueError, match=r"params\[0\]: expected no DTensor beside process_group"):
        Muon(model.parameters(), process_group=dist.group.WORLD)
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_parameters_take_the_steps_of_plain_ones(ranks, tmp_path):
    spawn = torch.multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=run_rank, args=(rank, ranks, str(tmp_path / "store"), str(tmp_path)))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    plain = Muon(parameters(SHAPES), **OPTIONS)
    weights = train(plain, steps=3)
    found = [torch.load(tmp_path / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    for rank in found:
        assert_close(rank["fsdp"], weights, 1e-10)
        assert_close(rank["mixed"], weights, 1e-10)
        assert_close([rank["beside"]], weights[:1], 1e-10)
        assert_close(rank["moments"], [state["second_moment"] for state in plain.state.values()], 1e-9)
        assert_close(rank["directions"], newton_schulz(weights), 1e-9)
    # each matrix or bank is orthogonalized by one rank
    for sizes in zip(*(rank["sizes"] for rank in found), strict=True):
        assert sum(sizes) == len(SHAPES)
