"""Ranks from torchrun's variables, and two real processes over gloo."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from two_ranks import VARIABLES, free_port, torchrun_variables

from train.common.distributed import Ranks, choose_device, start_ranks
from train.common.errors import UserError, main_guard
from train.run.clocks import WallClock


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variables", [{}, torchrun_variables(0, 1, 1)], ids=["plain", "torchrun"])
def test_one_process_needs_no_group(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with start_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.accumulation) == (0, 0, 1, 8)
        assert ranks.device == torch.device("cpu") and ranks.is_main and ranks.group is None
        assert not dist.is_initialized()
        assert ranks.broadcast({"a": 1}) == {"a": 1}
        assert ranks.sum(torch.tensor([2.0])).item() == 2.0
        ranks.barrier()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "3"}, r"WORLD_SIZE: 3 .*1, 2, 4 or 8"),
        ({"WORLD_SIZE": "16"}, r"WORLD_SIZE: 16"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE: 0"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE: expected a whole number, found 'two'"),
        ({"RANK": "2"}, r"RANK 2.*0\.\.1"),
        ({"RANK": None}, r"RANK: not set.*torchrun"),
        ({"LOCAL_RANK": None}, r"LOCAL_RANK: not set"),
        ({"MASTER_ADDR": None}, r"MASTER_ADDR.*not set.*torchrun"),
        ({"MASTER_PORT": ""}, r"MASTER_PORT.*not set"),
        ({"MASTER_PORT": "x"}, r"MASTER_PORT: expected a whole number, found 'x'"),
        ({"MASTER_PORT": "99999999"}, r"MASTER_PORT: expected 0 to 65535, found 99999999"),
    ],
)
def test_bad_variables_are_named(changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**torchrun_variables(0, 2, 1), **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    # waiting for the others would only end at the timeout
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("went on to wait for the others"))
    with pytest.raises(UserError, match=message), start_ranks("cpu"):
        pass


def test_a_wrong_number_of_processes_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in ((0, 1), (1, 0), (2, 0)):
        for name, value in torchrun_variables(rank, 3, 1).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main_guard(lambda: start_ranks("cpu").__enter__() and 0)
        assert ended.value.code == 2 and capsys.readouterr().err.count("error: WORLD_SIZE: 3") == lines


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in torchrun_variables(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT {port}.*free port"), start_ranks("cpu"):
            pass


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"DEVICE=cuda, but .*DEVICE=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK 2: this machine has 2 GPUs"):
        choose_device("cuda", 2)
    assert choose_device("cpu", 2) == torch.device("cpu")


def check_clock(rank: int, group: dist.ProcessGroup) -> dict[str, object]:
    # the second rank's steps are slower, and both must stop with the same step at the same agreed time
    hand = [0.0]
    clock = WallClock(1.0, group=group, now=lambda: hand[0])
    clock.resume()
    seen = []
    while True:
        hand[0] += 0.04 + 0.02 * rank
        stop = clock.tick()
        seen.append(clock.elapsed_seconds)
        if stop:
            break
        if clock.steps == 5:
            seen.append(clock.pause())
            time.sleep(0.01 * rank)
            clock.resume()
    return {"seen": seen, "steps": clock.steps, "paused": clock.pause()}


def use(ranks: Ranks, folder: str) -> None:
    assert (ranks.world_size, ranks.accumulation, ranks.is_main) == (2, 4, ranks.rank == 0)
    # both find the same fault in the tuned file, and one of them says so
    assert logging.getLogger("golf_kernels").isEnabledFor(logging.WARNING) == ranks.is_main
    box = ranks.broadcast(f"from {ranks.rank}", source=1)
    total = ranks.sum(torch.tensor([ranks.rank + 1], dtype=torch.int64)).item()
    if ranks.is_main:
        time.sleep(0.3)
        Path(folder, "before").touch()
    ranks.barrier()
    arrived = Path(folder, "before").exists()
    result = {"box": box, "total": total, "arrived": arrived, "clock": check_clock(ranks.rank, ranks.group)}
    torch.save(result, Path(folder, f"{ranks.rank}.pt"))
    raise ZeroDivisionError


def start_and_fail(folder: str) -> None:
    with start_ranks("cpu") as ranks:
        use(ranks, folder)


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(torchrun_variables(rank, 2, port))
    torch.set_num_threads(1)
    # the group must be gone after a failure too
    with pytest.raises(ZeroDivisionError):
        start_and_fail(folder)
    assert not dist.is_initialized()
    assert logging.getLogger("golf_kernels").isEnabledFor(logging.WARNING)


def test_two_ranks_agree(tmp_path: Path) -> None:
    mp.spawn(work, args=(free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert (first["box"], first["total"], first["arrived"]) == ("from 1", 3, True)
    # the slower rank needs 17 steps of 0.06 s to reach 1 s
    assert first["clock"]["steps"] == 17 and first["clock"]["paused"] == pytest.approx(1.02)


FULL = "run.log: No space left on device: free some space or choose another folder and run again"
LEAVE_SCRIPT = """
import sys
from pathlib import Path
from train.common.distributed import start_ranks
from train.common.errors import UserError

def refuse():
    raise UserError("no")

def fill():
    raise OSError(28, "No space left on device", "run.log")

def main(mode, out):
    with start_ranks("cpu") as ranks:
        import torch._dynamo
        from train.model.gpt import GPT
        try:
            learned = ranks.on_main(refuse if mode == "refuse" else lambda: 7)
        except UserError as error:
            learned = str(error)
            try:
                ranks.on_main(fill)
            except UserError as error:
                learned += f"; {error}"
        (out / f"{ranks.rank}").write_text(str(learned))
        return ranks.rank

out = Path(sys.argv[2])
rank = main(sys.argv[1], out)
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
(out / f"{rank}.threads").write_text(" ".join(name for name in names if "gloo" in name))
"""


@pytest.mark.parametrize(("mode", "said"), [("refuse", f"no; {FULL}"), ("agree", "7")])
def test_every_rank_learns_what_the_first_one_did_and_leaves_no_thread(mode: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LEAVE_SCRIPT)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(
        [*command, tmp_path / "script.py", mode, out], env=environ, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "0": said,
        "1": said,
        "0.threads": "",
        "1.threads": "",
    }
