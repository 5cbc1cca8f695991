"""Case operators: the transform and the bytes per token against a straight-line state machine and published figures."""

import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.config import Config
from train.data.build import build_dataset
from train.data.bulk import build_bulk
from train.data.case_operators import OPERATORS, encode_with_bytes, inverse, restore, restore_parts, transform
from train.data.corpus import Document, stdlib_documents
from train.data.manifest import read_manifest
from train.data.shards import find_shards, read_shard, read_sidecar, write_shard
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.validation import load_validation

VOCAB = 400
T, A, C, E = OPERATORS
OFTEN = [*OPERATORS, *"aaabBZz  é\u0301Éß日\u200b\u212a\ufb01\n\0"]


def random_texts(count: int) -> list[str]:
    """Texts of up to 25 characters: operators, letters, what normalization changes, and any other character."""
    draw = random.Random(0)

    def one() -> str:
        character = chr(draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000))))
        return draw.choice(OFTEN) if draw.random() < 0.8 or 0xD800 <= ord(character) < 0xE000 else character

    return ["".join(one() for _ in range(draw.randrange(26))) for _ in range(count)]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [document for document in itertools.islice(stdlib_documents(), 40) if len(document.text) < 9000][:16]


@pytest.fixture(scope="module")
def model(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer((transform(document.text) for document in documents), VOCAB, path, OPERATORS)
    return path


def plain_transform(text: str) -> str:
    """One character after another."""
    written, place = "", 0
    while place < len(text):
        word = "".join(itertools.takewhile(lambda one: one.isascii() and one.isalpha(), text[place:]))
        if not word:
            written += E * (text[place] in OPERATORS) + text[place]
        elif len(word) > 1 and all(one in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for one in word):
            written += A + word.lower()
        else:
            for index, one in enumerate(word):
                written += (T if index == 0 else C) * one.isupper() + one.lower()
        place += len(word) or 1
    return written


def plain_bytes(tokenizer: SentencePieceProcessor, transformed: str) -> list[int]:
    """The bytes of the characters that the decoder emits while it reads each piece's surface."""
    sizes, escaped = [], False
    for begin, end in tokenizer.Encode(transformed, return_type="offset_mapping")["offsets"]:
        size = 0
        for one in transformed[begin:end]:
            acts = one in OPERATORS and not escaped
            size += 0 if acts else len(one.encode())
            escaped = acts and one == E
        sizes.append(size)
    return sizes


# text, transformed, ids and bytes per token with the published tokenizer
PUBLISHED = [
    ("Hello world", f"{T}hello world", [4, 8074, 940], [0, 5, 6]),
    ("The NASA Launch", f"{T}the {A}nasa {T}launch", [4, 320, 8133, 5, 5566, 8136, 8133, 4, 1632, 1709], [0, 3, 1, 0, 3, 1, 1, 0, 2, 4]),
    ("A", f"{T}a", [4, 8136], [0, 1]),
    ("ID", f"{A}id", [5, 321], [0, 2]),
    ("日本", "日本", [238, 159, 173, 238, 164, 180], [0, 0, 3, 0, 0, 3]),
    ("tab\tnew\nline  two", "tab\tnew\nline  two", [8135, 373, 548, 1627, 738], [1, 2, 4, 5, 5]),
    ("  lead", "  lead", [3550], [4]),
    ("x  ", "x  ", [8161], [1]),
    ("\u200b", "\u200b", [], []),
    ("O'Neill's DON'T stop-it", f"{T}o'{T}neill's {A}don'{T}t stop-it", [4, 8137, 8165, 4, 466, 352, 8165, 8140, 8133, 5, 1670, 8165, 4, 8135, 2321, 8158, 278], [0, 1, 1, 0, 2, 3, 1, 1, 1, 0, 3, 1, 0, 1, 5, 1, 2]),
    ("Café ÉCOLE Straße NAÏVE éTude", f"{T}café É{A}cole {T}straße {A}naÏ{A}ve é{T}tude", [4, 8145, 1461, 203, 177, 8133, 203, 145, 5, 740, 297, 8133, 4, 5756, 203, 167, 8134, 8133, 5, 1863, 203, 151, 5, 310, 8133, 203, 177, 4, 8135, 2658], [0, 1, 2, 0, 2, 1, 0, 2, 0, 2, 2, 1, 0, 4, 0, 2, 1, 1, 0, 2, 0, 2, 0, 2, 1, 0, 2, 0, 1, 3]),
    ("e\u0301A\u030angström X\u0308y", f"e\u0301{T}a\u030angström {T}x\u0308y", [203, 177, 4, 203, 173, 1535, 1835, 203, 190, 8147, 8133, 4, 233, 194, 149, 8151], [0, 3, 0, 0, 3, 2, 3, 0, 2, 1, 1, 0, 0, 0, 3, 1]),
    ("NUL\0Byte A\x01b", f"{A}nul\0{T}byte {T}a\x01b", [5, 8139, 357, 8, 4, 1022, 431, 8133, 4, 373], [0, 1, 2, 1, 0, 2, 2, 1, 0, 3]),
    ("mcDonald McDONALD A B AB aBC XyZ", f"mc{C}donald {T}mc{C}d{C}o{C}n{C}a{C}l{C}d {T}a {T}b {A}ab a{C}b{C}c {T}xy{C}z", [1798, 6, 5906, 8133, 4, 1798, 6, 8144, 6, 8137, 6, 8139, 6, 8136, 6, 8143, 6, 8144, 8133, 4, 8136, 8133, 4, 8153, 8133, 5, 373, 265, 6, 8153, 6, 8145, 8133, 4, 5818, 6, 8167], [2, 0, 6, 1, 0, 2, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 2, 2, 0, 1, 0, 1, 1, 0, 2, 0, 1]),
    ("Здравствуй MIR 日本 ABCあDef", f"Здравствуй {A}mir 日本 {A}abcあ{T}def", [216, 159, 216, 188, 217, 136, 216, 184, 216, 186, 217, 137, 217, 138, 216, 186, 217, 139, 216, 193, 8133, 5, 5680, 8133, 238, 159, 173, 238, 164, 180, 8133, 5, 373, 8145, 235, 137, 138, 4, 5065], [0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 1, 0, 3, 1, 0, 0, 3, 0, 0, 3, 1, 0, 2, 1, 0, 0, 3, 0, 3]),
    ("  Both  Ends  ", f"  {T}both  {T}ends  ", [4, 4190, 8133, 4, 695, 8140], [0, 4, 2, 0, 3, 1]),
    ("\ufeffHi \xad There\u200b", f"\ufeff{T}hi \xad {T}there\u200b", [4, 3152, 8133, 202, 181, 8133, 4, 936], [0, 2, 1, 0, 2, 1, 0, 5]),
    ("\tLead\n", f"\t{T}lead\n", [4, 3550], [0, 4]),
    ("\u200bX", f"\u200b{T}x", [4, 8161], [0, 1]),
    ("\x01X", f"\x01{T}x", [4, 8161], [0, 1]),
    ("\ufeff", "\ufeff", [], []),
    ("a\u200b b", "a\u200b b", [8136, 285], [1, 5]),
]  # fmt: skip


def test_published_examples() -> None:
    for text, transformed, _, _ in PUBLISHED:
        assert (transform(text), inverse(transformed)) == (transformed, text)


@pytest.mark.skipif(
    "GOLF_TEST_DATA" not in os.environ, reason="GOLF_TEST_DATA names no folder with published tokenizers"
)
def test_published_ids_and_bytes() -> None:
    name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    tokenizer = load_tokenizer(Path(os.environ["GOLF_TEST_DATA"], "tokenizers", name), 8192, operators=True)
    assert [tokenizer.PieceToId(operator) for operator in OPERATORS] == [4, 5, 6, 7]
    for text, _, ids, sizes in PUBLISHED:
        tokens, counted = encode_with_bytes(tokenizer, text, "x")
        assert (tokens.tolist(), counted.tolist()) == ([1, *ids], [0, *sizes]), text
    # an operator of the text has its three bytes
    tokens, counted = encode_with_bytes(tokenizer, f"{T}a", "x")
    assert (tokens.tolist(), counted.tolist()) == ([1, 7, 4, 8136], [0, 0, 3, 1])


def test_any_text_comes_back() -> None:
    for text in random_texts(3000):
        written = transform(text)
        assert written == plain_transform(text)
        assert inverse(written) == restore(written) == text


def test_text_in_parts_comes_back_as_soon_as_it_is_known() -> None:
    cut = random.Random(1)
    for text in random_texts(1000):
        written = transform(text)
        places = sorted(cut.randrange(len(written) + 1) for _ in range(4))
        parts = [written[begin:end] for begin, end in itertools.pairwise([0, *places, len(written)])]
        assert "".join(restore_parts(parts)) == text
    assert list(restore_parts([f"a {T}", "b", f" {A}c", "d", " e"])) == ["a ", "B", " ", "", "CD e", ""]
    # what a model writes may be wrong
    assert "".join(restore_parts([f"{T}{A}", f" {C}", ""])) == f"{T}{A} {C}"


def test_capitals_in_every_position_come_back() -> None:
    for length in range(1, 7):
        for word in map("".join, itertools.product("aB", repeat=length)):
            for text in (word, f"é{word}É", f"1{word}{E}{word}_{word}"):
                assert transform(text) == plain_transform(text)
                assert inverse(transform(text)) == text


def test_a_long_word_takes_linear_time() -> None:
    # quadratic, it would take minutes
    text = "a" * 300_000
    assert transform(f"{text} {text}B") == f"{text} {text}{C}b"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (T, 0), (f"{T} a", 0), (f"a{T}b", 1), (f"x {A}", 2), (f"{A}a", 0), (f"{C}a", 0), (f"a{C}", 1), (E, 1), (f"{E}a", 1),
        (f"{T}{T}a", 0), (f"{A}ab{C}c", 3), (f"{T}{C}a", 0), (f"a{A}bc", 1), ("a Word", 2),
    ],
)  # fmt: skip
def test_an_operator_in_a_wrong_place_is_refused(text: str, place: int) -> None:
    with pytest.raises(UserError, match=f"^character {place} of the transformed text: an operator in a wrong place"):
        inverse(text)


