"""Writes 60 record folders with three logs of 186 kB each: `python tests/helpers/many_records.py FOLDER`.

`python -m train.submission check FOLDER` must read them in less than 10 s of CPU time.
"""

import sys
from pathlib import Path

from foreign_records import SEEDS, make_foreign

LOG_BYTES = 186_000


def make_many(folder: Path, count: int = 60) -> None:
    for index in range(count):
        record = make_foreign(folder / f"2026-04-{1 + index % 30:02}_Record_{index}", name=f"Record {index}")
        for seed in SEEDS:
            log = record / f"train_seed{seed}.log"
            results = log.read_text()
            # half of the logs begin with the source of the script, the others have a line per step
            if index % 2:
                body = "".join(f"    value_{number} = compute({number}, 'text: {number}')\n" for number in range(9999))
                log.write_text(f"{body[: LOG_BYTES - len(results) - 101]}{'=' * 100}\n{results}")
            else:
                body = "".join(
                    f"{step}/20000 train_loss: 2.5 train_time: 0.9m tok/s: 6553600\n" for step in range(1, 9999)
                )
                log.write_text(f"{results}{body[: LOG_BYTES - len(results)]}")


if __name__ == "__main__":
    make_many(Path(sys.argv[1]))
