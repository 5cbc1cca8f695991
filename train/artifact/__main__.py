"""Look into an artifact, or check one: `python -m train.artifact inspect|verify FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from train.artifact.budget import budget_table
from train.artifact.storage import MODEL_FIELDS, build_model, read_artifact
from train.errors import main_guard
from train.files import sha256_file


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    options.run(options)


def inspect(options: argparse.Namespace) -> None:
    """Print what an artifact holds and what each group of tensors costs."""
    artifact = read_artifact(options.file)
    values = artifact.config.to_dict()
    shape = {name: values[name] for name in MODEL_FIELDS}
    if options.json:
        print(json.dumps({"file": str(options.file), "config": shape, **artifact.info.to_dict()}, indent=1))
        return
    parameters = sum(tensor.shape.numel() for tensor in artifact.tensors.values())
    print(f"{options.file}: version {artifact.info.version}, {artifact.info.model_bytes:,} bytes")
    print(
        f"{artifact.info.tensors} tensors, {parameters:,} parameters, {artifact.info.model_bytes * 8 / parameters:.3f} bits each"
    )
    print(f"model: {' '.join(f'{name}={value}' for name, value in shape.items())}\n")
    print(budget_table(artifact.info.rows()))


def verify(options: argparse.Namespace) -> None:
    """Check every byte of an artifact and build its model."""
    artifact = read_artifact(options.file)
    model, info = build_model(options.file, artifact), artifact.info
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = sha256_file(options.file)
    if options.json:
        report = {"file": str(options.file), "ok": True, "sha256": digest, "parameters": parameters}
        print(json.dumps({**report, "model_bytes": info.model_bytes, "sections": len(info.sections)}, indent=1))
        return
    print(
        f"{options.file}: good: {info.model_bytes:,} bytes, {len(info.sections)} sections, {info.tensors} tensors, "
        f"{parameters:,} parameters\nsha256 {digest}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.artifact",
        description="Look into the artifact of a run, or check it. Nothing in the file is executed.",
        epilog="examples:\n"
        "  python -m train.artifact inspect runs/quickstart_20260101-120000/model.golf\n"
        "  python -m train.artifact verify --json runs/quickstart_20260101-120000/model.golf\n\n"
        "The format is described byte by byte in train/artifact/container.py. Exit code 2: the file is no good artifact.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run, about in (
        (
            inspect,
            "print a table by tensor group: elements, bytes before and after packing, bits each, share of the file",
        ),
        (verify, "check every byte against its checksum, decode every section and build the model"),
    ):
        command = commands.add_parser(
            run.__name__,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"example: python -m train.artifact {run.__name__} runs/mine/model.golf",
        )
        command.add_argument("file", metavar="FILE", type=Path, help="the artifact, e.g. runs/RUN/model.golf")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    main_guard(main)