def test_bytes_are_those_of_the_characters_behind_each_token(model: Path) -> None:
    tokenizer = load_tokenizer(model, VOCAB, operators=True)
    for text in random_texts(2000):
        tokens, sizes = encode_with_bytes(tokenizer, text, "x")
        written = transform(text)
        assert tokens.tolist() == [1, *tokenizer.Encode(written)]
        assert sizes.tolist() == [0, *plain_bytes(tokenizer, written)]
        assert tokens.dtype == sizes.dtype == np.uint16


def test_a_token_of_more_bytes_than_16_bits_hold_is_refused(model: Path) -> None:
    tokenizer = load_tokenizer(model, VOCAB, operators=True)
    assert int(encode_with_bytes(tokenizer, f"a{' ' * 65_534}b", "x")[1].max()) >= 65_534
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: a token has 65,53\d bytes, more than the 65,535"):
        encode_with_bytes(tokenizer, f"a{' ' * 65_537}b", "a.jsonl, line 3")


def build_both(documents: list[Document], folder: Path) -> list[Path]:
    """The same documents by both builders: four for validation, the others train."""
    lines = "".join(json.dumps({"text": document.text}) + "\n" for document in documents)
    (folder / "docs.jsonl").write_text(lines)
    options = {"name": "x", "case_operators": True, "shard_tokens": 5000}
    build_dataset(documents[4:], documents[:4], folder / "text", VOCAB, **options)
    build_bulk([folder / "docs.jsonl"], folder / "bulk", VOCAB, val_docs=4, workers=1, **options)
    return [folder / "text", folder / "bulk"]


