"""One run of two launchers that find each other by torchrun's rendezvous, as two machines do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_runs import ROOT, Finished, flags, small

from train.common.files import read_json
from train.run.folder import RunFolder


def test_two_launchers_train_one_run(finished: Finished, dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "mine", "-m", "train", *flags(small(dataset, tmp_path)),
    ]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    run, expected = RunFolder(tmp_path / "run"), read_json(finished.folder.summary, "")
    found = read_json(run.summary, "")
    assert "2 processes" in found["hardware"] and found["steps"] == expected["steps"]
    # a sum in another order moves a few codes of int6, so the weights are compared before quantization
    assert found["prequant_val_bpb"] == pytest.approx(expected["prequant_val_bpb"], abs=1e-4)
