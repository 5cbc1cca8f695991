"""`convert --from`: the files of published scripts become artifacts, bit for bit; other files are refused by name."""

import io
import os
import pickle
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import zstandard
from artifact_example import bits
from published_tables import NARROW, own_name, packed, random_content, table, unpacked, weights
from torch import Tensor

from train.artifact.__main__ import main
from train.artifact.export import PUBLISHED_FORMATS
from train.artifact.storage import load_model, read_artifact
from train.common.errors import UserError
from train.quantize.tensors import QuantizedTensor

FORMS = sorted(PUBLISHED_FORMATS)


def convert(file: Path, out: Path, *options: str) -> Path:
    main(["convert", str(file), "--out", str(out), *options])
    return out


def imported(file: Path, form: str, out: Path) -> Path:
    return convert(file, out, "--from", form, *NARROW[form][1], "--codec", "zlib")


def flat(content: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value of a file's contents with its keys, in order; tensors as dtype, shape and bits."""
    if isinstance(content, dict):
        return [(path, len(content)), *(row for key in content for row in flat(content[key], f"{path}/{key}"))]
    if isinstance(content, Tensor):
        return [(path, (content.dtype, content.shape, bits(content)))]
    return [(path, (type(content), content))]


@pytest.mark.parametrize("form", FORMS)
def test_a_published_file_survives_the_round_trip_bit_for_bit(form: str, tmp_path: Path) -> None:
    content = random_content(form)
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed(form, content))
    artifact = imported(file, form, tmp_path / "model.golf")
    back = convert(artifact, tmp_path / "back.ptz", "--format", form)
    assert flat(unpacked(form, back.read_bytes())) == flat(content)
    # from here on the bytes are the same
    again = imported(back, form, tmp_path / "again.golf")
    assert again.read_bytes() == artifact.read_bytes()
    assert convert(again, tmp_path / "again.ptz", "--format", form).read_bytes() == back.read_bytes()
    direct = convert(file, tmp_path / "direct.ptz", "--from", form, *NARROW[form][1], "--format", form)
    assert direct.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_the_model_has_the_published_weights(form: str, tmp_path: Path) -> None:
    content = random_content(form, seed=1)
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed(form, content))
    model = load_model(imported(file, form, tmp_path / "model.golf"))
    parameters = dict(model.named_parameters())
    read = 0
    for name, weight in weights(form, content).items():
        own, row = own_name(name)
        parameter = parameters[own] if row is None else parameters[own][row].reshape(weight.shape)
        # the scripts too cast to the parameter's dtype
        assert torch.equal(parameter, weight.to(parameter.dtype)), name
        read += weight.numel()
    assert read == sum(parameter.numel() for parameter in parameters.values())
    tensors = read_artifact(tmp_path / "model.golf").tensors
    coded = {tensor.bits for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)}
    assert coded == {"baseline": {8}, "pr122": {6}}.get(form, {6, 8})


@pytest.mark.parametrize("form", FORMS)
def test_the_full_size_table_fits_the_recipe(form: str, tmp_path: Path) -> None:
    content = {
        dictionary: {
            name: torch.zeros(kind.sizes, dtype=getattr(torch, kind.dtype)) if hasattr(kind, "sizes") else kind
            for name, kind in entries.items()
        }
        if isinstance(entries, dict)
        else entries
        for dictionary, entries in table(form).items()
    }
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed(form, content))
    artifact = read_artifact(convert(file, tmp_path / "model.golf", "--from", form, "--codec", "zlib"))
    counts = {
        "baseline": 17_059_912,
        "pr122": 19_941_440,
        "pr262": 19_745_345,
        "pr1392": 34_400_347,
        "pr1471": 37_022_812,
    }
    assert sum(tensor.shape.numel() for tensor in artifact.tensors.values()) == counts[form]


