from __future__ import annotations

import pytest
import torch
from model_systems import SYSTEMS, block_matrices, narrow_config, random_model

from train.config import Config
from train.model.gpt import GPT
from train.model.parameters import ParameterRow, classify, mflop_per_token, parameter_table
from train.model.skips import UNetSkips

SMALL = {"vocab_size": 1024, "num_layers": 11, "mlp_mult": 3.0}
SMEAR = {"smear_gate": "published"}
VE = {"ve_dim": 128, "ve_layers": (9, 10)}
LARGE = {"num_layers": 11, "mlp_mult": 4.0}
LANES = {"parallel_start_layer": 7, "parallel_form": "lanes"}


def rows_of(config: Config) -> list[ParameterRow]:
    with torch.device("meta"):
        return parameter_table(GPT(config))


# the published counts
COUNTS = [
    (SYSTEMS["baseline"], 17_059_912),
    ({"mlp_mult": 1.9375}, 16_765_000),
    ({"num_layers": 10}, 18_897_488),
    ({"mlp_mult": 3.0}, 21_778_504),
    ({"mlp_mult": 3.0, "bigram_vocab_size": 4096} | SMEAR, 22_368_841),
    (SYSTEMS["sp1024"], 19_745_345),
    (SMALL | SMEAR | {"bigram_vocab_size": 2048}, 26_829_913),
    (SMALL | SMEAR | VE | {"bigram_vocab_size": 2048}, 26_993_756),
    (SMALL | SMEAR | VE | {"bigram_vocab_size": 1536}, 26_928_220),
    (SMALL | SMEAR | VE | {"bigram_vocab_size": 2816, "bigram_dim": 112}, 27_038_812),
    (SYSTEMS["sp2048"], 19_941_440),
    (SYSTEMS["sp4096"], 34_400_347),
    (LARGE | VE | {"vocab_size": 4096, "skip_gates": True}, 34_401_371),
    (LARGE | VE | LANES | {"vocab_size": 4096, "skip_gates": True}, 34_401_372),
    (SYSTEMS["sp8192"], 37_022_812),
]


@pytest.mark.parametrize(("settings", "published"), COUNTS)
def test_parameter_counts_are_the_published_ones(settings: dict[str, object], published: int) -> None:
    assert sum(row.count for row in rows_of(Config(**settings))) == published


def test_seven_skips_give_the_counts_of_1394_and_1477() -> None:
    # layers that run three times take up seven skips, which no setting here makes: the parts are put together by hand
    def without_skips(**settings: object) -> list[ParameterRow]:
        return [row for row in rows_of(Config(**LARGE, **settings)) if not row.name.startswith("skips.")]

    rows = without_skips(vocab_size=8192)
    skips = sum(parameter.numel() for parameter in UNetSkips(7, 512, gated=True).parameters())
    assert sum(row.count for row in rows) + skips == 35_943_512
    assert sum(row.count * row.dtype.itemsize for row in rows) + 4 * skips == 135_385_440
    # #1477 adds the mix of the lanes
    lanes = without_skips(**LANES, vocab_size=8192)
    assert sum(row.count for row in lanes) + skips == 35_943_513


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        (SYSTEMS["baseline"], 67_191_072),
        (SYSTEMS["sp2048"], 77_668_608),
        (SMALL | SMEAR | {"bigram_vocab_size": 2048}, 105_746_788),
        (SYSTEMS["sp4096"], 132_358_508),
        (SYSTEMS["sp8192"], 137_605_488),
        (SYSTEMS["sp1024"], 77_408_516),
    ],
)
def test_bytes_of_the_state_are_the_published_ones(settings: dict[str, object], published: int) -> None:
    assert sum(row.count * row.dtype.itemsize for row in rows_of(Config(**settings))) == published


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        (SYSTEMS["baseline"], (130.5, 130.5)),
        (SYSTEMS["sp2048"], (220.2, 220.2)),
        (SYSTEMS["sp1024"], (167.1, 167.1)),
        ({"mlp_mult": 3.0, "bigram_vocab_size": 4096, "train_seq_len": 2048}, (187.6, 187.6)),
        (SMALL | {"bigram_vocab_size": 2048, "train_seq_len": 2048}, (228.5, 228.5)),
        (SMALL | VE | {"bigram_vocab_size": 2816, "bigram_dim": 112, "train_seq_len": 2048}, (228.6, 228.6)),
        (SYSTEMS["sp4096"], (272.3, 295.9)),
        (SYSTEMS["sp4096"] | {"recur_form": "unroll"}, (272.3, 319.5)),
        (SYSTEMS["sp8192"], (284.9, 355.7)),
        (LARGE | {"vocab_size": 8192, "train_seq_len": 2048}, (284.7, 284.7)),
    ],
)
def test_arithmetic_per_token_is_the_published_one(settings: dict[str, object], published: tuple[float, float]) -> None:
    config = Config(**settings)
    found = [mflop_per_token(config, recurrence=recurrence) for recurrence in (False, True)]
    assert found == pytest.approx(published, abs=0.0501)


