"""Tokenizers: text comes back unchanged, and nothing in it can pass for an end of text."""

import functools
import json
import tempfile

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from crescendo.experiments.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    parse_tokenizer,
    train_bpe,
)
from crescendo.experiments.runtime.errors import UserError

CORPUS = [b"the cat sat on the mat", "der Bär saß auf der Bank".encode(), b"def f(x):\n    return x + 1\n"] * 5
TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "bpe": train_bpe(CORPUS, vocab_size=300)}

each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


@each_tokenizer
@given(text=st.text())
def test_text_comes_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


@each_tokenizer
@given(texts=st.lists(st.text(), max_size=5))
def test_a_batch_is_its_documents_one_after_the_other(tokenizer, texts):
    tokens, lengths = tokenizer.encode_batch([text.encode() for text in texts])
    separate = [tokenizer.encode(text).tolist() for text in texts]
    assert lengths.tolist() == [len(each) for each in separate]
    assert tokens.tolist() == [token for each in separate for token in each]


@each_tokenizer
def test_end_of_text_in_a_document_is_plain_text(tokenizer):
    text = f"before {END_OF_TEXT} after"
    tokens = tokenizer.encode(text)
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == text


@each_tokenizer
def test_end_of_text_and_cut_characters_decode(tokenizer):
    tokens = tokenizer.encode("aß").tolist()
    assert tokenizer.decode([tokenizer.end_of_text, *tokens, tokenizer.end_of_text]) == "aß"
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"


def test_bytes_are_their_own_numbers():
    tokens, lengths = ByteTokenizer().encode_batch([bytes(range(128)), "é".encode(), b""])
    assert tokens.tolist() == [*range(128), 0xC3, 0xA9]
    assert lengths.tolist() == [128, 2, 0]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().end_of_text) == (257, 256)


def test_vocab_size_is_the_count_reached():
    assert train_bpe(CORPUS, vocab_size=280).vocab_size == 280
    assert train_bpe([b"aa"], vocab_size=10_000).vocab_size == 258  # 256 bytes, the end of text and "aa"
    assert train_bpe([], vocab_size=300).vocab_size == 257


def test_training_is_deterministic_and_files_keep_everything(tmp_path):
    first, second = (train_bpe(iter(CORPUS), vocab_size=300) for _ in range(2))
    assert first.to_json() == second.to_json()
    (tmp_path / "a.json").write_text(first.to_json())
    loaded = SubwordTokenizer.load(tmp_path / "a.json")
    text = f"the bare {END_OF_TEXT} Bär"
    assert loaded.encode(text).tolist() == first.encode(text).tolist()
    assert (loaded.vocab_size, loaded.end_of_text) == (first.vocab_size, first.end_of_text)


@given(st.text())
def test_bytes_as_a_file_are_the_same_tokenizer(text):
    # Special tokens inside a text are plain text for both.
    bytes_alone, loaded = ByteTokenizer(), bytes_from_a_file()
    assert loaded.encode(text).tolist() == bytes_alone.encode(text).tolist()
    assert loaded.decode(bytes_alone.encode(text)) == text
    assert (loaded.vocab_size, loaded.end_of_text) == (bytes_alone.vocab_size, bytes_alone.end_of_text)


@functools.cache
def bytes_from_a_file() -> SubwordTokenizer:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(ByteTokenizer().to_json())
        file.flush()
        return SubwordTokenizer.load(file.name)


def word_tokenizer(path, vocabulary):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?")).save(str(path))
    return path


def test_a_tokenizer_file_is_used_as_it_is(tmp_path):
    path = word_tokenizer(tmp_path / "words.json", {"?": 0, "</s>": 7, "hello": 3})
    settings = json.loads(path.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(settings))

    tokenizer = parse_tokenizer(str(path)).make([])
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (7, 8)  # numbers have gaps: what counts is the largest
    assert tokenizer.encode("hello hello").tolist() == [3, 3]  # not truncated