def test_notes_on_how_the_codes_were_made_are_no_part_of_the_model(tmp_path: Path) -> None:
    content, file = random_content("pr1471"), tmp_path / "final_model.ptz"
    file.write_bytes(packed("pr1471", content))
    expected = imported(file, "pr1471", tmp_path / "model.golf").read_bytes()
    for name, kind in content["m"].items():
        if kind == {"type": "int6"}:
            kind.update(method="gptq", k=12.85)
        elif kind == {"type": "int8"}:
            content["m"][name] = {"type": "int8_sdclip"}
    file.write_bytes(packed("pr1471", content))
    assert imported(file, "pr1471", tmp_path / "model.golf").read_bytes() == expected


def renamed(dictionary: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[dictionary][new] = content[dictionary].pop(old)

    return change


def without(dictionary: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[dictionary].pop(name)


def with_value(dictionary: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[dictionary].update({name: value})


SETTINGS = r"give the settings of the model in the file: --recipe NAME --SETTING VALUE$"
NO_FILE = r"it is not a file of format \w+$"
Q = "blocks.0.attn.c_q.weight"


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        # the three names that were wrong
        ("pr1471", renamed("m", "lane_merge", "lane_mix"), rf"m\['lane_merge'\]: expected an entry, found none: {SETTINGS}"),
        ("pr1392", renamed("m", "recur_scales.1", "recur_scales"), r"m\['recur_scales.1'\]: expected an entry, found none"),
        (
            "pr122",
            with_value("qmeta", Q, {"scheme": "per_row", "axis": 0, "bits": 6, "shape": [16, 16]}),
            rf"qmeta\['{Q}'\]: expected .*'num_bits': 6, .*'packed': True, 'shape': \[16, 16\]}}, found {{.*'bits': 6.*: {NO_FILE}",
        ),
        # missing
        ("pr262", without("w", f"{Q}.scale"), rf"w\['{Q}.scale'\]: expected float16 \(16,\), found none: {SETTINGS}"),
        ("pr262", without("w", "smear.gate"), rf"w\['smear.gate'\]: expected float16 \(16,\), found none: {SETTINGS}"),
        ("baseline", without("scales", Q), rf"scales\['{Q}'\]: expected an entry, found none"),
        ("baseline", without("qmeta", Q), rf"qmeta\['{Q}'\]: expected an entry, found none"),
        ("baseline", without("passthrough", "skip_weights"), r"quantized or passthrough\['skip_weights'\]: expected an entry, found none"),
        ("pr1471", lambda content: content.pop("w"), r"contents: expected a dictionary with 'w' and 'm', found one with \['m'\]"),
        ("pr122", lambda content: content.pop("__quant_format__"), r"contents: expected .* '__quant_format__': 'w6_e16_clean_per_row_v1', found"),
        ("pr122", lambda content: content.pop("dtypes"), r"'dtypes': expected an entry, found none"),
        # surplus
        ("pr1471", with_value("w", "smear.gate", torch.zeros(16).half()), r"w\['smear.gate'\]: expected no such entry, found one"),
        ("pr1471", with_value("m", "smear.gate", "passthrough"), r"m\['smear.gate'\]: expected no such entry, found one"),
        ("baseline", with_value("quantized", "odd", 1), r"quantized\['odd'\]: expected no such entry, found one"),
        ("baseline", with_value("quantized", "blocks.0.attn_scale", 1), r"quantized\['blocks.0.attn_scale'\]: expected no such entry"),
        ("baseline", with_value("passthrough", Q, 1), rf"passthrough\['{Q}'\]: expected no such entry, found one"),
        ("pr122", without("passthrough_orig_dtypes", "tok_emb.weight"), r"passthrough_orig_dtypes\['tok_emb.weight'\]: expected an entry"),
        ("pr122", with_value("passthrough_orig_dtypes", "skip_weights", "float32"), r"passthrough_orig_dtypes\['skip_weights'\]"),
        ("pr1392", lambda content: content.update(odd={}), r"'odd': expected no such entry, found one"),
        # misshaped
        ("pr1471", with_value("w", f"{Q}.q", torch.zeros(8, 16).char()), rf"w\['{Q}.q'\]: expected int8 \(16, 16\), found int8 \(8, 16\): {SETTINGS}"),
        ("pr1392", with_value("w", "recur_scales.0", torch.zeros(8).half()), r"w\['recur_scales.0'\]: expected float16 \(16,\), found float16 \(8,\)"),
        ("pr122", with_value("quantized", Q, torch.zeros(191).byte()), rf"quantized\['{Q}'\]: expected uint8 \(192,\), found uint8 \(191,\)"),
        # of another dtype
        ("pr262", with_value("w", f"{Q}.scale", torch.zeros(16)), rf"w\['{Q}.scale'\]: expected float16 \(16,\), found float32 \(16,\): {NO_FILE}"),
        ("pr262", with_value("w", f"{Q}.q", torch.zeros(16, 16).byte()), rf"w\['{Q}.q'\]: expected int8 \(16, 16\), found uint8 \(16, 16\)"),
        ("baseline", with_value("passthrough", "skip_weights", torch.zeros(1, 16).half()), r"passthrough\['skip_weights'\]: expected float32 \(1, 16\), found float16"),
        ("baseline", with_value("scales", Q, torch.tensor(0.5)), rf"scales\['{Q}'\]: expected float16 \(16,\), found float32 \(\)"),
        ("baseline", with_value("dtypes", "tok_emb.weight", "float32"), r"dtypes\['tok_emb.weight'\]: expected 'bfloat16', found 'float32': add --embed_dtype float32$"),
        ("baseline", with_value("dtypes", Q, "float64"), rf"dtypes\['{Q}'\]: expected 'float32', found 'float64': {NO_FILE}"),
        # of another kind
        ("pr262", with_value("m", Q, {"type": "int61"}), rf"m\['{Q}'\]: expected"),
        ("pr262", with_value("m", Q, {"type": "int9"}), rf"m\['{Q}'\]: expected 'passthrough' or {{'type': 'int2'}} … {{'type': 'int8'}}, found {{'type': 'int9'}}"),
        ("pr262", with_value("m", "smear.gate", {"type": "int8"}), r"m\['smear.gate'\]: expected 'passthrough', as it is no matrix, found"),
        ("pr262", with_value("m", Q, torch.zeros(3)), rf"m\['{Q}'\]: expected .*, found float32 \(3,\)"),
        ("pr1392", with_value("w", f"{Q}.q", torch.full((16, 16), 32).char()), rf"w\['{Q}.q'\]: expected int6 codes in -32..31, found 32..32"),
        ("pr1471", with_value("w", f"{Q}.q", "text"), rf"w\['{Q}.q'\]: expected int8 \(16, 16\), found 'text'"),
        ("pr1471", with_value("w", f"{Q}.q", torch.zeros(16, 16, dtype=torch.int8, device="meta")), rf"w\['{Q}.q'\]: expected int8"),
        ("pr1471", lambda content: content.update(m=[]), r"m: expected a dictionary, found \[\]"),
        ("baseline", lambda content: content.update(qmeta=3), r"qmeta: expected a dictionary, found 3"),
        ("baseline", with_value("qmeta", Q, {"scheme": "per_row", "axis": torch.zeros(2)}), rf"qmeta\['{Q}'\]: expected"),
        ("baseline", with_value("qmeta", Q, {"scheme": "per_row", "axis": False}), rf"qmeta\['{Q}'\]: expected"),
    ],
)  # fmt: skip
def test_an_entry_that_does_not_fit_is_named(
    form: str, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    content = random_content(form)
    change(content)
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed(form, content))
    with pytest.raises(UserError, match=rf"^{file}: read as {form}: {message}") as caught:
        imported(file, form, tmp_path / "model.golf")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["final_model.ptz"]


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed("pr1471", random_content("pr1471")))
    with pytest.raises(UserError, match=rf"read as pr1471: m\['blocks.3.resid_mix'\]: expected an entry.* {SETTINGS}"):
        convert(file, tmp_path / "model.golf", "--from", "pr1471", *NARROW["pr1471"][1], "--num-layers", "4", "--recur-layers", "1")  # fmt: skip


