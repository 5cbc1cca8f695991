"""`python -m train.quantize RUN` makes a run's artifact again, or quantizes the run's weights with other settings."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from train.common.errors import main_guard
from train.common.progress import announce
from train.common.values import ConfigError
from train.config import Config, field_help, parse_value
from train.run.folder import RunFolder, find_run

SETTINGS = (
    "quantizer", "matrix_bits", "embed_bits", "tied_embed_bits", "matrix_clip", "matrix_clip_sigmas", "embed_clip",
    "embed_clip_sigmas", "scale_floor", "gptq_calib_source", "gptq_calib_graph", "gptq_calib_batches",
    "gptq_tied_embed", "gptq_damp", "passthrough_max_elements", "codec", "target_bytes",
    "target_mb", "prune_excess", "max_artifact_bytes", "data_path", "device",
)  # fmt: skip

# settings that may change without --out, because the artifact still belongs to the run
BUDGET = frozenset({"target_bytes", "target_mb", "prune_excess"})


def main(argv: list[str] | None = None) -> int:
    """Calibrate, quantize and encode the weights in a run folder. Under torchrun the ranks divide the work."""
    arguments = _parser().parse_args(argv)
    announce(f"python -m train.quantize: {arguments.run}; loading PyTorch")
    # imported after parsing, because importing torch takes seconds and --help should appear before
    from train.artifact.budget import check_room
    from train.artifact.make import make_artifact, quantize
    from train.checkpoint import load_weights
    from train.command_line import check_backends, note_unread
    from train.common.distributed import start_ranks
    from train.data.dataset import Dataset
    from train.data.paid_prefix import prefix_bytes
    from train.model.gpt import GPT
    from train.run.logger import RunLogger
    from train.single_file.code_size import counted_code_bytes

    folder = RunFolder(arguments.run)
    check_backends()
    config, changes = _settings(arguments, folder)

    def make_room() -> None:
        if arguments.out is not None:
            return
        folder.drop_scores()
        if changes:
            # delete the artifact before its settings change: if the process is killed, the run has no wrong artifact
            folder.artifact.unlink(missing_ok=True)
            folder.write_config(folder.read_config().replace(**changes))

    with start_ranks(config.device) as ranks, tempfile.TemporaryDirectory() as elsewhere, ExitStack() as held:
        if arguments.out is None:
            ranks.on_main(lambda: held.enter_context(folder.held()))
            # read the settings again, because another process may have changed them before this process got the lock
            config, changes = _settings(arguments, folder)
        # with --out, write another log: the run's log describes only the run's own artifact
        log = RunLogger(elsewhere if arguments.out else folder.path, config.seed, ranks.rank)
        note_unread(config, os.environ, log.line, SETTINGS)
        model: GPT = load_weights(folder).to(ranks.device)
        path = arguments.out or folder.artifact
        # count the script of a complete run, which has recurrence, even if this run ended before recurrence began
        code_bytes = ranks.on_main(lambda: counted_code_bytes(folder.read_config().replace(**changes)))
        check_room(config, code_bytes + prefix_bytes(config))
        data = Dataset(folder.find_data(config).replace(**changes))
        tensors, encoded = quantize(config, model, data, ranks, log, code_bytes=code_bytes)
        make_artifact(
            path, config, model, tensors, encoded, ranks, log, code_bytes=code_bytes, before_replacing=make_room
        )
        log.line(f"wrote {path}")
    return 0


def _settings(arguments: argparse.Namespace, folder: RunFolder) -> tuple[Config, dict[str, object]]:
    """Return the run's settings as the command line changes them, and a dictionary of the changed settings alone."""
    config = folder.trained_config()
    given = {name: text for name in SETTINGS if (text := getattr(arguments, name)) is not None}
    values = {name: parse_value(name, text, f"--{name}") for name, text in given.items()}
    changes = {name: value for name, value in values.items() if getattr(config, name) != value}
    if set(changes) - BUDGET and arguments.out is None:
        raise ConfigError(
            f"--out: needed because these settings differ from the run's: {', '.join(changes)}; the run keeps its own artifact"
        )
    return config.replace(**changes), changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.quantize",
        description="Quantize a run's trained weights and pack them: RUN/weights.pt becomes RUN/model.golf.",
        epilog="examples:\n"
        "  python -m train.quantize runs/quickstart_20260101-120000\n"
        "  python -m train.quantize runs/quickstart_20260101-120000 --target-bytes 16000000\n"
        "  python -m train.quantize runs/quickstart_20260101-120000 --matrix_clip_sigmas 10 --out /tmp/k10.golf\n"
        "  torchrun --standalone --nproc_per_node=2 -m train.quantize runs/quickstart_20260101-120000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=find_run, help="run folder, or its name in runs/ (or RUNS_DIR)")
    parser.add_argument("--out", type=Path, help="write the artifact here instead of RUN/model.golf")
    for name in SETTINGS:
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*sorted(spellings), dest=name, metavar="VALUE", help=field_help(name).replace("%", "%%"))
    return parser


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
