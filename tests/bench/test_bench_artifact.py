"""The artifact benchmark: figures against the formulas, real files and real scores; no row for a codec that loses a bit."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from untrained_run import make_untrained_run, run_truth

from benchmarks import bench_artifact
from benchmarks.measure.common import CheckFailed
from train.artifact.codecs import CODECS
from train.artifact.storage import write_artifact
from train.checkpoint import load_weights
from train.common.errors import UserError
from train.config import Config
from train.quantize.quantize_model import quantize_model
from train.run.folder import RunFolder


@pytest.fixture(scope="module")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained_run(tmp_path_factory.mktemp("untrained"))


def test_entropy_and_its_prediction() -> None:
    codes = np.array([0, 0, 0, 0, -1, -1, 5, 7], np.int8)
    assert bench_artifact.entropy_bytes(codes.tobytes()) == pytest.approx((4 * 1 + 2 * 2 + 2 * 3) / 8)
    assert bench_artifact.entropy_bytes(b"") == 0
    # published with #1394
    assert bench_artifact.predicted_bits(6, 12.85) == pytest.approx(3.363, abs=5e-4)
    assert bench_artifact.predicted_bits(8, 20.0) == pytest.approx(4.725, abs=5e-4)


def test_made_codes_have_the_predicted_entropy() -> None:
    tensors = bench_artifact.made_tensors(layers=1, dim=128, vocab_size=1024)
    entropy = bench_artifact.codec_rows(tensors, Config(), [])[0]
    for group, bits, sigmas in (("embedding.weight", 8, 20.0), ("blocks.*.mlp.up", 6, 12.85)):
        codes = tensors[group.replace("*", "0")].shape.numel()
        # a code of 1.3 or 2.4 steps' deviation has a little less than the differential entropy's limit
        assert 8 * entropy.groups[group] / codes == pytest.approx(bench_artifact.predicted_bits(bits, sigmas), abs=0.05)


def test_rows_are_the_sizes_of_real_files(tmp_path: Path) -> None:
    tensors = bench_artifact.made_tensors(layers=2, dim=16, vocab_size=32)
    rows = bench_artifact.codec_rows(tensors, Config(), list(CODECS))
    assert [row.codec for row in rows] == ["entropy", *CODECS]
    for row in rows[1:]:
        info = write_artifact(tmp_path / "a", tensors, Config(codec=row.codec), code_bytes=0, max_bytes=10**9)
        assert row.file_bytes == (tmp_path / "a").stat().st_size
        assert row.groups == {part.group: part.packed_bytes for part in info.sections if part.type.startswith("int")}
        assert row.encode_s > 0 and row.read_s > 0


@pytest.mark.parametrize("dependent", [False, True])
def test_less_than_the_entropy_is_explained_where_a_codec_takes_less(
    dependent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = bench_artifact.made_tensors(layers=1, dim=64, vocab_size=64)
    if dependent:
        # each row is the first one again, which zlib sees
        tensors = {
            name: dataclasses.replace(tensor, codes=tensor.codes[:1].expand_as(tensor.codes).contiguous())
            for name, tensor in tensors.items()
        }
    bench_artifact.report_codecs(tensors, Config(), ["zlib"])
    table, _, _ = capsys.readouterr().out.partition("\n\n")
    assert bool(re.search(r"^zlib .* -\d", table, re.MULTILINE)) == dependent
    assert table.endswith(bench_artifact.BELOW_ENTROPY) == dependent


def test_a_codec_that_loses_a_bit_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CODECS["lzma"]
    lossy = dataclasses.replace(honest, _encode=lambda data: honest.encode(data[:-1] + bytes([data[-1] ^ 1])))
    monkeypatch.setitem(CODECS, "lzma", lossy)
    tensors = bench_artifact.made_tensors(layers=1, dim=64, vocab_size=64)
    with pytest.raises(CheckFailed, match="lzma: the artifact read back differs from the one written"):
        bench_artifact.codec_rows(tensors, Config(), ["lzma"])


def test_the_command_prints_tables_and_draws_the_curve(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = RunFolder(untrained_run), tmp_path / "curve.png"
    config = folder.trained_config()
    k = config.matrix_clip_sigmas
    arguments = [str(untrained_run), "--codecs", "zlib,ans", "--curve-codecs", "zlib,ans", "--sigmas", f"6,{k}"]
    before = sorted(untrained_run.iterdir())
    assert bench_artifact.main([*arguments, "--out", str(out)]) == 0
    assert sorted(untrained_run.iterdir()) == before
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert re.search(r"^ans +[\d,]+ +\d\.\d{4} +[+-][\d.]+% +\d+\.\d{3} +\d+\.\d{3}$", text, re.MULTILINE)
    assert "blocks.*.mlp.up" in text
    for sigmas in (6.0, k):
        clipped = config.replace(matrix_clip="sdclip", matrix_clip_sigmas=sigmas, codec="ans")
        run = tmp_path / f"{sigmas:g}"
        run.mkdir()
        (run / "config.json").write_bytes(folder.config.read_bytes())
        tensors = quantize_model(load_weights(folder), clipped, {})
        info = write_artifact(run / "model.golf", tensors, clipped, code_bytes=0, max_bytes=10**9)
        (line,) = re.findall(rf"^ *{sigmas:g} .*$", text, re.MULTILINE)
        *_, size, bpb = line.split()
        assert int(size.replace(",", "")) == info.model_bytes
        nats, _, count = run_truth(run, config.window, 0)
        assert float(bpb) == pytest.approx(nats / np.log(2) / count, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN: give either a run folder or --made"),
        (["run", "--made"], "RUN: give either a run folder or --made"),
        (["run", "--codecs", "rar"], "codecs: expected names among brotli.* got 'rar'"),
        (["run", "--sigmas", "wide"], "--sigmas: expected numbers separated by commas, got 'wide'"),
        (["/nowhere"], "no such run folder"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_artifact.main(arguments)
