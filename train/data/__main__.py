"""`python -m train.data`: make or download datasets."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from train.common.errors import UserError, main_guard
from train.common.wording import counted
from train.data.build import build_dataset, check_output
from train.data.bulk import VAL_DOCS, build_bulk
from train.data.corpus import split_documents, stdlib_documents, text_documents
from train.data.hub import DEFAULT_PREFIX, DEFAULT_REPO, DEFAULT_TRAIN_SHARDS, FolderSource, HubSource, download
from train.data.manifest import DatasetInfo
from train.data.shards import SHARD_TOKENS


def stdlib(arguments: argparse.Namespace) -> None:
    out = arguments.out or f"data/stdlib_{arguments.vocab}"
    check_output(out, arguments.overwrite)
    print("text: this Python's standard library, its sources and documentation; nothing is downloaded", flush=True)
    train, val = split_documents(stdlib_documents(), arguments.val_bytes)
    _report(
        out,
        build_dataset(
            train, val, out, arguments.vocab, name="stdlib", source="Python standard library", **_options(arguments)
        ),
    )


def text(arguments: argparse.Namespace) -> None:
    out = arguments.out or f"data/text_{arguments.vocab}"
    check_output(out, arguments.overwrite)
    if arguments.val:
        train, val = list(text_documents(arguments.paths)), list(text_documents(arguments.val))
    else:
        train, val = split_documents(text_documents(arguments.paths), arguments.val_bytes)
    source = ", ".join(Path(path).name for path in arguments.paths)
    _report(
        out, build_dataset(train, val, out, arguments.vocab, name=arguments.name, source=source, **_options(arguments))
    )


def fineweb(arguments: argparse.Namespace) -> None:
    if arguments.source:
        source: FolderSource | HubSource = FolderSource(arguments.source, arguments.prefix)
    else:
        source = HubSource(arguments.repo, arguments.prefix)
    folder, tokenizer = download(
        arguments.variant, arguments.train_shards, arguments.out, source, skip_manifest=arguments.skip_manifest
    )
    vocab_size = int(arguments.variant.removeprefix("sp"))
    print(
        f"done: {folder} and {tokenizer}\nnext: python -m train --data_path {folder} --tokenizer_path {tokenizer} --vocab_size {vocab_size}"
    )


def build(arguments: argparse.Namespace) -> None:
    out = arguments.out or f"data/docs_{arguments.vocab}"
    if (
        arguments.workers < 0
        or arguments.max_train_tokens < 0
        or arguments.val_docs < 1
        or arguments.tokenizer_train_docs < 1
    ):
        raise UserError(
            "--workers and --max-train-tokens take 0 or more, --val-docs and --tokenizer-train-docs 1 or more"
        )
    info = build_bulk(
        arguments.docs,
        out,
        arguments.vocab,
        name=arguments.name,
        tokenizer_docs=arguments.tokenizer_train_docs,
        tokenizer_path=arguments.tokenizer,
        val_docs=arguments.val_docs,
        max_train_tokens=arguments.max_train_tokens,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        overwrite=arguments.overwrite,
        with_yardsticks=not arguments.no_yardsticks,
    )
    _report(out, info)


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.data`."""
    root = argparse.ArgumentParser(
        prog="python -m train.data",
        description="Make or download the token shards and the tokenizer that a run trains on.",
        epilog="example:\n  python -m train.data text notes.md books/ --vocab 2048 --out data/books\n\n"
        "`python -m train.data COMMAND --help` explains a command, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = _command(
        commands,
        "stdlib",
        stdlib,
        "the Python standard library's own text; no download",
        "python -m train.data stdlib --vocab 1024 --out data/stdlib_1024",
    )
    _add_dataset_options(one, 1024)
    _add_small_options(one)

    one = _command(
        commands,
        "text",
        text,
        "your own text: .txt, .md, source code, .jsonl (.gz, .xz), folders",
        "python -m train.data text notes.md books/ --vocab 2048 --out data/books",
    )
    one.add_argument(
        "paths", nargs="+", metavar="PATH", help='files and folders; .jsonl files hold one {"text": …} per line'
    )
    one.add_argument(
        "--val", nargs="+", default=[], metavar="PATH", help="validation text; default: a fixed part of PATH"
    )
    one.add_argument(
        "--name", type=_name, default="text", help="first part of the shards' names (default: %(default)s)"
    )
    _add_dataset_options(one, 1024)
    _add_small_options(one)

    one = _command(
        commands,
        "fineweb",
        fineweb,
        "published FineWeb shards from the Hugging Face Hub, or a local copy of them",
        "python -m train.data fineweb --variant sp8192 --train-shards 80 --repo kevclark/parameter-golf --skip-manifest",
    )
    one.add_argument(
        "--variant", default="sp1024", help="vocabulary: sp1024, sp2048, sp4096, sp8192, … (default: %(default)s)"
    )
    one.add_argument(
        "--train-shards",
        type=int,
        default=DEFAULT_TRAIN_SHARDS,
        metavar="N",
        help="training shards of 10^8 tokens, 200 MB each (default: %(default)s)",
    )
    one.add_argument(
        "--repo",
        default=os.environ.get("MATCHED_FINEWEB_REPO_ID", DEFAULT_REPO),
        help="dataset repository; environment: MATCHED_FINEWEB_REPO_ID (default: %(default)s)",
    )
    one.add_argument(
        "--prefix",
        default=os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX),
        help="folder in the repository; environment: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (default: %(default)s)",
    )
    one.add_argument(
        "--source",
        default="",
        metavar="DIR",
        help="take the files from this copy of the repository, a folder or file:// address, instead of the Hub",
    )
    one.add_argument(
        "--skip-manifest", action="store_true", help="for repositories without manifest.json: go by the files' names"
    )
    one.add_argument("--out", default="data", help="local root; gets datasets/ and tokenizers/ (default: %(default)s)")

    one = _command(
        commands,
        "build",
        build,
        "shards from many raw documents, in parallel processes; goes on after a kill",
        "python -m train.data build --docs docs_selected.jsonl --vocab 2048 --tokenizer-train-docs 100000 --workers 16 --out data/docs_2048",
    )
    one.add_argument(
        "--docs",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.jsonl files (.gz, .xz) with one {"text": …} per line, in order',
    )
    one.add_argument(
        "--val-docs",
        type=int,
        default=VAL_DOCS,
        metavar="N",
        help="the first N documents are the validation split (default: %(default)s)",
    )
    one.add_argument(
        "--tokenizer-train-docs",
        type=int,
        default=100_000,
        metavar="N",
        help="documents after those to train the tokenizer on (default: %(default)s)",
    )
    one.add_argument(
        "--max-train-tokens", type=int, default=0, metavar="N", help="stop after N training tokens (default: all)"
    )
    one.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that encode; the bytes do not depend on it (default: one per core)",
    )
    one.add_argument(
        "--name", type=_name, default="docs", help="first part of the shards' names (default: %(default)s)"
    )
    _add_dataset_options(one, 2048)
    return root


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: object, summary: str, example: str
) -> argparse.ArgumentParser:
    one = commands.add_parser(
        name,
        help=summary,
        description=f"Make a dataset of {summary}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(run=run)
    return one


def _pieces(text: str) -> int:
    # 4 special pieces and 256 bytes are in every tokenizer; a token is 16 bits in a shard
    if not text.isdecimal() or not 260 < int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"expected 261 to 65536 pieces, got {text}: choose a number between")
    return int(text)