def test_both_builders_write_shards_and_sidecars(documents: list[Document], tmp_path: Path) -> None:
    first, second = build_both(documents, tmp_path)
    files = {path.name: path.read_bytes() for path in first.iterdir() if path.suffix != ".json"}
    assert files == {path.name: path.read_bytes() for path in second.iterdir() if path.suffix != ".json"}
    tokenizer = load_tokenizer(first / f"x_{VOCAB}_bpe.model", VOCAB, operators=True)
    assert [tokenizer.PieceToId(operator) for operator in OPERATORS] == [4, 5, 6, 7]
    for split, part in (("val", documents[:4]), ("train", documents[4:])):
        shards = find_shards(first, split)
        texts = [transform(document.text) for document in part]
        stored = [token for path in shards for token in read_shard(path).tolist()]
        assert stored == [token for text in texts for token in (1, *tokenizer.Encode(text))]
    shards = find_shards(first, "val")
    sizes = [size for document in documents[:4] for size in (0, *plain_bytes(tokenizer, transform(document.text)))]
    assert [size for sidecar in read_sidecar(shards) for size in sidecar.tolist()] == sizes and len(shards) > 1
    info = read_manifest(first)
    assert info and (info.val.normalized_bytes, info.train.normalized_bytes) == (sum(sizes), None)
    # all but whitespace at the ends
    assert sum(sizes) == sum(len(document.text.strip().encode()) for document in documents[:4])


