"""C++ code and codecs beside PyTorch's result, at random shapes."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import torch
from attack.campaign import Broke, Campaign

import golf_kernels as golf
from golf_kernels import dispatch
from golf_kernels.gptq_block import gptq_block
from train.artifact.codecs import CODECS


class Native(Campaign):
    name: ClassVar[str] = "native"
    tries: ClassVar[str] = "int6, GPTQ and codecs on matrices of random shapes, strides and distributions"
    promise: ClassVar[str] = "C++ and PyTorch give the same bits; codecs return what they got"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cpp = [op for op in ("int6", "gptq_block") if "cpp" in dispatch.available_backends(op)]

    def attack(self, random: Random, folder: Path) -> None:
        torch.manual_seed(random.randrange(2**31))
        kinds = {"int6": self.int6, "gptq_block": self.gptq, "codec": self.codec}
        kind = random.choice([*self.cpp, "codec"])
        kinds[kind](random)

    def int6(self, random: Random) -> None:
        rows, columns = random.choice([1, 2, 7, 64, 129]), random.choice([1, 3, 4, 31, 64, 257, 1000])
        self.tried = f"int6 {rows} × {columns}"
        codes = torch.randint(-32, 32, (rows, columns), dtype=torch.int8)
        if random.random() < 0.3:
            codes = torch.randint(-32, 32, (columns, rows), dtype=torch.int8).t()
        scales = torch.rand(rows).half() if random.random() < 0.5 else torch.rand(rows)
        weight = torch.randn(rows, columns)
        results = {}
        for backend in ("torch", "cpp"):
            with dispatch.forced(f"int6={backend}"):
                packed = golf.int6_pack(codes)
                results[backend] = (
                    packed, golf.int6_unpack(packed, codes.numel()), golf.int6_dequantize(packed, scales, columns),
                    golf.int6_fake_quantize(weight, scales.float() + 0.01),
                )  # fmt: skip
        if not all(map(torch.equal, results["torch"], results["cpp"])):
            raise Broke("C++ and PyTorch differ")
        if not torch.equal(results["cpp"][1].reshape(codes.shape), codes):
            raise Broke("unpacked codes differ from the packed ones")

    def gptq(self, random: Random) -> None:
        batch, rows, columns = random.choice([1, 2, 5]), random.choice([1, 8, 33]), random.choice([1, 2, 17, 128])
        limit = random.choice([1, 7, 31, 63, 127])
        self.tried = f"gptq_block {batch} × {columns} × {rows}, limit {limit}"
        work = torch.randn(batch, columns, rows)
        factor = torch.randn(batch, columns, columns).triu() * 0.1 + torch.eye(columns)
        scales = torch.rand(batch, rows) + 0.05
        results = []
        for backend in ("torch", "cpp"):
            with dispatch.forced(f"gptq_block={backend}"):
                results.append(gptq_block(work.clone(), factor, scales, limit))
        if not torch.equal(results[0][0], results[1][0]):
            raise Broke("C++ and PyTorch round to other codes")

    def codec(self, random: Random) -> None:
        name = random.choice(sorted(CODECS))
        codec, rows, columns = CODECS[name], random.choice([0, 1, 5, 200]), random.choice([1, 2, 33, 700])
        largest = 2 ** (codec.max_bits - 1) - 1
        spread = random.choice([0, 0.3, 3, 30])
        self.tried = f"codec {name}, {rows} × {columns}, spread {spread}"
        numbers = np.random.default_rng(random.randrange(2**31)).normal(0, spread, rows * columns)
        content = np.clip(np.rint(numbers), -largest - 1, largest).astype(np.int8).tobytes()
        shape = (rows, columns) if rows and random.random() < 0.5 else None
        if bytes(codec.decode(codec.encode(content, shape), len(content))) != content:
            raise Broke("decoded to other bytes")
