"""Exported models: plain PyTorch, torch.save, safetensors and transformers compute what the model computes."""

import ast
import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_systems import CASES, SHALLOW, narrow_config, random_ids, random_model
from untrained_run import make_untrained_run

from train.artifact.storage import load_model
from train.checkpoint import load_weights
from train.common.errors import UserError
from train.config import Config
from train.data.tokenizer import load_tokenizer
from train.export import formats, golf_inference
from train.export.__main__ import main
from train.export.formats import FORMATS, Exported
from train.generate.load import load
from train.model.gpt import GPT
from train.recipes import load_recipe
from train.run.folder import RunFolder

WINDOW = 12


def quickstart(**changes: object) -> Config:
    narrow = {"model_dim": 32, "rope_dims": 4, "ve_dim": 12, "vocab_size": 259, "rope_train_seq_len": 8}
    return load_recipe("quickstart").config(**narrow, **changes)


CONFIGS = {
    **{f"{system}, {'re' if recurs else 'no re'}currence": narrow_config(system, **({} if recurs else {"recur_layers": ()}))
       for system, recurs in CASES},
    "quickstart": quickstart(),
    "quickstart, never recurrent": quickstart(recur_layers=()),
    "documents": narrow_config("sp8192", document_masking=True, smear_gate="document", bigram_vocab_size=41, bigram_dim=12),
    "documents, published gate": narrow_config("sp4096", document_masking=True),
    "trigrams": narrow_config("sp1024", trigram=True, **SHALLOW["sp1024"]),
    "a repeat in the decoder": narrow_config("sp8192", parallel_start_layer=9, recur_layers=(8, 9)),
    "few learnt repeats": narrow_config("sp4096", recur_layers=(2, 3, 4), recur_scale_params=1),
    "one layer": narrow_config("baseline", num_layers=1),
    "three passes, eight skips": narrow_config("sp8192", num_loops=2, skip_rows=8),
    "frontier, leaky smear gate": narrow_config("frontier", smear_gate_bos_fix=False),
    "no projections": narrow_config("sp8192", bigram_vocab_size=41, bigram_dim=32, ve_dim=16),
    "rounded frequencies": narrow_config("sp8192", rotary_table="bf16_frequencies", recur_layers=()),
}  # fmt: skip


def plain(model: GPT, window: int = WINDOW) -> golf_inference.Golf:
    """The exported model, in the dtype of the original."""
    exported = Exported(model, window)
    made = golf_inference.Golf(SimpleNamespace(**json.loads(json.dumps(exported.config))))
    made.to(model.compute_dtype).load_state_dict(model.state_dict())
    return made.eval()


