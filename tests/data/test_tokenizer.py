"""The tokenizer's settings and byte tables: against the text itself, byte for byte, and against published figures."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_evaluation import plain_bytes

from train.common.errors import UserError
from train.data.corpus import stdlib_documents
from train.data.tokenizer import SETTINGS, byte_tables, find_tokenizer, load_tokenizer, train_tokenizer

VOCAB = 512


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = []
    for document in stdlib_documents():
        documents.append(document.text)
        if sum(map(len, documents)) > 150_000:
            return documents
    raise AssertionError("the standard library is shorter than 150 kB")


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(texts, VOCAB, path)
    return path


def trained(path: Path, texts: list[str], **changes: object) -> Path:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text[:4000] for text in texts),
        model_writer=writer,
        vocab_size=VOCAB,
        minloglevel=2,
        **SETTINGS | changes,
    )
    path.write_bytes(writer.getvalue())
    return path


def test_special_and_byte_pieces_are_where_they_are_published(model: Path) -> None:
    tokenizer = load_tokenizer(model, VOCAB)
    assert [tokenizer.IdToPiece(index) for index in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [tokenizer.IdToPiece(index) for index in range(4, 260)] == [f"<0x{byte:02X}>" for byte in range(256)]
    # split_digits keeps numbers apart, no dummy prefix puts no space in front
    assert [tokenizer.IdToPiece(index) for index in tokenizer.Encode("123 456")] == ["1", "2", "3", "▁", "4", "5", "6"]
    assert tokenizer.Decode(tokenizer.Encode("tab\tnew\nline   x")) == "tab new line x"


def test_the_same_documents_give_the_same_bytes(model: Path, texts: list[str], tmp_path: Path) -> None:
    train_tokenizer(iter(texts), VOCAB, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_long_documents_are_not_left_out(tmp_path: Path) -> None:
    # one document, far beyond the trainer's sentence length, with words that only its end has
    text = "alpha beta gamma " * 1000 + "zebra " * 200
    tokenizer = train_tokenizer([text], 290, tmp_path / "long.model")
    assert any("z" in tokenizer.IdToPiece(index) for index in range(260, 290))


def test_digits_stay_apart(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the year 2024 was 2024 days long "] * 50, 290, tmp_path / "digits.model")
    assert not [
        piece for piece in map(tokenizer.IdToPiece, range(260, 290)) if any(map(str.isdigit, piece)) and len(piece) > 1
    ]


def test_tables_follow_the_published_rules(model: Path) -> None:
    tokenizer = load_tokenizer(model, VOCAB)
    tables = byte_tables(tokenizer, VOCAB + 3)
    assert tables.base_bytes.dtype == np.int16 and tables.has_leading_space.dtype == tables.is_boundary.dtype == bool
    for index in range(VOCAB):
        piece = tokenizer.IdToPiece(index)
        if index < 4:
            expected = (0, False, True)
        elif index < 260:
            expected = (1, False, False)
        elif piece[0] == "\u2581":
            expected = (len(piece[1:].encode("utf-8")), True, False)
        else:
            expected = (len(piece.encode("utf-8")), False, False)
        assert (tables.base_bytes[index], tables.has_leading_space[index], tables.is_boundary[index]) == expected
    # ids that only the model has are boundaries of no bytes
    assert tables.base_bytes[VOCAB:].tolist() == [0, 0, 0] and tables.is_boundary[VOCAB:].all()


def counted(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> int:
    ids = np.array([1, *tokenizer.Encode(text)], dtype=np.uint16)
    return int(byte_tables(tokenizer, tokenizer.vocab_size()).count(ids).sum())


def test_counted_bytes_are_the_bytes_of_the_normalized_text(model: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(model, VOCAB)
    for text in texts:
        assert counted(tokenizer, text) == len(" ".join(text.split()).encode())


# U+2581 stands for the space itself, so a document that begins with one begins with a space that is not charged
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
def test_counted_bytes_are_the_decoded_bytes_of_any_text(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(model, VOCAB)
    assert counted(tokenizer, text) == len(tokenizer.Decode(tokenizer.Encode(text)).encode())


def test_a_space_after_bos_is_free_and_bos_is_no_byte(model: Path) -> None:
    tokenizer = load_tokenizer(model, VOCAB)
    tables = byte_tables(tokenizer, VOCAB)
    space, letter = tokenizer.PieceToId("\u2581"), tokenizer.PieceToId("e")
    assert tables.count(np.array([letter, space, letter, 1, space])).tolist() == [1, 1, 0, 0]


def test_targets_count_by_the_published_rule(model: Path) -> None:
    tables = byte_tables(load_tokenizer(model, VOCAB), VOCAB)
    # half of them special, so that spaces often follow a boundary
    ids = np.random.default_rng(0).integers(0, VOCAB, 1200) * np.random.default_rng(1).integers(0, 2, 1200)
    assert (tables.has_leading_space[ids[1:]] & tables.is_boundary[ids[:-1]]).any()
    counted = tables.count(ids.astype(np.uint16))
    assert counted.dtype == np.uint16 and counted.tolist() == plain_bytes(ids, tables).tolist()


def test_refuses_a_tokenizer_without_a_lone_space(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.model"
    whole = model.read_bytes()
    # the piece's string, three bytes long, becomes a snowman
    assert whole.count(b"\n\x03\xe2\x96\x81") == 1
    bad.write_bytes(whole.replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x98\x83"))
    # what it would do: a space before a digit is charged as three bytes
    assert counted(sentencepiece.SentencePieceProcessor(model_file=str(bad)), "x = 1") == len("x = 1") + 2
    with pytest.raises(UserError, match=r"bad\.model: this tokenizer would miscount bytes.*lone space"):
        load_tokenizer(bad, VOCAB)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"byte_fallback": False}, "256 byte pieces"),
        ({"bos_id": 2, "eos_id": 1}, "BOS as token 1, found 2"),
        ({"treat_whitespace_as_suffix": True}, "space after its first character"),
        ({"split_by_whitespace": False}, "space after its first character"),
        # the four operators of CaseOps
        (
            {"user_defined_symbols": ["\ue001", "\ue002", "\ue003", "\ue004"]},
            r"bad\.model: piece '\\ue001' is an operator, .* needs the sidecar \*_val_bytes_\*\.bin, .* --case-operators makes",
        ),
    ],
)
def test_refuses_a_tokenizer_that_miscounts(texts: list[str], tmp_path: Path, changes: dict, reason: str) -> None:
    path = trained(tmp_path / "bad.model", texts, **changes)
    with pytest.raises(UserError, match=reason):
        load_tokenizer(path, VOCAB)


def test_refuses_another_vocabulary_a_foreign_file_and_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"small\.model: has 512 pieces, but vocab_size is 1024: set VOCAB_SIZE=512"):
        load_tokenizer(model, 1024)
    for data in (b"", b"not a model", model.read_bytes()[:-1000]):
        (tmp_path / "foreign.model").write_bytes(data)
        with pytest.raises(UserError, match=r"foreign\.model"):
            load_tokenizer(tmp_path / "foreign.model", VOCAB)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none.model", VOCAB)


@pytest.mark.parametrize(
    ("documents", "vocab", "message"),
    [
        ([], 300, "text is empty"),
        (["  \n "], 300, "text is empty"),
        (["ab ab"], 300, "yields only"),
        (
            ["abcdefgh"],
            262,
            "262 pieces can't be trained on this text: its characters alone take 268: give --vocab 268 or more",
        ),
    ],
)
def test_training_says_what_is_wrong_with_the_text(
    tmp_path: Path, documents: list[str], vocab: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(documents, vocab, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [UserError("line 7"), KeyboardInterrupt("line 7")])
def test_an_error_while_reading_documents_is_passed_on(tmp_path: Path, error: BaseException) -> None:
    def documents():
        yield "some text"
        raise error

    with pytest.raises(type(error), match="line 7"):
        train_tokenizer(documents(), 300, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_finds_the_tokenizer_beside_the_shards_or_in_the_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "fineweb10B_sp512"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="TOKENIZER_PATH"):
        find_tokenizer(folder, 512)
    (tmp_path / "tokenizers").mkdir()
    published = tmp_path / "tokenizers" / "fineweb_512_bpe.model"
    published.touch()
    assert find_tokenizer(folder, 512).resolve() == published.resolve()
    (folder / "own.model").touch()
    assert find_tokenizer(folder, 512) == folder / "own.model"
    assert find_tokenizer(folder, 512, "given.model") == Path("given.model")
    (folder / "other.model").touch()
    with pytest.raises(UserError, match=r"own\.model"):
        find_tokenizer(folder, 512)


@pytest.mark.skipif(
    "GOLF_TEST_DATA" not in os.environ, reason="GOLF_TEST_DATA names no folder with published tokenizers"
)
def test_published_figures_of_the_8192_tokenizer() -> None:
    path = Path(os.environ["GOLF_TEST_DATA"], "tokenizers", "fineweb_8192_bpe.model")
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516"
    )
    tokenizer = load_tokenizer(path, 8192)
    tables = byte_tables(tokenizer, 8192)
    assert tokenizer.PieceToId("\u2581") == 8108
    assert int(tables.has_leading_space.sum()) == 5464
    assert int(tables.base_bytes.max()) == 15
    ids = tokenizer.Encode("Hello world")
    assert ids == [8150, 6437, 962]
    assert tables.base_bytes[ids].tolist() == [1, 4, 5]
    assert counted(tokenizer, "Hello world") == 11
    assert len(tokenizer.Encode("123 456")) == 7
    assert tokenizer.Decode(tokenizer.Encode("tab\tnew\nline")) == "tab new line"