def _name(text: str) -> str:
    if not text or "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"expected the first part of a file's name, got {text!r}: choose one without / and without line breaks"
        )
    return text


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}: choose one")
    return int(text)


def _add_dataset_options(one: argparse.ArgumentParser, vocab: int) -> None:
    one.add_argument(
        "--vocab", type=_pieces, default=vocab, metavar="V", help="pieces of the tokenizer (default: %(default)s)"
    )
    one.add_argument(
        "--tokenizer", default="", metavar="FILE", help="use this SentencePiece model instead of training one"
    )
    one.add_argument("--out", default="", help="folder to make (default: data/<kind>_<V>)")
    one.add_argument("--overwrite", action="store_true", help="replace the dataset that is there")
    one.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard (default: %(default)s)"
    )
    one.add_argument(
        "--no-yardsticks", action="store_true", help="do not measure what gzip and xz need per byte (5 to 10 s)"
    )


def _add_small_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--val-bytes",
        type=_natural,
        default=0,
        metavar="N",
        help="bytes of validation text (default: 5 %%, 32 kB to 200 kB)",
    )
    one.add_argument(
        "--threads", type=_natural, default=0, metavar="N", help="threads that encode (default: one per core)"
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokenizer_path": arguments.tokenizer,
        "shard_tokens": arguments.shard_tokens,
        "threads": arguments.threads,
        "overwrite": arguments.overwrite,
        "with_yardsticks": not arguments.no_yardsticks,
    }


def _report(out: str, info: DatasetInfo) -> None:
    for split, part in (("train", info.train), ("val", info.val)):
        documents, shards = counted(part.documents, "document"), counted(part.shards, "shard")
        print(f"{split}: {documents}, {part.text_bytes:,} bytes, {part.tokens:,} tokens, {shards}")
    if info.yardsticks:
        figures = ", ".join(f"{name} {bits:.2f}" for name, bits in info.yardsticks.items())
        print(f"yardsticks, bits per byte of the validation text after the training text: {figures}")
    print(f"done: {out}\nnext: python -m train --data_path {out} --vocab_size {info.vocab_size}")


def main() -> None:
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main_guard(main)
