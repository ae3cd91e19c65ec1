"""Text of any size and kind: right, in bounded memory, or refused with file and place."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data import corpus, documents, text_files, tokenizer
from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, train_bpe
from crescendo.experiments.runtime.errors import UserError

CORPUS = [b"the cat sat on the mat, it's 12", "der B\u00e4r sa\u00df auf der Bank \u4eac\n\n  x_".encode()] * 5
BPE = train_bpe(CORPUS, vocab_size=300)


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a few hundred bytes are much."""

    def make(**sizes):
        homes = {"PIECE_BYTES": (tokenizer, corpus), "MOST_PIECE_BYTES": (tokenizer,), "MOST_JSON_BYTES": (text_files,)}
        homes |= {"MOST_DOCUMENT_BYTES": (documents, text_files), "PARQUET_BATCH_BYTES": (text_files,)}
        homes |= {"BATCH_BYTES": (corpus,), "BATCH_DOCUMENTS": (corpus,)}
        for name, size in sizes.items():
            for module in homes[name]:
                monkeypatch.setattr(module, name, size)

    return make


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*"ab1_,'\u00e9\u4eac", "'s", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "the", "<|endoftext|>"]
        )
    )
)
@pytest.mark.parametrize("piece_bytes", [1, 3])
@pytest.mark.parametrize("each", [BPE, ByteTokenizer()], ids=["bpe", "bytes"])
def test_the_tokens_of_pieces_are_those_of_the_whole(each, piece_bytes, parts):
    text = "".join(parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_BYTES", piece_bytes)
        pieces = list(each.pieces(text))
    assert b"".join(pieces) == text
    assert each.encode_batch(pieces)[0].tolist() == each.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_pieces_and_batches_change_nothing_on_disk(tmp_path, small, kind):
    texts = ["one", "a long document of many words " * 20, "two", "x" * 200, "and another of many words " * 30] * 3

    def files(folder):
        of = Documents("a corpus", "of texts", lambda: (f"{i} {text}".encode() for i, text in enumerate(texts)))
        options = {"tokenizer": kind, "sequence_length": 8, "validation_fraction": 0.3}
        str(text_data(of, **options, cache_directory=tmp_path / folder))
        paths = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in paths}

    whole = files("whole")
    small(PIECE_BYTES=16, BATCH_BYTES=64)
    assert files("pieces") == whole
    small(BATCH_DOCUMENTS=2)
    assert files("few") == whole