@pytest.mark.parametrize("wrong", [*FORMS, "golf", "torch.save", "xz", "nothing", "noise"])
def test_a_wrong_format_is_recognized(wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    content = random_content("pr1392")
    plain = io.BytesIO()
    torch.save(content, plain)
    others: dict[str, tuple[bytes, str]] = {
        "golf": (b"\x89GOLF\r\n\x1a" + bytes(99), "this is an artifact of this project: leave --from out$"),
        "torch.save": (plain.getvalue(), "this is a torch.save file without compression: give"),
        "xz": (b"\xfd7zXZ\0" + bytes(99), "this is an xz stream, which none"),
        "nothing": (b"", "the file is cut or damaged: copy it again$"),
        "noise": (bytes(range(7, 207)), "the file is cut or damaged: copy it again$"),
    }
    twins = {"pr122": "pr262", "pr262": "pr122"}
    for form in FORMS:
        if wrong == form:
            continue
        if wrong in others:
            data, message = others[wrong]
        else:
            data, message = packed(wrong, random_content(wrong)), f"try --from {wrong}$"
            if wrong in twins and form != twins[wrong]:
                message = "this is a zstd stream: try --from pr122 or --from pr262$"
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"^{file}: read as {form}: .*{message}"):
            imported(file, form, tmp_path / "model.golf")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_or_changed_file_is_refused(form: str, tmp_path: Path) -> None:
    whole, file, out = packed(form, random_content(form)), tmp_path / "file", tmp_path / "model.golf"
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:9], whole + b"\0\0"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"^{file}: read as {form}: codec .*file is cut or damaged: copy it again$"):
            imported(file, form, out)
    assert os.listdir(tmp_path) == ["file"]
    file.write_bytes(whole)
    expected = imported(file, form, out).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (12,), generator=generator).tolist():
        changed = bytearray(whole)
        changed[place] ^= 0x10
        file.write_bytes(changed)
        # brotli has no checksum; those of the archive see a change of its contents
        with suppress(UserError):
            assert imported(file, form, out).read_bytes() == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_bomb_does_not_go_off(form: str, tmp_path: Path) -> None:
    large = bytes(60_000_000)
    compress = {
        "zlib": zlib.compress,
        "zstd": zstandard.compress,
        "brotli": lambda data: brotli.compress(data, quality=1),
    }
    file = tmp_path / "bomb"
    file.write_bytes(compress[PUBLISHED_FORMATS[form].codec](large))
    tracemalloc.start()
    with pytest.raises(UserError, match=f"^{file}: read as {form}: "):
        imported(file, form, tmp_path / "model.golf")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as entries:
        entries.writestr("archive/data.pkl", pickle.dumps({}))
        entries.writestr("archive/data/0", bytes(50_000_000))
    file = tmp_path / "bomb"
    file.write_bytes(zlib.compress(archive.getvalue()))
    with pytest.raises(UserError, match=r"contents: expected a torch.save file .*compressed or overlapping entries"):
        imported(file, "baseline", tmp_path / "model.golf")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = random_content("pr1392")
    content["m"]["smear.gate"] = Hostile()
    file = tmp_path / "final_model.ptz"
    file.write_bytes(packed("pr1392", content))
    with pytest.raises(UserError, match=r"read as pr1392: contents: expected a torch.save file of tensors, numbers and names") as caught:  # fmt: skip
        imported(file, "pr1392", tmp_path / "model.golf")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["final_model.ptz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.ptz", "--from", "pr262"], "none.ptz: no such file: give the compressed model of a submission"),
        ([".", "--from", "pr262"], r"\.: no such file: give"),
        (["file", "--recipe", "baseline", "--codec", "zlib"], "--recipe: an artifact has its own settings: leave it out, or give --from FORMAT"),
        (["file", "--num_layers", "2", "--codec", "zlib"], "--num_layers: an artifact has its own settings"),
        (["file", "--from", "pr262", "--num_layers", "x"], "--num_layers: expected a whole number"),
        (["file", "--from", "pr262", "--recipe", "x"], "recipe: no recipe 'x'"),
        (["file", "--from", "pr262", "--format", "pr262", "--codec", "zlib"], "--codec: format pr262 has its own codec"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        main(["convert", *arguments, "--out", "model.golf"])
    assert os.listdir() == ["file"]
