"""`python -m train.generate RUN|ARTIFACT` continues a prompt."""

from __future__ import annotations

import argparse
import io
import itertools
import sys

from train.common.progress import announce

if __name__ == "__main__":
    announce("python -m train.generate: loading PyTorch")

from train.command_line import check_backends
from train.common.argument_types import at_least
from train.common.distributed import choose_device
from train.common.errors import main_guard
from train.config import Config
from train.data.tokenizer import load_tokenizer
from train.generate.load import load, tokenizer_path
from train.generate.text import characters, continue_text, encode
from train.run.folder import find_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate",
        description="Continue a prompt with the model of a run or of an artifact, and print the text as it grows.",
        epilog="examples:\n"
        '  python -m train.generate runs/mine --prompt "def " --tokens 200 --temperature 0.8 --seed 1\n'
        '  python -m train.generate k10.golf --tokenizer data/stdlib_1024/stdlib_1024_bpe.model --prompt "import "\n\n'
        "The tokenizer normalizes the prompt: runs of whitespace become one space, none is left at the ends.\n"
        "The text ends early where the model ends the document. The model reads the last WINDOW tokens. When the\n"
        "window is full, its first half is dropped and the rest is read again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="RUN|ARTIFACT",
        type=find_run,
        help="run folder, or its name in runs/ (or RUNS_DIR); or an artifact",
    )
    parser.add_argument("--prompt", default="", help="beginning of the text [empty]")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="largest number of tokens to add [200]")
    parser.add_argument(
        "--temperature", type=at_least(0, float), default=0.8, help="0: always the most likely token [0.8]"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=Config.seed, help=f"seed of the random numbers [{Config.seed}]"
    )
    parser.add_argument(
        "--window",
        type=at_least(1, most=2**20),
        help="tokens that the model reads at once; beyond rope_train_seq_len the NTK rule raises the rotary base "
        "[that of the run's evaluation; of an artifact without a run: rope_train_seq_len]",
    )
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="SentencePiece model [the run's tokenizer]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on [auto]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the prompt and its continuation."""
    arguments = _parser().parse_args(argv)
    check_backends()
    device = choose_device(arguments.device)
    model, window, run = load(arguments.path, device.type)
    found = tokenizer_path(arguments.path, run, arguments.tokenizer)
    tokenizer = load_tokenizer(found, model.config.vocab_size, operators=True)
    prompt = encode(tokenizer, arguments.prompt)
    added = continue_text(
        model.to(device),
        prompt,
        arguments.tokens,
        window=arguments.window or window,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # replace characters that the terminal cannot encode
        sys.stdout.reconfigure(errors="replace")
    for text in characters(tokenizer, itertools.chain(prompt, added)):
        print(text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    main_guard(main)
