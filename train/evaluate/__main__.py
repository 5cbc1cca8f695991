"""`python -m train.evaluate RUN` scores the artifact of a finished run, or an artifact alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from train.common.progress import announce

if __name__ == "__main__":
    announce("python -m train.evaluate: loading PyTorch")

from golf_kernels.window_nll import LOGITS_ROUNDINGS
from train.artifact.storage import MODEL_FIELDS, load_model, read_artifact
from train.checkpoint import load_weights
from train.command_line import check_backends, note_unread
from train.common.argument_types import at_least
from train.common.distributed import start_ranks
from train.common.errors import main_guard
from train.common.values import ConfigError
from train.config import Config, field_names
from train.data.dataset import Dataset
from train.data.paid_prefix import NOT_COMPLIANT
from train.evaluate.scores import read_evaluation, write_evaluation
from train.evaluate.scoring import BATCH_SEQS, score
from train.evaluate.windows import RULES
from train.model.attention_backends import BACKENDS
from train.model.attention_choice import choose_attention, use_attention
from train.model.gpt import GPT
from train.recipes import load_recipe, recipe_names
from train.run.folder import RunFolder, find_run
from train.run.logger import RunLogger, append_metric, final_lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Score the artifact of a finished run, or an artifact alone: bits per byte of the validation text.",
        epilog="examples:\n"
        "  python -m train.evaluate runs/quickstart_20260101-120000\n"
        "  python -m train.evaluate runs/quickstart_20260101-120000 --stride 0 --max-tokens 20000\n"
        "  torchrun --standalone --nproc_per_node=2 -m train.evaluate runs/quickstart_20260101-120000\n"
        "  python -m train.evaluate model.golf --recipe sp8192_sdclip --data-path data/datasets/fineweb10B_sp8192\n\n"
        "Flags may have underscores, or the settings' names (--eval_stride 0).\n"
        "The score is printed as log lines. A run's score is saved in RUN/evaluation.json and appended to RUN/metrics.jsonl.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", type=find_run, help="run folder, or its name in runs/ (or RUNS_DIR); or an artifact"
    )
    parser.add_argument("--recipe", help="recipe whose settings score an artifact alone")
    parser.add_argument(
        "--stride", type=int, help="new tokens per window; 0: windows do not overlap [the run's eval_stride]"
    )
    parser.add_argument("--rule", choices=RULES, help="which positions of a window are scored [the run's eval_rule]")
    parser.add_argument("--seq-len", type=int, help="window length in tokens [the run's eval_seq_len]")
    parser.add_argument("--max-tokens", type=at_least(0), default=0, help="score only the first N tokens; 0: all [0]")
    parser.add_argument(
        "--logits-rounding", choices=LOGITS_ROUNDINGS, help="round logits as published [the run's logits_rounding]"
    )
    parser.add_argument(
        "--batch-seqs", type=at_least(1), default=BATCH_SEQS, help=f"windows per forward pass [{BATCH_SEQS}]"
    )
    parser.add_argument("--data-path", help="folder with the validation shards and the tokenizer [the run's data_path]")
    parser.add_argument(
        "--weights",
        choices=("artifact", "master"),
        default="artifact",
        help="model.golf, or weights.pt before rounding",
    )
    parser.add_argument(
        "--paid-prefix",
        metavar="FILE",
        help=f"file of targets that count as known ({NOT_COMPLIANT}); '': none [the run's paid_prefix_file]",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="device to score on [the run's device]")
    parser.add_argument(
        "--attention", choices=("auto", *sorted(BACKENDS)), help="attention backend [the run's attention]"
    )
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), help="torch.compile, and on a GPU a CUDA graph [the run's compile]"
    )
    parser.add_argument("--json", action="store_true", help="print only the score, as one JSON object")
    return parser


# flag → setting, where the two names differ
_SETTINGS = {
    "stride": "eval_stride",
    "rule": "eval_rule",
    "seq_len": "eval_seq_len",
    "paid_prefix": "paid_prefix_file",
}


def _as_named(argument: str) -> str:
    """Translate a flag to the parser's spelling: hyphens for underscores, short names for names of settings."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    name = flag[2:].replace("-", "_")
    name = next((short for short, setting in _SETTINGS.items() if setting == name), name)
    return f"--{name.replace('_', '-')}{equals}{value}"


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = {_SETTINGS.get(name, name): value for name, value in vars(arguments).items() if value is not None}
    return {name: value for name, value in fields.items() if name in field_names()}