def test_identities_tell_tokenizers_apart(tmp_path):
    specs = ["bytes", "bpe:300", "bpe:301"]
    specs += [str(word_tokenizer(tmp_path / f"{n}.json", {"?": 0, "</s>": n})) for n in (1, 2)]
    assert len({parse_tokenizer(spec).identity for spec in specs}) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", r'tokenizer = "words" is neither "bytes"'),
        ("missing/tokenizer.json", r"is neither .* nor a tokenizer.json file"),
        ("bpe:256", r'tokenizer = "bpe:256".* at least 257 .*"bpe:16384"'),
        ("bpe:many", r'tokenizer = "bpe:many".* whole number'),
        ("bpe", r"whole number of at least 257"),
        ("bpe:-5", r"whole number of at least 257"),
    ],
)
def test_a_bad_choice_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse_tokenizer(spec)


@pytest.mark.parametrize("content", ["{}", "no json", ""])
def test_a_bad_tokenizer_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json .*not a tokenizer\.json file"):
        parse_tokenizer(str(path))
    path.write_bytes(b"{\xff}")
    with pytest.raises(UserError, match=r"tokenizer\.json: byte 0xff at offset 1 is not UTF-8"):
        parse_tokenizer(str(path))


def pieces_of_bytes(**options):
    """Of SentencePiece's kind: what the vocabulary lacks is spelled in bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {piece: 300 + i for i, piece in enumerate(["<", "/", "s", ">", "</", "</s"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    model = tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", **options)
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return made


def merged_bytes():
    """The end of text is the merge of other tokens, and not called special."""
    vocabulary = {character: i for i, character in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    vocabulary |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def added_bytes():
    """The end of text is an added token that is not called special."""
    made = pieces_of_bytes()
    made.add_tokens(["</s>"])
    return made


@pytest.mark.parametrize("make", [pieces_of_bytes, merged_bytes, added_bytes])
@given(words=st.lists(st.sampled_from(["</s>", "</", "s>", "a", "é", " ", "<", "<|endoftext|>"]), max_size=8))
def test_no_text_encodes_to_the_end_of_text(make, words):
    text = "".join(words)
    tokenizer = SubwordTokenizer(make())
    tokens = tokenizer.encode(text)
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode([tokenizer.end_of_text, *tokens, tokenizer.end_of_text]) == text
    both, lengths = tokenizer.encode_batch([text.encode(), b"</s>"])
    assert both.tolist() == [*tokens, *tokenizer.encode("</s>")]
    assert lengths.tolist() == [len(tokens), len(both) - len(tokens)]


def test_text_that_only_an_end_of_text_can_spell_is_refused():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "hello": 1}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = SubwordTokenizer(made)
    assert tokenizer.encode("hello hello").tolist() == [1, 1]
    with pytest.raises(UserError, match=r"takes the text '</s>' for a document's end, and has no other tokens for it"):
        tokenizer.encode("hello </s>")


def test_a_tokenizer_with_dropout_is_a_function(tmp_path):
    path = tmp_path / "tokenizer.json"
    made = train_bpe(CORPUS, vocab_size=300)
    settings = json.loads(made.to_json())
    settings["model"]["dropout"] = 0.5
    path.write_text(json.dumps(settings))
    tokenizer = SubwordTokenizer.load(path)
    text = CORPUS[0].decode() * 9
    assert tokenizer.encode(text).tolist() == made.encode(text).tolist()
    assert tokenizer.to_json() == made.to_json()  # as the folder of a run has it


def test_a_tokenizer_file_may_have_a_byte_order_mark(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(ByteTokenizer().to_json(), encoding="utf-8-sig")
    assert SubwordTokenizer.load(path).encode("é").tolist() == [195, 169]


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    path = word_tokenizer(tmp_path / "words.json", {"?": 0})
    with pytest.raises(UserError, match=r"words\.json: .* no end-of-text token: add one of <\|endoftext\|>"):
        parse_tokenizer(str(path))
