"""Whole documents in sequences: every one once, none too full, little padding; cut and dropped ones counted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternlm.data.best_fit import best_fit
from ternlm.data.pack import pack
from ternlm.data.shards import ShardSet, ShardWriter, write_manifest
from ternlm.data.source import Source

SEQ_LEN = 20


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=60))
def test_each_document_lies_in_one_sequence_that_has_room_for_it(lengths):
    lengths = np.array(lengths, np.int64)
    order, firsts = best_fit(lengths, SEQ_LEN)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[order], firsts[:-1])
    assert sums.max() <= SEQ_LEN
    # Best fit decreasing needs at most 11/9 of the fewest sequences and a bit (Johnson, 1973).
    assert len(sums) <= 11 / 9 * -(-lengths.sum() // SEQ_LEN) + len(lengths[lengths > SEQ_LEN // 2]) + 1


def test_documents_of_real_lengths_waste_less_than_half_a_percent():
    lengths = np.random.default_rng(0).lognormal(5.0, 0.6, 5000).astype(np.int64).clip(10, 2048)
    _, firsts = best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * (len(firsts) - 1)) > 0.995


def test_the_fullest_sequence_with_room_is_taken():
    order, firsts = best_fit(np.array([12, 15, 5, 8]), SEQ_LEN)
    assert [order[a:b].tolist() for a, b in pairwise(firsts)] == [[1, 2], [0, 3]]


def store(folder, documents):
    with ShardWriter(folder, "shard-00000", 1000) as shard:
        for ids, trained in documents:
            shard.add(ids, None if trained is None else np.array(trained, bool))
    write_manifest(folder, [shard.close()], tokenizer={"fingerprint": "f", "vocab_size": 1000}, num_bytes=0, options={})
    return ShardSet.open(folder)


def test_rows_hold_whole_documents_that_have_no_target_outside_themselves(tmp_path):
    documents = [(list(range(10 * i, 10 * i + length)), None) for i, length in enumerate((4, 6, 3, 5), 1)]
    source = Source("s", store(tmp_path, documents), seq_len=10, whole_documents="best_fit")
    windows = [source.window(i) for i in range(source.num_sequences)]
    batch = pack(windows, [0] * len(windows), ("s",), seq_len=10, across=False)
    assert source.num_sequences == 2
    assert batch.lengths == ((6, 4), (5, 3, 2))
    assert batch.tokens_BT.tolist() == [
        [20, 21, 22, 23, 24, 25, 10, 11, 12, 13],
        [40, 41, 42, 43, 44, 30, 31, 32, 0, 0],
    ]
    assert batch.targets_BT.tolist() == [
        [21, 22, 23, 24, 25, 0, 11, 12, 13, 0],
        [41, 42, 43, 44, 0, 31, 32, 0, 0, 0],
    ]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("packing", "too_long", "cut", "dropped", "kept"),
    [("best_fit", "cut", 1, 1, 3), ("best_fit", "drop", 0, 2, 2), ("pad", "cut", 2, 0, 4), ("pad", "drop", 0, 2, 2)],
)
def test_long_documents_are_cut_or_dropped_and_counted(tmp_path, packing, too_long, cut, dropped, kept):
    answer_behind_the_cut = [False] * 12 + [True] * 3
    documents = [
        (list(range(1, 5)), None),
        (list(range(1, 13)), [False] * 5 + [True] * 7),
        (list(range(1, 16)), answer_behind_the_cut),
        (list(range(1, 11)), None),
    ]
    its = store(tmp_path, documents)
    source = Source("s", its, seq_len=10, whole_documents=packing, too_long=too_long)
    assert (source.num_cut, source.num_dropped, source.num_documents) == (cut, dropped, kept)
    found = sorted(len(source.window(i).documents) for i in range(source.num_sequences))
    assert sum(found) == kept
    if cut:
        (long,) = [w for w in map(source.window, range(source.num_sequences)) if 1 in w.documents]
        assert long.lengths.tolist() == [10]
        assert long.ids.tolist() == list(range(1, 12))  # the last token's target is known
