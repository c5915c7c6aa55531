"""Documents out of every format and packing, and what is said of records that can't be used."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ternlm.data.errors import DataError
from ternlm.data.plan import default_unit_bytes, find_inputs, make_units
from ternlm.data.readers import ReadOptions, read_documents


def write(folder, name, content):
    """Write a text or bytes, packed as the name says, and return the path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    if name.endswith(".gz"):
        raw = gzip.compress(raw)
    elif name.endswith(".zst"):
        raw = zstandard.compress(raw)
    path.write_bytes(raw)
    return path


def read(path, unit_bytes=1 << 20, format="auto", field="text", text_document="file"):
    """Read a file as `prepare` does: planned, span by span. Returns documents, and (kind, where, what) of the rest."""
    bad = []
    units = make_units(find_inputs([path], format=format), text_document, unit_bytes)
    options = ReadOptions(field, text_document)
    texts = [text for unit in units for span in unit.spans for text in read_documents(span, options, bad.append)]
    return texts, [(record.kind, record.where, record.what) for record in bad]


def lines_of(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


RECORDS = [{"text": "one"}, {"text": "zwei\nüber"}, {"text": "三"}]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_format_and_packing_gives_the_same_documents(tmp_path, packing):
    texts = [record["text"] for record in RECORDS]
    assert read(write(tmp_path, "a.jsonl" + packing, lines_of(*RECORDS))) == (texts, [])
    assert read(write(tmp_path, "a.json" + packing, json.dumps(RECORDS))) == (texts, [])
    assert read(write(tmp_path, "b.json" + packing, json.dumps(texts))) == (texts, [])
    assert read(write(tmp_path, "c.json" + packing, json.dumps(RECORDS[1]))) == (texts[1:2], [])
    assert read(write(tmp_path, "a.txt" + packing, " a\r\n\nb\n")) == ([" a\r\n\nb\n"], [])


def test_parquet_columns_of_every_text_type_are_read(tmp_path):
    texts = [record["text"] for record in RECORDS]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"id": [1, 2, 3], "text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == (texts, [])


def test_a_text_file_is_one_document_or_its_lines_or_paragraphs(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\ntwo\r\n\n \n  three  \nfour")
    assert read(path)[0] == ["one\ntwo\r\n\n \n  three  \nfour"]
    assert read(path, text_document="line")[0] == ["one", "two", "  three  ", "four"]
    assert read(path, text_document="paragraph")[0] == ["one\ntwo", "  three  \nfour"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30), min_size=1, max_size=40),
    st.integers(1, 200),
)
def test_cut_anywhere_a_file_gives_each_line_once(tmp_path_factory, lines, unit_bytes):
    folder = tmp_path_factory.mktemp("cut")
    path = write(folder, "a.jsonl", lines_of(*({"text": "x" + line} for line in lines)))
    assert read(path, unit_bytes) == (["x" + line for line in lines], [])
    plain = write(folder, "a.txt", "\n".join("x" + line for line in lines))
    assert read(plain, unit_bytes, text_document="line")[0] == [("x" + line).removesuffix("\r") for line in lines]


def test_cut_by_row_groups_a_parquet_file_gives_each_row_once(tmp_path):
    texts = [f"row {number}" for number in range(100)]
    pq.write_table(pa.table({"text": [*texts, None]}), tmp_path / "a.parquet", row_group_size=7)
    got, bad = read(tmp_path / "a.parquet", unit_bytes=500)
    assert got == texts
    assert bad == [("wrong type", ", row 101", "field 'text' must be a string, not null")]


def test_bad_jsonl_lines_are_named_by_line_even_far_into_a_cut_file(tmp_path):
    good = lines_of({"text": "good"})
    bad = ['{"text": "open\n', "[1]\n", '{"other": 1}\n', '{"text": 5}\n', '{"text": " "}\n', '{"text": "\\ud83d"}\n']
    expected = [
        ("not JSON", "not one JSON value (Unterminated string starting at: line 1 column 10 (char 9))"),
        ("wrong type", "must be an object with a field 'text', not an array"),
        ("missing field", "no field 'text'; its fields: 'other'"),
        ("wrong type", "field 'text' must be a string, not a number"),
        ("empty text", "a record with an empty text"),
        ("not UTF-8", "field 'text' holds half of a surrogate pair, which isn't text"),
    ]
    content = "".join(good * 9 + line for line in bad)
    for unit_bytes in (1 << 20, 64):
        texts, found = read(write(tmp_path, "a.jsonl", content), unit_bytes)
        assert texts == ["good"] * 54
        assert [(kind, what) for kind, _, what in found] == expected
        lines = [where for kind, where, _ in found if kind != "empty text"]
        assert lines == [":10", ":20", ":30", ":40", ":60"]


def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(tmp_path):
    path = write(tmp_path, "a.txt", b"good\nno\xe9 good\nfine\n")
    problem = ":2", "byte 0xe9 at byte 7 of the file isn't UTF-8 (invalid continuation byte)"
    assert read(path) == ([], [("not UTF-8", *problem)])
    problem = ":2", "byte 0xe9 at byte 2 of the line isn't UTF-8 (invalid continuation byte)"
    assert read(path, text_document="line") == (["good", "fine"], [("not UTF-8", *problem)])
    assert read(path, text_document="paragraph") == ([], [("not UTF-8", *problem)])
    _, bad = read(write(tmp_path, "a.json", b'[\n{"text": "\xff"}]'))
    assert [(kind, where) for kind, where, _ in bad] == [("not UTF-8", ":2")]