def test_arithmetic_grows_with_the_text_by_attention_alone() -> None:
    config = Config(**SYSTEMS["sp2048"])
    short, long = (mflop_per_token(config.replace(train_seq_len=n), recurrence=False) for n in (4096, 8192))
    assert long - short == pytest.approx(6 * 8 * 4096 * 512 / 1e6)


def test_classes_of_every_tensor_of_1392() -> None:
    rows = {row.name: row for row in rows_of(Config(**SYSTEMS["sp4096"]))}
    kinds: dict[str, set[str]] = {}
    for name, row in rows.items():
        kinds.setdefault(row.kind, set()).add(".".join(part for part in name.split(".") if not part.isdigit()))
    assert kinds == {
        "embedding": {"embedding.weight", "ve.embedding"},
        "matrix": {f"blocks.attention.{name}" for name in ("query", "key", "value", "output")}
        | {"blocks.mlp.up", "blocks.mlp.down"},
        "scalar": {
            "blocks.attention.q_gain", "blocks.resid_mix", "blocks.attn_scale", "blocks.mlp_scale", "skips.weights",
            "smear.gate", "ve.proj", "ve.scale", "ve.layer_scales", "recur_scales",
        },
    }  # fmt: skip
    assert rows["blocks.3.attention.key"].shape == (256, 512) and rows["blocks.3.mlp.up"].shape == (2048, 512)
    assert rows["recur_scales"].shape == (2, 512) and rows["ve.proj"].shape == (256, 128)


def test_projections_are_matrices_where_muon_trains_them() -> None:
    sp8192 = {row.name: row.kind for row in rows_of(Config(**SYSTEMS["sp8192"]))}
    sp1024 = {row.name: row.kind for row in rows_of(Config(**SYSTEMS["sp1024"]))}
    assert sp8192["ve.proj"] == sp1024["bigram.proj"] == "matrix"
    assert sp8192["skips.gates"] == sp8192["lane_mix"] == sp1024["bigram.scale"] == "scalar"
    assert sp1024["bigram.embedding"] == "embedding"
    document = {row.name: row.kind for row in rows_of(Config(smear_gate="document"))}
    assert document["smear.gate"] == document["smear.scale"] == "scalar"


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_tables_of_a_real_and_a_meta_model_agree(system: str) -> None:
    config = narrow_config(system)
    assert parameter_table(GPT(config)) == rows_of(config)


def test_classes_hold_for_a_model_that_was_cast() -> None:
    model = random_model(narrow_config("sp8192"))
    assert {row.dtype for row in parameter_table(model)} == {torch.float64}
    matrices = {name for name, _ in model.named_parameters() if classify(name, model.config) == "matrix"}
    assert matrices == {*block_matrices(model), "ve.proj"}
