"""A second decoder for the streams of `train.artifact.ans`, to compare with the first."""

import struct
import zlib
from collections.abc import Sequence


class SecondReader:
    """A decoder that computes with whole numbers alone, written from the description in `train.artifact.ans`."""

    def __init__(self, stream: bytes, size: int) -> None:
        row_labels, column_labels, flagged, low, high = struct.unpack("<BBBbb", stream[:5])
        begin = 13 if any(stream[:3]) else 5
        rows, columns = struct.unpack("<II", stream[5:13]) if begin == 13 else (1, max(size, 1))
        self.words = [word for (word,) in struct.iter_unpack("<I", stream[begin + 4 :])]
        self.state = 0
        for _ in range(min(2, len(self.words))):
            self.state = (self.state << 32) + self.words.pop()
        alphabet, height, matrices = high - low + 1, size // columns, size // (rows * columns)
        row_of = self.labels(row_labels, height)
        column_of = self.labels(column_labels, matrices * columns)
        flags = self.labels(2 * flagged, height)
        tables = self.tables(max(row_labels, 1) + max(column_labels, 1) - 1, alphabet)
        classes = [row_of[p // columns] + column_of[p // (rows * columns) * columns + p % columns] for p in range(size)]
        content = [0] * size
        for block in range(0, size, 1 << 20):
            positions = range(block, min(block + (1 << 20), size))
            for k, table in enumerate(tables):
                for p in positions:
                    if classes[p] == k:
                        content[p] = (low + self.symbol(table)) % 256
        assert (self.state, self.words) == (0, [])
        for p in range(columns, size):
            if flags[p // columns]:
                content[p] = (content[p] + content[p - columns]) % 256
        self.content = bytes(content)
        assert struct.pack("<I", zlib.crc32(stream[:begin] + self.content)) == stream[begin : begin + 4]

    def symbol(self, weights: Sequence[int]) -> int:
        count = len(weights)
        weights = weights if any(weights) else [1] * count
        frequencies = [1 + weight * (2**24 - count) // sum(weights) for weight in weights]
        frequencies[weights.index(max(weights))] += 2**24 - sum(frequencies)
        q, c, s = self.state % 2**24, 0, 0
        while q >= c + frequencies[s]:
            c += frequencies[s]
            s += 1
        self.state = self.state // 2**24 * frequencies[s] + q - c
        if self.state < 2**32 and self.words:
            self.state = (self.state << 32) + self.words.pop()
        return s

    def tables(self, count: int, symbols: int) -> list[list[int]]:
        tables = []
        for _ in range(count):
            t, weights = 0, []
            for _ in range(symbols):
                z = self.symbol([2**20 // (z + 6) ** 2 for z in range(256)])
                t = (t + (z // 2 if z % 2 == 0 else -(z + 1) // 2)) % 256
                weights.append((8 + t % 8) * 2 ** (t // 8) if t else 0)
            tables.append(weights)
        return tables

    def labels(self, symbols: int, count: int) -> list[int]:
        if not symbols:
            return [0] * count
        (table,) = self.tables(1, symbols)
        return [self.symbol(table) for _ in range(count)]
