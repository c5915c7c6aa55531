"""Rows of every packing against a reference that is written down token by token."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.data.batch import Batch
from ternlm.data.internlm import InternLMFiles
from ternlm.data.pack import pack
from ternlm.data.shards import ShardSet, ShardWriter, write_manifest
from ternlm.data.source import EMPTY_WINDOW, Source

PACKINGS = ["documents", "across", "pad"]
DOCUMENTS = st.lists(st.lists(st.integers(-50, 50).filter(bool), min_size=0, max_size=11), min_size=1, max_size=12)

WHOLE = {"pad": "pad"}


def reference_rows(documents, seq_len, packing, keep_last):
    """Per row: its (token, target, weight, position) per place, and its segments. Negative ids: no loss."""
    places = [[(d, i) for i in range(len(ids))] for d, ids in enumerate(documents)]
    if packing == "pad":
        rows = [document[:seq_len] for document in places if len(document) >= 2]
    else:
        flat = [place for document in places for place in document]
        rows = [flat[at : at + seq_len] for at in range(0, len(flat), seq_len)]
        rows = [row for row in rows if keep_last or len(row) == seq_len]
    return [reference_row(documents, row, seq_len, packing) for row in rows]


def reference_row(documents, row, seq_len, packing):
    filled = []
    for column, (d, i) in enumerate(row):
        fragment_start = next(place for place in row if place[0] == d)[1]
        has_target = i + 1 < len(documents[d])
        if packing == "across":
            has_target = (d, i + 1) in row
        trained = has_target and documents[d][i + 1] > 0
        target = documents[d][i + 1] if trained else 0
        position = column if packing == "across" else i - fragment_start
        filled.append((abs(documents[d][i]), target, float(trained), position))
    groups = [[d for d, _ in row]] if packing == "across" else [[d] for d in dict.fromkeys(d for d, _ in row)]
    segments = [sum(d in group for d, _ in row) for group in groups]
    padding = seq_len - len(row)
    filled += [(0, 0, 0.0, place) for place in range(padding)]
    return filled, tuple(segments + [padding] * (padding > 0))


def packed_rows(batch: Batch):
    columns = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.positions_BT)
    rows = [list(zip(*row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    return list(zip(rows, batch.lengths, strict=True))


def pack_all(source: Source, packing: str) -> Batch:
    windows = [source.window(position) for position in range(source.num_sequences)]
    types = [0] * len(windows)
    return pack(windows, types, ("en",), seq_len=source.seq_len, across=packing == "across")


def open_shards(folder: str, documents, shard_size: int) -> ShardSet:
    infos = []
    for index in range(0, len(documents), shard_size):
        with ShardWriter(folder, f"shard-{len(infos):05}", 51) as writer:
            for ids in documents[index : index + shard_size]:
                writer.add(np.abs(ids), np.array(ids) > 0)
        infos.append(writer.close())
    write_manifest(folder, infos, tokenizer={"fingerprint": "f", "vocab_size": 51}, num_bytes=0, options={})
    return ShardSet.open(folder)


def open_bins(folder: str, documents) -> InternLMFiles:
    meta, offset = [], 0
    with Path(folder, "a.bin").open("wb") as file:
        for ids in documents:
            meta.append((offset, len(ids)))
            offset += file.write((json.dumps({"tokens": ids}) + "\n").encode())
    with Path(folder, "a.bin.meta").open("wb") as file:
        np.save(file, np.array(meta, np.int32))
    return InternLMFiles.open(folder)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 9), shard_size=st.integers(1, 5), validation=st.booleans())
def test_rows_from_shards_are_those_of_the_reference(packing, documents, seq_len, shard_size, validation):
    with tempfile.TemporaryDirectory() as folder:
        source = Source(
            "en",
            open_shards(folder, documents, shard_size),
            seq_len=seq_len,
            whole_documents=WHOLE.get(packing),
            validation_fraction=1.0 if validation else 0.0,
            validation=validation,
        )
        rows = packed_rows(pack_all(source, packing))
    assert rows == reference_rows(documents, seq_len, packing, validation)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=25, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 9))
def test_rows_from_internlm_bins_are_those_of_the_reference(packing, documents, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        source = Source("en", open_bins(folder, documents), seq_len=seq_len, whole_documents=WHOLE.get(packing))
        rows = packed_rows(pack_all(source, packing))
    assert rows == reference_rows(documents, seq_len, packing, False)


def pack_documents(tmp_path, documents, seq_len, packing) -> Batch:
    store = open_shards(str(tmp_path), documents, 3)
    source = Source("en", store, seq_len=seq_len, whole_documents=WHOLE.get(packing))
    return pack_all(source, packing)


def test_documents_apart_has_these_rows(tmp_path):
    batch = pack_documents(tmp_path, [[1, 2, 3], [4, 5, 6, 7], [8, -9]], 4, "documents")
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.targets_BT.tolist() == [[2, 3, 0, 5], [6, 7, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert batch.lengths == ((3, 1), (3, 1))


def test_across_has_no_target_at_the_end_of_a_row_and_positions_over_the_whole_row(tmp_path):
    batch = pack_documents(tmp_path, [[1, 2, 3], [4, 5, 6, 7], [8, -9]], 4, "across")
    assert batch.targets_BT.tolist() == [[2, 3, 0, 0], [6, 7, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.lengths == ((4,), (4,))


def test_pad_has_one_document_a_row_cut_or_padded(tmp_path):
    batch = pack_documents(tmp_path, [[1, 2, 3], [4, 5, 6, 7, 9], [8]], 4, "pad")
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.targets_BT.tolist() == [[2, 3, 0, 0], [5, 6, 7, 9]]
    assert batch.weights_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch.lengths == ((3, 1), (4,))


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 9))
def test_an_epoch_of_whole_sequences_holds_every_token_once_and_trains_every_target_once(documents, seq_len):
    flat = [id for ids in documents for id in ids]
    with tempfile.TemporaryDirectory() as folder:
        batch = pack_all(Source("en", open_shards(folder, documents, 4), seq_len=seq_len), "documents")
    whole = len(flat) // seq_len * seq_len
    assert batch.tokens_BT.flatten().tolist() == [abs(id) for id in flat[:whole]]
    bounds = np.cumsum([0, *(len(ids) for ids in documents)])
    targets = [i for i in range(1, min(whole + 1, len(flat))) if i not in bounds and flat[i] > 0]
    assert batch.targets_BT[batch.weights_BT == 1].tolist() == [flat[i] for i in targets]


def test_an_empty_window_is_a_row_of_padding():
    batch = pack([EMPTY_WINDOW], [1], ("en", "cn"), seq_len=3, across=True)
    assert packed_rows(batch) == [([(0, 0, 0.0, 0), (0, 0, 0.0, 1), (0, 0, 0.0, 2)], (3,))]
    assert batch.types_B.tolist() == [1]


def test_a_batch_has_the_dtypes_of_its_contract_and_moves_whole(tmp_path):
    batch = pack_documents(tmp_path, [[1, 2, 3], [4, 5, 6, 7]], 2, "documents")
    moved = batch.to("meta")
    for each in (batch, moved):
        assert each.weights_BT.dtype == torch.float32
        integers = (each.tokens_BT, each.targets_BT, each.positions_BT, each.types_B)
        assert {tensor.dtype for tensor in integers} == {torch.int64}
    tensors = (moved.tokens_BT, moved.targets_BT, moved.weights_BT, moved.positions_BT, moved.types_B)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.lengths, moved.names) == (batch.lengths, batch.names)