def scored(model: GPT, ids: torch.Tensor, window: int = WINDOW) -> torch.Tensor:
    """Logits as the evaluation computes them: a short text fills a window of one length."""
    missing = max(window - ids.shape[1], 0)
    with torch.no_grad():
        padded = torch.nn.functional.pad(ids, (0, missing))
        return model.logits(padded, recurrence=True)[:, : ids.shape[1]]


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_pytorch_computes_the_scored_logits(name: str) -> None:
    model = random_model(CONFIGS[name]).eval()
    if model.recur_scales is not None:
        # not trained, so not random yet
        torch.nn.init.uniform_(model.recur_scales)
    made = plain(model)
    # a short text, a window, and a longer text, whose rotary base is higher
    for length in (1, 5, WINDOW, 19):
        ids = random_ids(model.config, 2, length)
        with torch.no_grad():
            torch.testing.assert_close(made(ids), scored(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("embed_dtype", ["float32", "bfloat16"])
def test_both_dtypes_of_the_tables_give_the_same_float32_logits(embed_dtype: str) -> None:
    for config in (quickstart(embed_dtype=embed_dtype), narrow_config("sp1024", embed_dtype=embed_dtype)):
        torch.manual_seed(3)
        model = GPT(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        assert model.embedding.weight.dtype == getattr(torch, embed_dtype) and model.compute_dtype == torch.float32
        ids = random_ids(config, 2, 19)
        with torch.no_grad():
            found = plain(model)(ids)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, scored(model, ids), rtol=1e-4, atol=1e-4)


def test_the_file_without_golf_kernels_needs_torch_alone(tmp_path: Path) -> None:
    tree = ast.parse(Path(golf_inference.__file__).read_text())
    imported = {
        (node.names[0].name if isinstance(node, ast.Import) else node.module).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors"}
    for name in ("modeling_golf.py", "tokenization_golf.py"):
        assert "import" in (source := Path(formats.__file__).with_name(name).read_text())
        assert "golf_kernels" not in source.partition("import")[2].partition("class")[0] and "from train" not in source


def test_plain_pytorch_generates() -> None:
    model = random_model(CONFIGS["sp4096, recurrence"]).eval()
    made, ids = plain(model), random_ids(model.config, 1, 3)
    found = made.generate(ids, 20)
    assert torch.equal(found[:, :3], ids)
    for place in range(3, 23):
        context = found[:, max(place - WINDOW, 0) : place]
        assert found[0, place] == scored(model, context)[0, -1].argmax()
    torch.manual_seed(0)
    drawn = made.generate(ids, 20, temperature=1.0)
    torch.manual_seed(0)
    assert torch.equal(drawn, made.generate(ids, 20, temperature=1.0)) and not torch.equal(drawn, found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained_run(tmp_path_factory.mktemp("untrained"))


def test_a_state_dict_holds_the_artifacts_weights_or_the_trained_ones(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--to", "state_dict"]) == 0
    found = torch.load(run / "model_state_dict.pt", weights_only=True)
    model = load_model(run / "model.golf")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(model.state_dict(), torch.float32)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in model.state_dict().items())
    assert main([str(run), "--to", "state_dict", "--weights", "master"]) == 0
    trained = torch.load(run / "weights_state_dict.pt", weights_only=True)
    master = load_weights(RunFolder(run)).state_dict()
    assert all(torch.equal(trained[name], tensor.float()) for name, tensor in master.items())
    assert not torch.equal(trained["blocks.0.mlp.up"], found["blocks.0.mlp.up"])
    # an artifact alone, to a file that is named
    assert main([str(run / "model.golf"), "--to", "state_dict", "--out", str(tmp_path / "a.pt")]) == 0
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)


def test_a_killed_export_is_cleared_and_a_running_one_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    killed = (run / ".model_hf.abc.part", run / ".model_state_dict.pt.abc.part")
    found: list[bool] = []

    def write(_: Exported, path: Path) -> None:
        # `writing` deletes unfinished files, so another process must not enter it now
        with open(run / ".writing.lock", "ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.extend(part.exists() for part in killed)

    monkeypatch.setitem(FORMATS, "state_dict", replace(FORMATS["state_dict"], write=write))
    for model in (run, run / "model.golf"):
        (killed[0] / "hf").mkdir(parents=True)
        killed[1].touch()
        assert main([str(model), "--to", "state_dict"]) == 0
    assert found == [False] * 4
    # an output elsewhere needs no lock, and so no right to write into the run folder
    monkeypatch.setattr(RunFolder, "held", lambda *_, **__: pytest.fail("locked"))
    monkeypatch.setitem(FORMATS, "state_dict", replace(FORMATS["state_dict"], write=lambda *_: None))
    assert main([str(run), "--to", "state_dict", "--out", str(tmp_path / "a.pt")]) == 0


def test_what_cannot_be_written_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, problem in (
        ([run, "--to", "state_dict", "--out", tmp_path / "no" / "a.pt"], r"--out: the folder .*no does not exist"),
        ([run / "model.golf", "--to", "state_dict", "--weights", "master"], "--weights: .*: give the run folder"),
        ([run, "--to", "hf", "--out", tmp_path], f"--out: {tmp_path} exists: delete it, or choose another"),
        (
            [run, "--to", "state_dict", "--out", run / "config.json"],
            "--out: .*config.json exists: delete it, or choose another",
        ),
        ([run, "--to", "hf", "--tokenizer", tmp_path / "none"], "--tokenizer: .*none: no such file"),
    ):
        with pytest.raises(UserError, match=problem):
            main([*map(str, arguments)])
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for name in ("hf", "safetensors"):
        with pytest.raises(ModuleNotFoundError):
            main([str(run), "--to", name, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_safetensors_file_is_the_whole_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    assert main([str(run), "--to", "safetensors", "--out", str(path)]) == 0
    loaded = load(run)
    ids = random_ids(loaded.model.config, 2, 40)
    # in another process: the file alone, without this project
    script = "from golf_inference import load; import torch, sys; torch.save(load(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])"
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "golf_inference.py").write_bytes(Path(golf_inference.__file__).read_bytes())
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), scored(loaded.model, ids, 32), rtol=1e-4, atol=1e-4)


def test_transformers_loads_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path / "tiny_hf"
    assert main([str(run), "--to", "hf", "--out", str(folder)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded = load(run)
    for length in (5, 40):
        ids = random_ids(loaded.model.config, 2, length)
        with torch.no_grad():
            found = model(ids).logits
        torch.testing.assert_close(found, scored(loaded.model, ids, 32), rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    plain_tokenizer = load_tokenizer(run.parent / "data" / "tiny_300_bpe.model", 300)
    text = "The  quick 日本 fox"
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, *plain_tokenizer.Encode(text)]]
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "The quick 日本 fox"
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    same = golf_inference.Golf.generate(plain(loaded.model, 32), inputs["input_ids"], 8)
    # transformers ends the text at BOS
    assert (
        written[0].tolist() == same[0, : written.shape[1]].tolist() and written.shape[1] > inputs["input_ids"].shape[1]
    )
    with pytest.raises(ValueError, match="the model reads no padding"):
        model(torch.tensor([[1, 5]]), attention_mask=torch.tensor([[0, 1]]))
    # what transformers saves, it loads again
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, found)
