"""Records out of json, jsonl and parquet: whole, nested, cut anywhere; and where the bad ones are."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ternlm.data.errors import DataError
from ternlm.data.plan import find_inputs, make_units
from ternlm.data.records import read_records

TALK = [
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}], "n": 1},
    {"messages": [{"role": "user", "content": "b"}], "n": None},
    {"messages": [], "n": 3},
]


def read(path, unit_bytes=1 << 20):
    """Read a file as it is planned, span by span: the records with their places, and what is bad."""
    bad = []
    spans = [span for unit in make_units(find_inputs([path]), "file", unit_bytes) for span in unit.spans]
    found = [(place(), record) for span in spans for place, record in read_records(span, bad.append)]
    return found, [(record.kind, record.where, record.what) for record in bad]


def lines_of(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


PACKINGS = {"": lambda raw: raw, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", PACKINGS)
def test_records_come_whole_with_their_places(tmp_path, packing):
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACKINGS[packing](b"\n" + lines_of(TALK)))
    assert read(tmp_path / f"a.jsonl{packing}") == ([(f":{n}", record) for n, record in enumerate(TALK, 2)], [])
    (tmp_path / f"a.json{packing}").write_bytes(PACKINGS[packing](json.dumps(TALK).encode()))
    assert read(tmp_path / f"a.json{packing}") == ([(f", item {n}", record) for n, record in enumerate(TALK, 1)], [])


def test_parquet_gives_all_columns_with_lists_and_structs_as_objects(tmp_path):
    pq.write_table(pa.Table.from_pylist(TALK), tmp_path / "a.parquet", row_group_size=1)
    expected = [(f", row {n}", record) for n, record in enumerate(TALK, 1)]
    assert read(tmp_path / "a.parquet") == (expected, [])
    assert read(tmp_path / "a.parquet", unit_bytes=400) == (expected, [])


def test_a_parquet_text_that_is_not_utf8_spoils_its_own_value_alone(tmp_path):
    texts = pa.array([b"ok", b"\xff"]).view(pa.binary()).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, *texts.buffers()[1:])
    pq.write_table(pa.table({"text": column, "n": [1, 2]}), tmp_path / "a.parquet")
    assert [record for _, record in read(tmp_path / "a.parquet")[0]] == [
        {"text": "ok", "n": 1},
        {"text": b"\xff", "n": 2},
    ]


def test_lines_keep_their_numbers_when_a_file_is_cut(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([*TALK, [1]]) + b"{\n")
    found, bad = read(tmp_path / "a.jsonl", unit_bytes=30)
    assert [place for place, _ in found] == [":1", ":2", ":3"]
    assert bad[0] == ("wrong type", ":4", "must be an object, not an array")
    assert bad[1][:2] == ("not JSON", ":5")


def test_what_is_no_record_is_told_with_its_place(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, "text", null, 7]')
    found, bad = read(tmp_path / "a.json")
    assert found == [(", item 1", {"a": 1})]
    assert bad == [
        ("wrong type", ", item 2", "must be an object, not a string"),
        ("wrong type", ", item 3", "must be an object, not null"),
        ("wrong type", ", item 4", "must be an object, not a number"),
    ]
    (tmp_path / "b.json").write_text('{"data": [1]}')
    assert read(tmp_path / "b.json")[0] == [(", item 1", {"data": [1]})]
    (tmp_path / "c.jsonl").write_text("\n")
    assert read(tmp_path / "c.jsonl") == ([], [("empty file", "", "holds no document")])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines_of(TALK))[:-9])
    assert read(tmp_path / "d.jsonl.gz")[1][0][0] == "damaged file"
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    assert read(tmp_path / "e.parquet")[1][0][0] == "damaged file"


def test_a_file_that_went_away_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (span,) = make_units(find_inputs([tmp_path / "a.jsonl"]), "file", 99)[0].spans
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: can't be read \(No such file"):
        list(read_records(span, print))
