"""Every number as the original's: of strings of many scripts, hostile ones among them."""

import json
from pathlib import Path

import numpy as np
import pytest
import regex
import transformers
from open_clip.tokenizer import SimpleTokenizer

from text.strings import strings
from vitrail.errors import DataError, UsageError
from vitrail.text import (
    TEXTS,
    ClipTokenizer,
    Pieces,
    Tokenizer,
    WordPiece,
    open_tokenizer,
    text_config,
    tokenizer_of,
)
from vitrail.text.mend import mended

HALVES = regex.compile("[\ud800-\udfff]")
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-éß", "ะ", "你", "½"]
PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *("photo", "cat", "the", "##ing", "##s", "strasse", "##ration", "super", "##cal"),
]
VOCABULARY = "".join(f"{piece}\n" for piece in PIECES).encode()
COUNTS = (500, pytest.param(10_000, marks=pytest.mark.slow))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("context", (77, 8))
def test_clip_is_open_clips(count: int, context: int) -> None:
    texts = [text for text in strings(count) if not HALVES.search(text)]
    theirs = SimpleTokenizer(context_length=context)
    ours = ClipTokenizer(context, mending="ftfy")(texts)
    np.testing.assert_array_equal(ours.ids, theirs(texts).numpy())
    lengths = np.array([len(theirs.encode(text)) + 2 for text in texts])
    np.testing.assert_array_equal(ours.mask.sum(1), lengths.clip(max=context))
    assert ours.cut == (lengths > context).sum() > 0


@pytest.mark.parametrize("count", COUNTS)
def test_texts_are_mended_as_ftfy_does_except_encodings(count: int) -> None:
    import ftfy

    texts = [text for text in strings(count, seed=1) if not HALVES.search(text)]
    for text in texts:
        assert mended(text) == ftfy.fix_text(text, fix_encoding=False, fix_c1_controls=True), text
    assert sum(mended(text) != text for text in texts) > count // 4


def test_without_ftfy_plain_captions_have_the_same_numbers_and_the_run_says_which() -> None:
    plain, full = ClipTokenizer(mending="plain"), ClipTokenizer(mending="ftfy")
    captions = [
        "It\u2019s “a” ﬁne day",
        "Ｃａｆé &amp; bar",
        "two dogs\r\nplaying",
        "İstanbul 2024",
    ]
    np.testing.assert_array_equal(plain(captions).ids, full(captions).ids)
    broken = ["cafÃ©"]
    assert (plain(broken).ids != full(broken).ids).any()
    assert tokenizer_of(plain.state(), {}).state()["mending"] == "plain"


def test_a_run_that_was_made_with_ftfy_asks_for_it(monkeypatch) -> None:
    state = ClipTokenizer(mending="ftfy").state()
    monkeypatch.setattr("vitrail.text.bpe.find_spec", lambda name: None)
    assert ClipTokenizer().mending == "plain"
    with pytest.raises(UsageError, match=r"vitrail\[text\]"):
        tokenizer_of(state, {})


@pytest.mark.parametrize("lower", (True, False))
@pytest.mark.parametrize("count", COUNTS)
def test_word_pieces_are_transformers(count: int, lower: bool) -> None:
    texts = [text for text in strings(count, seed=2) if not HALVES.search(text)]
    theirs = transformers.BertTokenizer(
        vocab={piece: i for i, piece in enumerate(PIECES)}, do_lower_case=lower
    )
    for context in (256, 12):
        expected = theirs(
            texts, padding=True, truncation=True, max_length=context, return_tensors="np"
        )
        found = WordPiece(VOCABULARY, context, lower=lower)(texts)
        np.testing.assert_array_equal(found.ids, expected["input_ids"])
        np.testing.assert_array_equal(found.mask, expected["attention_mask"].astype(bool))
    assert found.cut > count // 10
    assert (found.ids != 1).any(1).all()


def test_lits_texts_have_no_end_and_are_cut_to_fifteen_pieces() -> None:
    tokens = WordPiece(VOCABULARY, 16, closed=False)(["a cat", "a " * 40, ""])
    row = [PIECES.index(piece) for piece in ("[CLS]", "a", "cat")]
    assert tokens.ids[0].tolist() == row + [0] * 13
    assert tokens.mask.sum(1).tolist() == [3, 16, 1]
    assert tokens.cut == 1


def all_tokenizers() -> list[Tokenizer]:
    return [ClipTokenizer(), WordPiece(VOCABULARY, 77)]


@pytest.mark.parametrize("tokenizer", all_tokenizers(), ids=lambda t: type(t).__name__)
def test_hostile_captions(tokenizer: Tokenizer) -> None:
    latin = b"caf\xe9 \xff\xfe".decode("utf-8", "surrogateescape")
    texts = ["word " * 10_000, "x" * 100_000, "", "   ", latin, "\x00\x01", "ꙮ" * 50]
    tokens = tokenizer(texts)
    assert tokens.ids.shape == tokens.mask.shape == (len(texts), 77)
    assert tokens.ids.dtype == np.int64
    assert tokens.ids.min() >= 0 and tokens.ids.max() < tokenizer.vocabulary
    assert tokens.mask[2].sum() == tokens.mask[3].sum() == 2  # both ends
    assert 1 <= tokens.cut <= 4
    assert tokens.mask[0].all()
    whole = tokenizer(["a \ud83d\ude00 b"])
    np.testing.assert_array_equal(whole.ids, tokenizer(["a 😀 b"]).ids)
    assert tokenizer([]).ids.shape[0] == 0


