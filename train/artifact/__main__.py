"""`python -m train.artifact inspect|verify|diff|convert FILE …` shows, checks, compares and converts artifacts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from train.common.progress import announce

if __name__ == "__main__":
    announce("python -m train.artifact: loading PyTorch")

from train.artifact.budget import budget_table
from train.artifact.codecs import CODECS
from train.artifact.difference import difference
from train.artifact.export import PUBLISHED_FORMATS, export
from train.artifact.read_published import read_published
from train.artifact.storage import MODEL_FIELDS, build_model, read_artifact, write_artifact
from train.common.argument_types import add_command
from train.common.errors import UserError, main_guard
from train.common.files import atomic_write, sha256_file
from train.common.wording import counted
from train.config import Config, field_help, parse_value
from train.recipes import load_recipe


def main(arguments: list[str] | None = None) -> int | None:
    options = _parser().parse_args(arguments)
    status: int | None = options.run(options)
    return status


def inspect(options: argparse.Namespace) -> None:
    """Print an artifact's contents and the bytes of each tensor group."""
    artifact = read_artifact(options.file)
    values = artifact.config.to_dict()
    shape = {name: values[name] for name in MODEL_FIELDS}
    if options.json:
        print(json.dumps({"file": str(options.file), "config": shape, **artifact.info.to_dict()}, indent=1))
        return
    parameters = sum(tensor.shape.numel() for tensor in artifact.tensors.values())
    print(f"{options.file}: version {artifact.info.version}, {artifact.info.model_bytes:,} bytes")
    print(
        f"{counted(artifact.info.tensors, 'tensor')}, {parameters:,} parameters, {artifact.info.model_bytes * 8 / parameters:.3f} bits each"
    )
    print(f"model: {' '.join(f'{name}={value}' for name, value in shape.items())}\n")
    print(budget_table(artifact.info.rows()))


def verify(options: argparse.Namespace) -> None:
    """Check an artifact: compare its checksums, decode every section, and build the model."""
    artifact = read_artifact(options.file)
    model, info = build_model(options.file, artifact), artifact.info
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = sha256_file(options.file)
    if options.json:
        report = {"file": str(options.file), "ok": True, "sha256": digest, "parameters": parameters}
        print(json.dumps({**report, "model_bytes": info.model_bytes, "sections": len(info.sections)}, indent=1))
        return
    print(
        f"{options.file}: good: {info.model_bytes:,} bytes, {counted(len(info.sections), 'section')}, "
        f"{counted(info.tensors, 'tensor')}, {parameters:,} parameters\nsha256 {digest}"
    )


def diff(options: argparse.Namespace) -> int:
    """Compare two artifacts. Returns the exit code: 0 for the same model, 1 for different models."""
    found = difference(read_artifact(options.file), read_artifact(options.other))
    print(json.dumps(found.to_dict(), indent=1) if options.json else found.text(str(options.file), str(options.other)))
    return 0 if found.same else 1


def convert(options: argparse.Namespace) -> None:
    if options.codec and options.format != "golf":
        raise UserError(
            f"--codec: format {options.format} has its own codec: leave --codec out, or choose --format golf"
        )
    if not options.out.parent.is_dir():
        raise UserError(f"--out: the folder {options.out.parent} does not exist: create it first")
    changes = options.source is not None or options.format != "golf"
    if changes and options.out.exists() and options.file.exists() and options.out.samefile(options.file):
        raise UserError(f"--out: {options.out} would replace FILE by another format: choose another file")
    config = _settings(options)
    if config is None:
        artifact = read_artifact(options.file)
        config, tensors = artifact.config, artifact.tensors
        if options.format == "golf" and not options.codec:
            raise UserError(f"--codec: needed for format golf: one of {', '.join(CODECS)}")
    else:
        tensors = read_published(options.file, options.source, config)
    before = options.file.stat().st_size
    report = {"file": str(options.file), "out": str(options.out), "format": options.format, "bytes_before": before}
    if options.format == "golf":
        config = config.replace(codec=options.codec or config.codec)
        info = write_artifact(options.out, tensors, config, code_bytes=0, max_bytes=sys.maxsize)
        report |= {"codec": config.codec, "bytes": info.model_bytes}
    else:
        exported = export(tensors, options.format, config)
        atomic_write(options.out, exported.data)
        report |= {"codec": PUBLISHED_FORMATS[options.format].codec, "bytes": len(exported.data)}
        report |= {"payload_bytes": exported.payload_bytes, "pickled_bytes": exported.pickled_bytes}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    details = ", ".join(
        f"{key.removesuffix('_bytes')} {report[key]:,}" for key in ("payload_bytes", "pickled_bytes") if key in report
    )
    print(f"{options.file}: {before:,} bytes\n{options.out}: {report['bytes']:,} bytes{details and f' ({details})'}")


