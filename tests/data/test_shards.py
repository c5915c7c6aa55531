import json
from pathlib import Path

import numpy as np
import pytest

from ternlm.data import shards
from ternlm.data.errors import DataError
from ternlm.data.shards import MANIFEST, ShardSet, ShardWriter, write_manifest

DOCUMENTS = [[[1, 2, 3], [], [4, 5]], [], [[7, 8, 9, 10]], [[]], [[11], [12, 13]]]
FLAT = [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13]
ENDS = [3, 3, 5, 9, 9, 10, 12]


def write_set(folder: Path, documents=DOCUMENTS, masks=None, vocab_size=300) -> Path:
    """Write one shard per list of documents; masks: {(shard, document): mask}."""
    infos = []
    for index, shard in enumerate(documents):
        with ShardWriter(folder, f"shard-{index:05}", vocab_size) as writer:
            for number, ids in enumerate(shard):
                writer.add(ids, (masks or {}).get((index, number)))
        infos.append(writer.close())
    tokenizer = {"fingerprint": "f", "vocab_size": vocab_size}
    write_manifest(folder, infos, tokenizer=tokenizer, num_bytes=99, options={"min_length": 0})
    return folder


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_any_range_of_tokens_is_that_of_all_documents_in_a_row(tmp_path):
    data = ShardSet.open(write_set(tmp_path))
    assert (data.num_tokens, data.num_documents) == (len(FLAT), len(ENDS))
    for start in range(len(FLAT) + 1):
        for stop in range(start, len(FLAT) + 1):
            ids, trained = data.read(start, stop)
            assert ids.tolist() == FLAT[start:stop]
            assert trained is None


def test_any_range_of_documents_has_its_ends_in_tokens_of_the_whole_set(tmp_path):
    data = ShardSet.open(write_set(tmp_path))
    for first in range(len(ENDS) + 1):
        for last in range(first, len(ENDS) + 1):
            assert data.ends(first, last).tolist() == ENDS[first:last]


def test_each_document_reads_back_and_is_named_by_its_shard(tmp_path):
    data = ShardSet.open(write_set(tmp_path))
    documents = [ids for shard in DOCUMENTS for ids in shard]
    assert [data.document(index)[0].tolist() for index in range(len(documents))] == documents
    assert data.place(3) == f"{tmp_path / 'shard-00002.tokens'}, document 0"
    assert data.place(6) == f"{tmp_path / 'shard-00004.tokens'}, document 1"


def test_a_range_outside_the_set_is_refused(tmp_path):
    data = ShardSet.open(write_set(tmp_path))
    with pytest.raises(IndexError, match="13"):
        data.read(0, 13)


def test_a_mask_is_written_only_for_shards_that_need_one_and_reads_back(tmp_path):
    masks = {(0, 2): [1, 0], (2, 0): [1, 1, 1, 1], (4, 1): [0, 1]}
    data = ShardSet.open(write_set(tmp_path, masks=masks))
    assert sorted(path.name for path in tmp_path.glob("*.mask")) == ["shard-00000.mask", "shard-00004.mask"]
    _, trained = data.read(0, len(FLAT))
    assert [FLAT[i] for i in np.flatnonzero(~trained)] == [5, 12]
    assert data.read(5, 9)[1] is None
    data.verify()


def test_a_shard_written_again_without_mask_leaves_none_behind(tmp_path):
    write_set(tmp_path, masks={(0, 2): [1, 0]})
    data = ShardSet.open(write_set(tmp_path))
    assert not list(tmp_path.glob("*.mask"))
    assert data.read(0, len(FLAT))[1] is None


@pytest.mark.parametrize(("vocab_size", "dtype", "size"), [(65536, "uint16", 2), (65537, "uint32", 4)])
def test_ids_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, vocab_size, dtype, size):
    largest = vocab_size - 1
    data = ShardSet.open(write_set(tmp_path, [[[0, largest]]], vocab_size=vocab_size))
    assert data.read(0, 2)[0].tolist() == [0, largest]
    assert json.loads((tmp_path / MANIFEST).read_text())["dtype"] == dtype
    expected = b"".join(id.to_bytes(size, "little") for id in (0, largest))
    assert (tmp_path / "shard-00000.tokens").read_bytes() == expected
    assert (tmp_path / "shard-00000.ends").read_bytes() == (2).to_bytes(8, "little")


@pytest.mark.parametrize("id", [-1, 300, 70000])
def test_an_id_outside_the_vocabulary_is_refused_and_no_file_is_left(tmp_path, id):
    documents = [[[1, 2], [5, id]]]
    with pytest.raises(DataError, match=f"document 1: token id {id} .* 300"):
        write_set(tmp_path, documents, masks={(0, 0): [1, 0]})
    assert not list(tmp_path.iterdir())


def test_a_shard_appears_only_when_it_is_whole(tmp_path):
    with ShardWriter(tmp_path, "shard-00000", 300) as writer:
        writer.add([1, 2])
        assert not list(tmp_path.glob("*.tokens"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.ends", "shard-00000.tokens"]


@pytest.mark.parametrize("suffix", ["tokens", "ends", "mask"])
def test_a_truncated_shard_is_refused_with_file_and_both_sizes(tmp_path, suffix):
    write_set(tmp_path, masks={(2, 0): [1, 0, 1, 1]})
    file = tmp_path / f"shard-00002.{suffix}"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{suffix}: {len(whole) - 1} bytes.*{len(whole)}; .* copy it again"):
        ShardSet.open(tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    write_set(tmp_path)
    (tmp_path / "shard-00004.ends").unlink()
    with pytest.raises(DataError, match=r"shard-00004\.ends: missing"):
        ShardSet.open(tmp_path)


def test_a_folder_whose_preparation_did_not_finish_is_refused(tmp_path):
    write_set(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(DataError, match="run the same `tern data prepare` to its end"):
        ShardSet.open(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no manifest\.json; give a folder written by"):
        ShardSet.open(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        ShardSet.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be 'ternlm-tokens'"),
        ({"version": 2}, "version 2, but this TernLM reads version 1"),
        ({"dtype": "float32"}, "'float32' must be one of uint16, uint32"),
        ({"num_tokens": 11}, "num_tokens is 11, but its shards add up to 12"),
        ({"num_documents": 8}, "num_documents is 8, but its shards add up to 7"),
        ({"shards": [{"name": "shard-00000"}]}, "a shard has no 'tokens'"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(tmp_path, changes, message):
    write_set(tmp_path)
    edit_manifest(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("text", ["{", '"text"', '{"format": "ternlm-tokens", "version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    write_set(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ShardSet.open(tmp_path)


def test_verify_finds_one_changed_byte(tmp_path):
    data = ShardSet.open(write_set(tmp_path))
    data.verify()
    file = tmp_path / "shard-00002.tokens"
    file.write_bytes(bytes([9]) + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"shard-00002\.tokens: its SHA-256 is"):
        data.verify()


def test_a_set_of_more_shards_than_may_be_open_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    data = ShardSet.open(write_set(tmp_path))
    for _ in range(2):
        assert data.read(0, len(FLAT))[0].tolist() == FLAT
        assert data.ends(0, len(ENDS)).tolist() == ENDS