@pytest.mark.parametrize("tokenizer", all_tokenizers(), ids=lambda t: type(t).__name__)
def test_one_text_is_no_list_of_texts(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="list of texts"):
        tokenizer("one text")


@pytest.mark.parametrize("tokenizer", all_tokenizers(), ids=lambda t: type(t).__name__)
def test_a_tokenizer_travels_as_json_and_its_files(tokenizer: Tokenizer) -> None:
    texts = strings(100, seed=3)
    state = json.loads(json.dumps(tokenizer.state()))
    again = tokenizer_of(state, dict(tokenizer.files))
    for ours, theirs in zip(again(texts), tokenizer(texts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert again.state() == tokenizer.state()


def test_a_tokenizer_is_opened_for_a_tower(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY)
    config = text_config("minilm_l6", vocabulary=len(PIECES), context=9)
    for place in (tmp_path, tmp_path / "vocab.txt"):
        tokenizer = open_tokenizer(config, place)
        assert (tokenizer.context, tokenizer.vocabulary) == (9, len(PIECES))
    assert open_tokenizer(text_config("clip_b32", context=20)).context == 20
    padded = text_config("minilm_l6", vocabulary=-(-len(PIECES) // 64) * 64)
    assert open_tokenizer(padded, tmp_path).vocabulary == len(PIECES)


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if not name.startswith("clip")))
def test_the_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    for place in (None, tmp_path):
        with pytest.raises(UsageError, match=r"vocab.txt|spiece.model|tokenizer.json|\*.model"):
            open_tokenizer(TEXTS[name], place)


def test_files_that_do_not_fit_the_weights_are_told(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(VOCABULARY)
    with pytest.raises(DataError, match=rf"{len(PIECES)} words.*30,522.*another model"):
        open_tokenizer(TEXTS["minilm_l6"], file)
    with pytest.raises(UsageError, match="ships with vitrail"):
        open_tokenizer(TEXTS["clip_b32"], file)
    with pytest.raises(DataError, match=r"49,408 words.*32,000"):
        open_tokenizer(text_config("clip_b32", vocabulary=32_000))


@pytest.mark.parametrize("content", (b"", b"a\nb\n", b"\xff\xfe\x00", b"\x00" * 100))
def test_what_is_no_vocabulary_is_told(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match="vocabulary"):
        open_tokenizer(TEXTS["minilm_l6"], file)


def test_a_state_that_says_none_is_told() -> None:
    with pytest.raises(DataError, match="another vitrail"):
        tokenizer_of({"kind": "other"}, {})
    with pytest.raises(DataError, match="cannot be read"):
        tokenizer_of({"kind": "clip", "size": 3}, {})
    with pytest.raises(DataError, match=r"vocab\.txt.*missing"):
        tokenizer_of(WordPiece(VOCABULARY).state(), {})


def gemma_like() -> transformers.Siglip2Tokenizer:
    """A tokenizer.json as SigLIP 2's, of few words."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("p", "h"), ("ph", "o")]
    words += [*letters, *("".join(pair) for pair in merges)]
    return transformers.Siglip2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=merges
    )


def test_siglip_2_is_transformers_padded_whatever_the_caller_does() -> None:
    theirs = gemma_like()
    content = theirs.backend_tokenizer.to_str().encode()
    tokenizer = Pieces("tokenizer.json", content, "siglip2", 16)
    texts = ["a Cat", "photo, PHOTO.", "é日", "a " * 40, ""]
    tokens = tokenizer(texts)
    for row, text in zip(tokens.ids, texts, strict=True):
        pieces = theirs(text, add_special_tokens=False)["input_ids"][:15]
        assert row.tolist() == [*pieces, 1, *[0] * (15 - len(pieces))]
    assert tokens.cut == 1
    again = tokenizer_of(json.loads(json.dumps(tokenizer.state())), dict(tokenizer.files))
    np.testing.assert_array_equal(again(texts).ids, tokens.ids)


@pytest.mark.parametrize("content", (b"{}", b"\xff", b"[1, 2]", b'{"model": 3}'))
def test_what_is_no_tokenizer_json_is_told(content: bytes) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Pieces("tokenizer.json", content, "siglip2")


def test_sentencepiece_reads_siglip_and_lit(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"a photo of a cat and dog number {i}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=9,
    )  # fmt: skip
    content = (tmp_path / "m.model").read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    for reading, given, read in (
        ("siglip", "A Photo_of:  a CAT!", "a photo of a cat"),
        ("lit", "A photo!", "A photo!"),
    ):
        config = text_config("siglip_b16", vocabulary=40, context=24, reading=reading)
        (tmp_path / "spiece.model").write_bytes(content)
        tokens = open_tokenizer(config, tmp_path)([given, "dog " * 30])
        pieces = model.encode(read)
        assert tokens.ids[0].tolist() == pieces + [1] * (24 - len(pieces))
        assert tokens.ids[1, -1] == 1
        assert tokens.cut == 1
    with pytest.raises(DataError, match="sentencepiece"):
        Pieces("spiece.model", b"no model", "siglip")


def test_a_library_that_is_missing_is_told(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UsageError, match=r"sentencepiece.*vitrail\[text\]"):
        Pieces("spiece.model", b"", "siglip")