def _settings(options: argparse.Namespace) -> Config | None:
    """Return the settings of the model in a published file, from recipe and flags; None if the file is an artifact."""
    given = {name: text for name in ("recipe", *MODEL_FIELDS) if (text := getattr(options, name)) is not None}
    if options.source is None:
        if given:
            raise UserError(f"--{min(given)}: an artifact has its own settings: leave it out, or give --from FORMAT")
        return None
    recipe = load_recipe(given.pop("recipe", PUBLISHED_FORMATS[options.source].recipe))
    return recipe.config(**{name: parse_value(name, text, f"--{name}") for name, text in given.items()})


def _parser() -> argparse.ArgumentParser:
    run = "runs/quickstart_20260101-120000/model.golf"
    parser = argparse.ArgumentParser(
        prog="python -m train.artifact",
        description="Inspect a run's artifact, verify it, compare it with another or convert it. Nothing in the file is "
        "executed.",
        epilog="examples:\n"
        f"  python -m train.artifact inspect {run}\n"
        f"  python -m train.artifact verify --json {run}\n"
        f"  python -m train.artifact diff {run} runs/other/model.golf\n"
        f"  python -m train.artifact convert {run} --codec ans --out smaller.golf\n"
        f"  python -m train.artifact convert {run} --format pr1471 --out final_model.int6.ptz\n"
        "  python -m train.artifact convert final_model.int6.ptz --from pr1471 --out model.golf\n\n"
        "train/artifact/container.py describes the format byte by byte. Exit code 2: the file is not a valid artifact.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    texts = {
        inspect: (
            "print elements, bytes before and after packing, bits per element and percent of the file for each tensor group",
            "runs/mine/model.golf",
        ),
        verify: (
            "check all checksums, decode every section and build the model",
            "runs/mine/model.golf",
        ),
        diff: (
            "compare the models in two artifacts of any codecs: fields, tensors, codes, weights, bytes; exit code 1 if they "
            "differ",
            "runs/mine/model.golf runs/other/model.golf",
        ),
        convert: (
            "write the same weights with another codec, or in the format of a published submission; --from reads such a file",
            "runs/mine/model.golf --codec ans --out smaller.golf",
        ),
    }
    made = {}
    for function, (about, example) in texts.items():
        made[function] = add_command(commands, parser.prog, function.__name__, about, example, function)
        made[function].add_argument("file", metavar="FILE", type=Path, help="the artifact, e.g. runs/RUN/model.golf")
        made[function].add_argument("--json", action="store_true", help="print one JSON object instead of text")
    made[diff].add_argument("other", metavar="OTHER", type=Path, help="the artifact to compare it with")
    formats = "; ".join(f"{name}: {published.about}" for name, published in PUBLISHED_FORMATS.items())
    made[convert].add_argument("--out", metavar="OUT", type=Path, required=True, help="the file to write")
    made[convert].add_argument(
        "--format",
        default="golf",
        choices=("golf", *PUBLISHED_FORMATS),
        help=f"golf: this project's container, with --codec; {formats} [golf]",
    )
    made[convert].add_argument(
        "--codec", choices=sorted(CODECS), help="codec of format golf [with --from the recipe's]"
    )
    made[convert].add_argument(
        "--from", dest="source", choices=PUBLISHED_FORMATS, help="FILE is a submission's model in this format"
    )
    foreign = made[convert].add_argument_group("settings of the model in a submission's file, which holds none")
    recipes = ", ".join(f"{name}: {published.recipe}" for name, published in PUBLISHED_FORMATS.items())
    foreign.add_argument("--recipe", metavar="NAME", help=f"recipe that has the other settings [{recipes}]")
    for name in MODEL_FIELDS:
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        foreign.add_argument(*sorted(spellings), dest=name, metavar="VALUE", help=field_help(name).replace("%", "%%"))
    return parser


if __name__ == "__main__":
    main_guard(main)
