"""`python -m train.submission.paid_prefix build` makes the paid prefix of #262; see `train.data.paid_prefix`."""

from __future__ import annotations

import argparse

from train.common.errors import main_guard
from train.data.paid_prefix import NOT_COMPLIANT, build_prefix


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.submission.paid_prefix",
        description="Make the paid prefix of #262: a file of validation tokens that are not charged. The organisers ruled it out, "
        f"so every score with it is labelled {NOT_COMPLIANT!r}.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build",
        help="write the first validation tokens to an .xz file",
        description="Write the first target tokens of a validation text to an .xz file, for the setting PAID_PREFIX_FILE.",
        epilog="example: python -m train.submission.paid_prefix build --val-dir data/datasets/fineweb10B_sp1024 "
        "--num-tokens 6200000 --output prefix_6m2.xz",
    )
    build.add_argument("--val-dir", required=True, metavar="DIR", help="folder with the *_val_*.bin shards")
    build.add_argument("--num-tokens", required=True, type=int, metavar="N", help="number of target tokens")
    build.add_argument("--output", required=True, metavar="FILE", help="the .xz file to write")
    arguments = parser.parse_args(argv)
    prefix = build_prefix(arguments.val_dir, arguments.num_tokens, arguments.output)
    print(
        f"{arguments.output}: {prefix.targets:,} target tokens, {100 * prefix.coverage:.5f} % of the validation text, in "
        f"{prefix.blob_bytes:,} bytes ({prefix.blob_bytes / prefix.targets:.3f} per token)\n{NOT_COMPLIANT}"
    )
    return 0


if __name__ == "__main__":
    main_guard(main)
