"""`python -m train.data` makes a dataset from text, or downloads the published FineWeb shards."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.common.argument_types import add_command, at_least
from train.common.errors import UserError, main_guard
from train.common.wording import counted
from train.data.build import build_dataset, build_stdlib, check_output, measure_compressors
from train.data.bulk import VAL_DOCS, build_bulk
from train.data.corpus import split_documents, text_documents
from train.data.hub import DEFAULT_PREFIX, DEFAULT_TRAIN_SHARDS, FolderSource, HubSource, default_repo, download
from train.data.manifest import DatasetInfo
from train.data.shards import SHARD_TOKENS
from train.data.text_files import Skipped, skipped_text
from train.data.tokenizer import load_tokenizer

_VAL_BYTES = "bytes of validation text [5 %%, at least 32 kB, at most 200 kB]"
_DOCUMENTS = 'a document is a line {"text": …} of .jsonl, a row of .parquet (column text), or any other file'


def stdlib(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, arguments.overwrite)
    info = build_stdlib(arguments.out, arguments.vocab, val_bytes=arguments.val_bytes, **_options(arguments))
    _report(arguments, info)


def text(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, arguments.overwrite)
    print(f"text: reading {', '.join(arguments.paths)}", flush=True)
    skipped = Skipped()
    if arguments.val:
        split = list(text_documents(arguments.paths, skipped)), list(text_documents(arguments.val, skipped))
    else:
        split = split_documents(text_documents(arguments.paths, skipped), arguments.val_bytes)
    if skipped:
        print(f"skipped: {skipped_text(skipped)}", flush=True)
    source = ", ".join(Path(path).name for path in arguments.paths)
    info = build_dataset(
        *split, arguments.out, arguments.vocab, name=arguments.name, source=source, **_options(arguments)
    )
    _report(arguments, info)


def fineweb(arguments: argparse.Namespace) -> None:
    if arguments.source:
        source: FolderSource | HubSource = FolderSource(arguments.source, arguments.prefix)
    else:
        repo = arguments.repo or default_repo(arguments.variant)
        print(f"fineweb: asking the Hub for {repo}", flush=True)
        source = HubSource(repo, arguments.prefix)
    folder, tokenizer = download(
        arguments.variant, arguments.train_shards, arguments.out, source, skip_manifest=arguments.skip_manifest
    )
    vocab_size = arguments.variant.removeprefix("sp").partition("_")[0]
    print(f"done: {folder} and {tokenizer}")
    print(f"next: python -m train --data_path {folder} --tokenizer_path {tokenizer} --vocab_size {vocab_size}")


def build(arguments: argparse.Namespace) -> None:
    info = build_bulk(
        arguments.docs,
        arguments.out,
        arguments.vocab,
        name=arguments.name,
        tokenizer_docs=arguments.tokenizer_train_docs,
        val_docs=arguments.val_docs,
        max_train_tokens=arguments.max_train_tokens,
        workers=arguments.workers,
        **_options(arguments),
    )
    _report(arguments, info)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokenizer_path": arguments.tokenizer,
        "case_operators": arguments.case_operators,
        "shard_tokens": arguments.shard_tokens,
        "overwrite": arguments.overwrite,
    }


def _report(arguments: argparse.Namespace, info: DatasetInfo) -> None:
    out = arguments.out
    if not arguments.no_yardsticks:
        print("comparison: gzip and xz compress the text (5 to 10 s; --no-yardsticks leaves them out)", flush=True)
        info = measure_compressors(out)
    for name, split in (("train", info.train), ("val", info.val)):
        documents, shards = counted(split.documents, "document"), counted(split.shards, "shard")
        print(f"{name}: {documents}, {split.text_bytes:,} bytes, {split.tokens:,} tokens, {shards}")
    if info.yardsticks:
        scores = ", ".join(f"{name} {bits:.2f}" for name, bits in info.yardsticks.items())
        print(f"for comparison, bits per byte of compressors primed with the training text: {scores}")
    print(f"done: {out}\nnext: python -m train --data_path {out}")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m train.data",
        description="Make or download a dataset: token shards and their tokenizer.",
        epilog="example:\n  python -m train.data text notes.md books/ --vocab 2048 --out data/books\n\n"
        "`python -m train.data COMMAND --help` explains a command, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = functools.partial(add_command, commands, root.prog)
    one = command(
        "stdlib",
        "make a dataset of the Python standard library's text; nothing is downloaded",
        "--vocab 1024 --out data/stdlib_1024",
        stdlib,
    )
    _add_dataset_options(one, "stdlib", 1024)
    _option(one, "--val-bytes", 0, _VAL_BYTES, "N", at_least(0))

    one = command(
        "text",
        "make a dataset of your own text: .txt, .md, source code, .jsonl (each also .gz, .xz, .zst), .parquet, folders",
        "notes.md books/ --vocab 2048 --out data/books",
        text,
    )
    one.add_argument("paths", nargs="+", metavar="PATH", help=f"files and folders; {_DOCUMENTS}")
    one.add_argument("--val", nargs="+", default=[], metavar="PATH", help="validation text [part of PATH]")
    _option(one, "--name", "text", "prefix of the shards' names", "NAME", _name)
    _add_dataset_options(one, "text", 1024)
    _option(one, "--val-bytes", 0, _VAL_BYTES, "N", at_least(0))

    one = command(
        "fineweb",
        "get published FineWeb shards and their tokenizer from the Hugging Face Hub, or from a local copy",
        "--variant sp8192 --train-shards 80 --repo kevclark/parameter-golf --skip-manifest",
        fineweb,
    )
    environ = os.environ.get
    repo = environ("MATCHED_FINEWEB_REPO_ID", "")
    prefix = environ("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX)
    _option(
        one, "--variant", "sp1024", "tokenizer: sp1024, sp8192, …, or sp8192_lossless_caps_caseops_v1_reserved", "V"
    )
    _option(one, "--train-shards", DEFAULT_TRAIN_SHARDS, "training shards of 10^8 tokens, 200 MB each", "N", int)
    _option(
        one,
        "--repo",
        repo,
        "dataset repository, by default the variant's; environment: MATCHED_FINEWEB_REPO_ID",
        "REPO",
    )
    _option(one, "--prefix", prefix, "folder in the repository; environment: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "DIR")
    _option(
        one, "--source", "", "local copy of the repository (folder or file:// URL) to use instead of the Hub", "DIR"
    )
    one.add_argument(
        "--skip-manifest", action="store_true", help="for a repository without manifest.json: list its files"
    )
    _option(one, "--out", "data", "folder that gets datasets/ and tokenizers/", "DIR")

    one = command(
        "build",
        "make a dataset of many raw documents, in parallel; after an interruption the same command resumes",
        "--docs docs_selected.jsonl --vocab 2048 --tokenizer-train-docs 100000 --workers 16 --out data/docs_2048",
        build,
    )
    one.add_argument(
        "--docs", nargs="+", required=True, metavar="PATH", help=f"files and folders, as for text; {_DOCUMENTS}"
    )
    _option(one, "--val-docs", VAL_DOCS, "the first N documents are the validation split", "N", at_least(1))
    _option(one, "--tokenizer-train-docs", 100_000, "the next N documents train the tokenizer", "N", at_least(1))
    _option(one, "--max-train-tokens", 0, "stop after N training tokens [all]", "N", at_least(0))
    _option(
        one,
        "--workers",
        0,
        "processes that tokenize; the result does not depend on it [one per core]",
        "N",
        at_least(0),
    )
    _option(one, "--name", "docs", "prefix of the shards' names", "NAME", _name)
    _add_dataset_options(one, "docs", 2048)
    return root


def _option(one: Any, flag: str, default: Any, help: str, metavar: str, kind: Callable[[str], Any] = str) -> None:
    shown = " [%(default)s]" if default else ""
    one.add_argument(flag, type=kind, default=default, metavar=metavar, help=help + shown)


def _add_dataset_options(one: Any, folder: str, vocab: int) -> None:
    one.set_defaults(folder=folder, own_vocab=vocab)
    _option(one, "--vocab", 0, f"vocabulary size of the tokenizer [{vocab}, or that of --tokenizer]", "V", _vocabulary)
    _option(one, "--tokenizer", "", "use this SentencePiece model instead of training one", "FILE")
    one.add_argument(
        "--case-operators", action="store_true", help="CaseOps: write capitals as operators, and count original bytes"
    )
    _option(one, "--out", "", f"folder to make [data/{folder}_V]", "DIR")
    one.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    _option(one, "--shard-tokens", SHARD_TOKENS, "tokens per shard", "N", int)
    one.add_argument(
        "--no-yardsticks", action="store_true", help="do not measure gzip and xz for comparison (5 to 10 s)"
    )


def _vocabulary(text: str) -> int:
    # a vocabulary always has 4 special pieces and 256 byte pieces; shards store tokens in 16 bits
    if not text.isdecimal() or not 260 < int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"expected a vocabulary size from 261 to 65536, got {text}")
    return int(text)


def _vocabulary_of(arguments: argparse.Namespace) -> int:
    if not arguments.tokenizer:
        return int(arguments.vocab or arguments.own_vocab)
    pieces = load_tokenizer(arguments.tokenizer, operators=True).vocab_size()
    if arguments.vocab and arguments.vocab != pieces:
        raise UserError(f"--vocab {arguments.vocab}: {arguments.tokenizer} has {pieces} pieces: leave --vocab out")
    return pieces


def _name(text: str) -> str:
    if not text or "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a prefix for file names, got {text!r}")
    return text


def main() -> None:
    arguments = parser().parse_args()
    if arguments.command != "fineweb":
        arguments.vocab = _vocabulary_of(arguments)
        arguments.out = arguments.out or f"data/{arguments.folder}_{arguments.vocab}"
    arguments.run(arguments)


if __name__ == "__main__":
    main_guard(main)