def _run_config(folder: RunFolder, arguments: argparse.Namespace) -> Config:
    if arguments.recipe is not None:
        raise ConfigError(f"--recipe: the run {folder.path} has its own settings: leave it out")
    config = folder.read_config() if arguments.weights == "artifact" else folder.trained_config()
    return config.replace(**_given(arguments))


def _file_config(arguments: argparse.Namespace) -> Config:
    """Return the settings that score an artifact file: the recipe's, overridden by the artifact's and by flags."""
    if arguments.recipe is None:
        raise ConfigError(f"--recipe: needed to score an artifact alone: one of {', '.join(recipe_names())}")
    if arguments.weights != "artifact":
        raise ConfigError("--weights: an artifact alone has no master weights: leave it out, or give the run folder")
    model = read_artifact(arguments.run).config
    return load_recipe(arguments.recipe).config(
        **{name: getattr(model, name) for name in MODEL_FIELDS} | _given(arguments)
    )


def _load(folder: RunFolder, config: Config, weights: str) -> GPT:
    if weights == "artifact":
        return load_model(folder.need(folder.artifact, "python -m train"), config)
    return load_weights(folder, config)


def main(argv: list[str] | None = None) -> int:
    """Score a run folder or an artifact. Under torchrun the ranks divide the windows."""
    arguments = _parser().parse_args(map(_as_named, sys.argv[1:] if argv is None else argv))
    check_backends()
    if arguments.run.is_file():
        return _score(None, arguments)
    folder = RunFolder(arguments.run)
    # the lock keeps other processes from replacing the artifact
    with folder.held(shared=True):
        return _score(folder, arguments)


def _score(folder: RunFolder | None, arguments: argparse.Namespace) -> int:
    config = _run_config(folder, arguments) if folder else _file_config(arguments)
    if folder and folder.evaluation.exists():
        # raise an error before scoring if evaluation.json is unreadable
        read_evaluation(folder)
    data = Dataset(folder.find_data(config).replace(**_given(arguments)) if folder else config)
    # read the data and the model now, so that errors are raised before the ranks wait for one another
    _ = data.known_targets
    model = (_load(folder, config, arguments.weights) if folder else load_model(arguments.run, config)).eval()
    with start_ranks(config.device) as ranks:
        if ranks.is_main:
            flags = {_SETTINGS.get(name, name) for name in vars(arguments)}
            note_unread(config, os.environ, lambda line: print(line, file=sys.stderr, flush=True), flags)
        model = model.to(ranks.device)
        use_attention(model, ranks.on_main(lambda: choose_attention(config, ranks.device, arguments.batch_seqs)).name)
        # with --json, show progress only as a bar on a terminal, not as lines
        progress = not arguments.json or sys.stderr.isatty()
        result, entry = score(
            model,
            data,
            config,
            ranks,
            weights=arguments.weights,
            batch_seqs=arguments.batch_seqs,
            max_tokens=arguments.max_tokens,
            progress=progress,
        )
    if ranks.is_main:
        final = final_lines(entry["name"], result.val_loss, result.val_bpb, result.seconds, stride=entry["stride"])
        if folder:
            with folder.writing():
                write_evaluation(folder, entry)
                append_metric(folder.metrics, "final", entry)
                # the run's log also gets its own score, because the log in a record must show the same seconds
                own = arguments.weights == "artifact" and not arguments.max_tokens and config == folder.read_config()
                if own:
                    with RunLogger(folder.path, config.seed, echo=False) as log:
                        for line in final:
                            log.line(line)
        lines = [result.layer0_line, *final, *([entry["label"]] if "label" in entry else [])]
        print(json.dumps(entry) if arguments.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    main_guard(main)