def test_a_document_that_a_tokenizer_takes_only_at_once_is_refused_where_it_is_too_long(tmp_path, small):
    small(PIECE_BYTES=16, MOST_PIECE_BYTES=64)
    for read in (lambda text: list(BPE.pieces(text)), lambda text: train_bpe([text], 300)):
        read(b"many words " * 50)
        with pytest.raises(UserError, match=r"of 100 bytes, which begins with 'xxxx.*has 100 that .* above the 64 "):
            read(b"x" * 100)
    file = json.loads(BPE.to_json())
    file["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    other = SubwordTokenizer.load(tmp_path / "tokenizer.json")
    assert list(other.pieces(b"many words " * 5)) == [b"many words " * 5]
    with pytest.raises(UserError, match="has 550 that"):
        list(other.pieces(b"many words " * 50))


def table(column):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column}), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * 400, r"a\.jsonl, line 2 has more than the 300 bytes"),
        ("a.json", b'{"rows": ["x", "' + b"x" * 400 + b'"]}', r"a\.json, document 2 has more than the 300 bytes"),
        ("a.json", b'{"rows": ["' + b'x", "' * 300 + b'x"]}', r"a\.json has more than the 1,000 bytes .* as \.jsonl"),
        ("a.parquet", table(["x", "y" * 301]), r"a\.parquet, row 1 has more than the 300 bytes"),
        ("a.parquet", table(["y" * 999]), r"a\.parquet, row group 0, by its mean a row has more than the 300 bytes"),
    ],
)
def test_what_is_too_long_is_refused_with_file_and_place(tmp_path, small, name, content, match):
    small(MOST_DOCUMENT_BYTES=300, MOST_JSON_BYTES=1000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        list(text_files.text_files(str(tmp_path / name), document_bytes=300).read())
    assert "\n" not in str(raised.value)


def test_a_parquet_file_is_decoded_a_few_rows_at_a_time(tmp_path, small):
    texts = ["x" * 50, None, "\u00e9" * 30] * 10
    (tmp_path / "a.parquet").write_bytes(table(pa.array(texts)))
    small(PARQUET_BATCH_BYTES=200)
    read = list(text_files.text_files(str(tmp_path / "a.parquet")).read())
    assert read == [text.encode() for text in texts if text is not None]


def test_documents_can_be_cut_no_longer_than_they_may_be(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"document_bytes = 200000000 must be at least 256 and at most 1\.34218e\+08"):
        text_files.text_files(str(tmp_path / "a.txt"), document_bytes=200_000_000)


# Memory, in a process of its own.

MEASURE = """
import re, sys
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import text_files
from crescendo.experiments.runtime.errors import UserError
import pyarrow.parquet
# Of this process alone: what `getrusage` says begins with the memory of the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
for path in sys.argv[3:]:
    try:
        says = str(text_data(text_files(path, errors=sys.argv[1]), sequence_length=512, cache_directory=sys.argv[2]))
    except UserError as error:
        says = f"refused: {error}"
    print(peak() - before, says)
"""


def measured(cache, *paths, errors="strict"):
    """The growth of memory so far, in MiB, and what is said, of one corpus after the other."""
    command = [sys.executable, "-c", MEASURE, errors, str(cache), *map(str, paths)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [re.match(r"(\d+) (.*)", line) for line in done.stdout.splitlines()]
    return [(int(each[1]), each[2]) for each in found if each]


def written(path, pieces):
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
    return path


def hostile(folder, scale):
    """Files whose sizes are those of the full scale times `scale`."""
    million = int(1_000_000 * scale)
    numbers = b"".join(b"%07d" % i for i in range(million // 7 + 1))[:million]
    words = b"the quick brown fox and caf\xc3\xa9 \\u00e9 "
    noise = np.random.default_rng(0)
    texts = [b'{"text": "text %d"}\n' % i for i in range(9999)]
    pairs = b"".join(b'{"text": "%02d"}\n' % i for i in range(100))
    lines = (b'{"text": "%d %s"}\n' % (i, words * (100 * million // len(words))) for i in range(4))
    return {
        "one line": written(folder / "line.txt", [numbers] * 2000),
        "empty": written(folder / "empty.jsonl", [*[b'{"text": ""}\n' * million] * 10, *texts]),
        "bad": written(folder / "bad.txt", (noise.bytes(million) for _ in range(200))),
        "lines": written(folder / "lines.jsonl", [*lines, *texts]),
        "letters": written(folder / "letters.jsonl", [pairs * (10 * million // 100)]),
        "one document": written(folder / "one.jsonl", [b'{"text": "', *[b"y" * million] * 2000, b'"}\n']),
    }


def test_memory_is_bounded_by_batches_and_not_by_files(tmp_path):
    """A two-hundredth of the full scale, but for one line of 40 MB, which would be seen if it were held at once."""
    files = hostile(tmp_path, 1 / 200)
    files["one line"].write_bytes(files["one line"].read_bytes() * 4)
    of = [files[name] for name in ("one line", "empty", "bad", "lines")]
    memory, says = zip(*measured(tmp_path / "cache", *of, errors="replace"), strict=True)
    assert says[0].startswith("2,442 documents, 40,002,442 tokens")
    assert says[1].startswith("9,999 documents, ")
    assert says[2].startswith("6")
    assert says[3].startswith("10,003 documents, 1,8")
    assert memory[2] < 60
    assert memory[3] < 60 + 8  # a line of 500 kB is there a few times


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hostile_text_at_full_scale(tmp_path):
    """2 GB in a line, 10 million documents that are empty or a letter, 200 MB that are no UTF-8, lines of 100 MB."""
    files = hostile(tmp_path, 1)
    # To pack a line of 2 GB in 3.9 million rows takes 70 bytes a row.
    most = {"one line": 350, "empty": 100, "bad": 150, "lines": 1200, "letters": 1000, "one document": 600}
    for name, path in files.items():
        errors = "replace" if name == "bad" else "strict"
        ((memory, says),) = measured(tmp_path / f"cache {name}", path, errors=errors)
        print(f"{name}: {memory} MiB: {says[:150]}")
        assert memory < most[name]
        if name == "one document":
            assert re.match(r"refused: .*one\.jsonl, line 1 has more than the 134,217,728 bytes", says)
        else:
            assert re.match(r"[\d,]+ documents", says), says