def test_bad_json_and_its_items_are_named(tmp_path):
    _, bad = read(write(tmp_path, "a.json", '[{"text": "a"},\n{"text": }]'))
    assert [(kind, where) for kind, where, _ in bad] == [("not JSON", ":2")]
    texts, bad = read(write(tmp_path, "b.json", '[{"text": "a"}, {"tex": "b"}, 3]'))
    assert texts == ["a"]
    assert [(kind, where) for kind, where, _ in bad] == [("missing field", ", item 2"), ("wrong type", ", item 3")]
    deep = write(tmp_path, "c.json", "[" * 100_000)
    assert read(deep)[1][0][0] == "not JSON"


def test_a_parquet_file_without_the_column_or_with_numbers_in_it_is_named(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], [("missing field", "", "no column 'text', only id, body")])
    assert read(tmp_path / "a.parquet", field="body") == (["x"], [])
    bad = [("wrong type", "", "column 'id' is int64, not string")]
    assert read(tmp_path / "a.parquet", field="id") == ([], bad)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_off_is_damaged(tmp_path, name):
    path = write(tmp_path, name, lines_of(*({"text": f"{n} {n * 7919 % 10007}"} for n in range(20_000))))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    texts, bad = read(path)
    assert len(texts) < 20_000
    assert bad[-1][0] == "damaged file"
    path.write_bytes(b"not packed at all")
    assert [kind for kind, _, _ in read(path)[1]] == ["damaged file"]


def test_packed_files_of_several_members_are_read_to_their_end(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read(tmp_path / "a.txt.gz") == (["one two"], [])
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert read(tmp_path / "a.txt.zst") == (["one two"], [])


def test_a_parquet_file_that_is_cut_off_is_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    for unit_bytes in (1 << 20, 100):
        assert [kind for kind, _, _ in read(path, unit_bytes)[1]] == ["damaged file"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_a_document_is_empty(tmp_path, name, content):
    assert read(write(tmp_path, name, content)) == ([], [("empty file", "", "holds no document")])


def test_too_long_a_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ternlm.data.readers.MAX_DOCUMENT_BYTES", 100)
    texts, bad = read(write(tmp_path, "a.txt", "é" * 50 + "\n" + "é" * 51), text_document="line")
    assert texts == ["é" * 50]
    assert bad[0][0] == "too long"
    assert "one document of 102 bytes, beginning 'ééé" in bad[0][2]


def test_folders_are_listed_in_order_without_hidden_files(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.jsonl", ".hidden.txt", ".git/x.txt", "b/c.bin.meta"):
        write(tmp_path / "in", name, "x")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [file.name for file in find_inputs([tmp_path / "in"])] == ["in/a.jsonl", "in/b/a.txt", "in/b/z.txt"]
    assert [file.name for file in find_inputs([tmp_path / "in"], include="*.txt")] == ["in/b/a.txt", "in/b/z.txt"]
    assert [file.name for file in find_inputs([tmp_path / "in"], include="b/a*")] == ["in/b/a.txt"]


def test_inputs_of_the_same_name_are_told_apart(tmp_path):
    paths = [write(tmp_path, name, "x") for name in ("b/x.txt", "a/x.txt")]
    assert [file.name for file in find_inputs(paths)] == ["a/x.txt", "b/x.txt"]


def test_inputs_that_cannot_be_are_errors(tmp_path):
    path = write(tmp_path, "in/a.txt", "x")
    other = write(tmp_path, "other/a.docx", "x")
    packed = write(tmp_path, "a.parquet.gz", "x")
    cases = [
        ([], "auto", "no input"),
        ([tmp_path / "nothing"], "auto", "no such file or folder"),
        ([path, tmp_path / "in"], "auto", "is given twice"),
        ([other], "auto", "can't tell its format from its suffix '.docx'"),
        ([packed], "auto", "unpack it first"),
        ([path], "xml", "format = 'xml' must be one of auto, text"),
    ]
    for inputs, format, message in cases:
        with pytest.raises(DataError, match=message):
            find_inputs(inputs, format=format)
    with pytest.raises(DataError, match=r"no file in it matches include = '\*.json'"):
        find_inputs([tmp_path / "in"], include="*.json")
    assert read(other, format="text") == (["x"], [])


def test_small_files_share_a_unit_and_large_ones_are_cut(tmp_path):
    for number in range(10):
        write(tmp_path / "in", f"{number}.txt", "x" * 30)
    write(tmp_path / "in", "large.jsonl", lines_of({"text": "y" * 20}) * 20)
    units = make_units(find_inputs([tmp_path / "in"]), "file", 100)
    assert [len(unit.spans) for unit in units[:4]] == [3, 3, 3, 1]
    assert sum(unit.size for unit in units) == pytest.approx(300 + 33 * 20, abs=10)
    spans = [span for unit in units for span in unit.spans if span.file.format == "jsonl"]
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert all(span.start % 33 == 0 for span in spans)


def test_units_are_small_for_little_input_and_few_for_much():
    sizes = [default_unit_bytes(total) for total in (0, 1 << 20, 1 << 30, 1 << 40, 1 << 44)]
    assert sizes == [1 << 20, 1 << 20, 1 << 24, 1 << 26, 1 << 30]