def test_flag_and_tokenizer_must_agree(documents: list[Document], model: Path, tmp_path: Path) -> None:
    split = documents[4:], documents[:4], tmp_path / "d", VOCAB
    with pytest.raises(UserError, match=r"t\.model: piece '\\ue001' is an operator, .* --case-operators"):
        build_dataset(*split, tokenizer_path=model)
    train_tokenizer((document.text for document in documents), VOCAB, tmp_path / "plain.model")
    with pytest.raises(UserError, match=r"plain\.model: has no pieces for the case operators"):
        build_dataset(*split, tokenizer_path=tmp_path / "plain.model", case_operators=True)
    assert not (tmp_path / "d").exists()


def stream() -> tuple[list[int], list[int]]:
    """16 documents and the bytes of their tokens in closed form."""
    tokens = []
    for d in range(16):
        length = 30 + (97 * d * d + 41 * d) % 523
        tokens += [1, *(4 + (7 * j + 11 * d + j * j % 13) % 60 for j in range(length))]
    return tokens, [0 if token == 1 else 1 + (3 * index + token) % 6 for index, token in enumerate(tokens)]


def test_scored_bytes_are_the_sidecar_s(model: Path, tmp_path: Path) -> None:
    tokens, sizes = stream()
    for split, values in (("val", tokens), ("val_bytes", sizes)):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", values[:2500])
        write_shard(tmp_path / f"fineweb_{split}_000001.bin", values[2500:])
    (tmp_path / "t.model").write_bytes(model.read_bytes())
    config = Config(vocab_size=VOCAB, data_path=str(tmp_path), train_seq_len=256, train_batch_tokens=2048)
    text = load_validation(config)
    # published scripts: 4,359 targets have 15,242 bytes, the 4,352 of whole rows have 15,215
    assert (len(text.tokens), int(text.target_bytes.sum()), sum(sizes[1:])) == (4353, 15_215, 15_242)
    assert text.target_bytes.tolist() == sizes[1:4353]
    write_shard(tmp_path / "fineweb_val_bytes_000001.bin", sizes[2500:-1])
    with pytest.raises(UserError, match=r"val_bytes_000001\.bin: not the sidecar of these 1860 tokens"):
        load_validation(config)
    write_shard(tmp_path / "fineweb_val_bytes_000001.bin", np.array(sizes[2500:]) + 1)
    with pytest.raises(UserError, match="0 for each BOS"):
        load_validation(config)
    (tmp_path / "fineweb_val_bytes_000001.bin").unlink()
    with pytest.raises(UserError, match=r"val_bytes_000001\.bin: no such shard"):
        load_validation(config)
    (tmp_path / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(UserError, match=r"is an operator, .* needs the sidecar"):
        load_validation(config)
