"""Muon's work divided between ranks: by cost, and so that one rank and two take the same steps."""

import datetime
import gc
from pathlib import Path

import torch
import torch.distributed as dist

# before there is a process group, as in train.common.distributed: it would keep one alive beyond the interpreter's end
import torch.distributed.nn
import torch.multiprocessing
from muon_truth import SHAPES, Launches, assert_close, parameters, set_gradients, train

from golf_kernels import Muon
from golf_kernels.sharding import assign, newton_schulz_cost

WORLD_SHAPES = (*SHAPES, (3, 6, 10))
OPTIONS_OF_RANKS = {"lr": 0.02, "row_normalize": True, "normuon": True}


def test_matrices_are_shared_out_by_cost():
    # the eleven-layer model of #1392: 22 q/o, 22 k/v, 22 MLP matrices
    shapes = ((512, 512),) * 22 + ((256, 512),) * 22 + ((2048, 512), (512, 2048)) * 11
    owners = assign(shapes, 8)
    loads = [0] * 8
    for owner, shape in zip(owners, shapes, strict=True):
        loads[owner] += newton_schulz_cost(*shape)
    assert min(loads) > 0 and max(loads) / (sum(loads) / 8) < 1.05
    # 62.9 GF per rank for padded banks, about 47 for a balanced assignment
    assert 5 * max(loads) / 1e9 < 49
    assert assign(shapes, 1) == (0,) * 66
    assert sorted(set(assign(((4, 4),) * 2, 5))) == [0, 1]


class Linear(torch.nn.Module):
    """A model whose gradients are what it is given."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(weight) for weight in weights)

    def forward(self, gradients):
        return sum((weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True))


def run_rank(rank, world_size, store, folder):
    # a rank that fails must not leave the other one waiting for half an hour
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    train_rank(rank, folder)
    dist.destroy_process_group()
    # a thread of the group that lets go of a tensor while python shuts down aborts the process
    gc.collect()
    assert "gloo" not in " ".join((task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def train_rank(rank, folder):
    start = torch.load(f"{folder}/start.pt", weights_only=True)
    model = torch.nn.parallel.DistributedDataParallel(Linear(start["weights"]))
    optimizer = Muon(model.parameters(), process_group=dist.group.WORLD, **OPTIONS_OF_RANKS)
    optimizer.load_state_dict(start["state"])
    plain = parameters(WORLD_SHAPES)
    with Launches() as launches:
        for step in range(2, 4):
            set_gradients(plain, step)
            optimizer.zero_grad()
            # the mean over ranks is the gradient of one process
            model([param.grad * (1.5 - rank) for param in plain]).backward()
            optimizer.step()
    weights = [param.detach() for param in model.parameters()]
    torch.save({"weights": weights, "state": optimizer.state_dict(), "sizes": launches.sizes}, f"{folder}/{rank}.pt")


def test_one_rank_then_two_under_ddp_then_one_are_one_rank_all_along(tmp_path):
    first = Muon(parameters(WORLD_SHAPES), **OPTIONS_OF_RANKS)
    torch.save({"weights": train(first, steps=2), "state": first.state_dict()}, tmp_path / "start.pt")
    store = str(tmp_path / "store")
    # both in processes of their own: torch numbers the groups that a process has had, and here other tests had some
    spawn = torch.multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=run_rank, args=(rank, 2, store, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = Muon(parameters(WORLD_SHAPES), **OPTIONS_OF_RANKS)
    alone = train(one, steps=4)
    for found in ranks:
        assert_close(found["weights"], alone, 1e-11)
    # bit for bit between the ranks, or they would drift apart
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True))
    # every rank works on its own share only: 4 matrices and a bank of 3 between them
    assert len(ranks[0]["sizes"]) == 2 and ranks[0]["sizes"][0] + ranks[1]["sizes"][0] == 7
    assert min(ranks[0]["sizes"][0], ranks[1]["sizes"][0]) >= 3
    restored = Muon([torch.nn.Parameter(w) for w in ranks[1]["weights"]], **OPTIONS_OF_RANKS)
    restored.load_state_dict(ranks[1]["state"])
    assert_close(train(restored, start=4, steps=2), train(one, start=4, steps=2), 1e-10)


def test_plain_shards_make_the_step_of_the_whole():
    whole = Muon(parameters(), **OPTIONS_OF_RANKS)
    pieces = parameters()
    shards = [Muon(pieces[rank::2], **OPTIONS_OF_RANKS) for rank in range(2)]
    for step in range(2):
        set_gradients(whole.param_groups[0]["params"], step)
        set_gradients(pieces, step)
        for optimizer in (whole, *shards):
            optimizer.step()
    assert_close([p.detach() for p in pieces], [p.detach() for p in whole.param_groups[0]["params"]], 1e-12)
