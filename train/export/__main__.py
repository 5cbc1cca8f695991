"""`python -m train.export RUN|ARTIFACT --to FORMAT` writes a model in a format that other programs read."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from train.common.progress import announce

if __name__ == "__main__":
    announce("python -m train.export: loading PyTorch")

from train.checkpoint import load_weights
from train.common.errors import UserError, main_guard
from train.data.tokenizer import find_operator, load_tokenizer
from train.export.formats import FORMATS, Exported
from train.generate.load import load, tokenizer_path
from train.run.folder import RunFolder, find_run


def _parser() -> argparse.ArgumentParser:
    formats = "; ".join(f"{name}: {made.about}" for name, made in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Write the model of a run or of an artifact in a format that other programs read.",
        epilog="examples:\n"
        "  python -m train.export runs/mine --to state_dict\n"
        "  python -m train.export runs/mine --to hf --out golf_hf\n\n"
        "safetensors and hf need the package safetensors. hf needs the tokenizer; its folder has the model's formulas in\n"
        "golf_inference.py, a file without golf_kernels.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="RUN|ARTIFACT",
        type=find_run,
        help="run folder, or its name in runs/ (or RUNS_DIR); or an artifact",
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help=formats)
    parser.add_argument("--out", metavar="OUT", type=Path, help="file, for hf folder, to write [beside the model]")
    parser.add_argument(
        "--weights",
        choices=("artifact", "master"),
        default="artifact",
        help="model.golf, dequantized, as it is scored; or weights.pt before rounding [artifact]",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="for hf: SentencePiece model [the run's tokenizer]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the model, and print the path of the written file or folder."""
    arguments = _parser().parse_args(argv)
    path, chosen = arguments.path, FORMATS[arguments.to]
    folder = RunFolder(path if path.is_dir() else path.parent)
    with ExitStack() as held:
        if arguments.weights == "artifact":
            model, window, run = load(path)
        elif path.is_dir():
            run = folder.find_data(folder.trained_config())
            model, window = load_weights(folder, run), run.window
        else:
            raise UserError(f"--weights: an artifact holds no weights before rounding: give the run folder, not {path}")
        tokenizer = None
        if arguments.to == "hf":
            tokenizer = tokenizer_path(path, run, arguments.tokenizer)
            if find_operator(load_tokenizer(tokenizer, model.config.vocab_size, operators=True)):
                raise UserError(
                    f"--to hf: {tokenizer} needs case operators, which hf can't write: give --to safetensors"
                )
        stem = "weights" if arguments.weights == "master" else "model" if path.is_dir() else path.stem
        out = arguments.out or folder.path / f"{stem}{chosen.suffix}"
        if not out.parent.is_dir():
            raise UserError(f"--out: the folder {out.parent} does not exist: create it first")
        if out.exists():
            raise UserError(f"--out: {out} exists: delete it, or choose another")
        if run and out.parent.samefile(folder.path):
            # the locks keep other processes from deleting the unfinished output
            held.enter_context(folder.held(shared=True))
            held.enter_context(folder.writing())
        chosen.write(Exported(model, window, tokenizer), out)
    print(out)
    return 0


if __name__ == "__main__":
    main_guard(main)
