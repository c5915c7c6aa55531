import json
from pathlib import Path

import numpy as np
import pytest

from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles, find_bins

DOCUMENTS = [[1, -5, -6, 7, 2], [1, 2], [], [-1, 103027, 0, -103028, 13]]


def write_bin(path: Path, documents=DOCUMENTS, dtype=np.int32) -> Path:
    """Write a .bin and its .meta the way InternLM's tools did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, offset = [], 0
    with path.open("wb") as file:
        for tokens in documents:
            line = json.dumps({"tokens": tokens}) + "\n"
            meta.append((offset, len(tokens)))
            offset += file.write(line.encode("utf-8"))
    write_meta(path, np.array(meta, dtype=dtype))
    return path


def write_meta(path: Path, meta: np.ndarray) -> None:
    with path.with_name(path.name + ".meta").open("wb") as file:
        np.save(file, meta)


def test_the_metas_of_these_tests_are_those_of_the_ancestors_documentation(tmp_path):
    documents = [[1000] * 13 + [10000] * 2 + [100], [1000] * 19 + [100] * 5, [1000] * 17]
    write_bin(tmp_path / "a.bin", documents)
    assert np.load(tmp_path / "a.bin.meta").tolist() == [[0, 16], [110, 24], [262, 17]]
    assert InternLMFiles.open(tmp_path / "a.bin").ends(0, 3).tolist() == [16, 40, 57]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_documents_are_the_absolute_ids_of_their_lines(tmp_path, dtype):
    data = InternLMFiles.open(write_bin(tmp_path / "a.bin", dtype=dtype))
    assert data.num_documents == 4
    assert data.num_tokens == 12
    assert data.ends(0, 4).tolist() == [5, 7, 7, 12]
    assert data.ends(1, 3).tolist() == [7, 7]
    for index, tokens in enumerate(DOCUMENTS):
        assert data.document(index)[0].tolist() == [abs(id) for id in tokens]


def test_negative_ids_and_id_zero_carry_no_loss(tmp_path):
    data = InternLMFiles.open(write_bin(tmp_path / "a.bin"))
    assert data.document(0)[1].tolist() == [True, False, False, True, True]
    assert data.document(1)[1] is None
    assert data.document(3)[1].tolist() == [False, True, False, False, True]


def test_any_range_of_tokens_is_that_of_all_documents_in_a_row(tmp_path):
    write_bin(tmp_path / "b.bin", [[20, 21], [-22]])
    write_bin(tmp_path / "a.bin")
    data = InternLMFiles.open(tmp_path)
    flat = [id for tokens in [*DOCUMENTS, [20, 21], [-22]] for id in tokens]
    assert data.num_tokens == len(flat)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            ids, trained = data.read(start, stop)
            assert ids.tolist() == [abs(id) for id in flat[start:stop]]
            expected = [id > 0 for id in flat[start:stop]]
            assert (trained is None) <= all(expected)
            assert trained is None or trained.tolist() == expected


def test_a_folder_tree_is_read_in_the_order_of_its_sorted_paths(tmp_path):
    for name in ("en/b.bin", "en/a.bin", "cn/z.bin", "top.bin"):
        write_bin(tmp_path / name, [[1, 2]])
    (tmp_path / "en/notes.txt").write_text("not data")
    found = [str(path.relative_to(tmp_path)) for path in find_bins(tmp_path)]
    assert found == ["top.bin", "cn/z.bin", "en/a.bin", "en/b.bin"]
    data = InternLMFiles.open(tmp_path)
    assert data.num_documents == 4
    assert data.place(2) == f"{tmp_path / 'en/a.bin'}:1 (document 0, byte 0)"


def test_a_document_is_parsed_once_for_many_windows_of_it(tmp_path):
    data = InternLMFiles.open(write_bin(tmp_path / "a.bin", [list(range(1, 100))]))
    assert all(data.read(start, start + 5)[0][0] == start + 1 for start in range(0, 90, 5))
    assert data._parse.cache_info().misses == 1


def test_a_bin_without_lines_has_no_documents(tmp_path):
    data = InternLMFiles.open(write_bin(tmp_path / "a.bin", []))
    assert (data.num_documents, data.num_tokens) == (0, 0)
    assert data.read(0, 0)[0].tolist() == []


def test_a_place_without_bins_is_refused(tmp_path):
    with pytest.raises(DataError, match="no InternLM data"):
        InternLMFiles.open(tmp_path)


def test_a_bin_without_meta_is_refused(tmp_path):
    path = write_bin(tmp_path / "a.bin")
    (tmp_path / "a.bin.meta").unlink()
    with pytest.raises(DataError, match=r"a\.bin: has no a\.bin\.meta beside it"):
        InternLMFiles.open(path)


def test_a_meta_that_is_no_array_is_refused(tmp_path):
    path = write_bin(tmp_path / "a.bin")
    (tmp_path / "a.bin.meta").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a\.bin\.meta: not a \.npy array"):
        InternLMFiles.open(path)


@pytest.mark.parametrize("meta", [np.array([0, 5]), np.array([[0], [5]]), np.array([[0.0, 5.0]])])
def test_a_meta_of_another_shape_or_type_is_refused(tmp_path, meta):
    path = write_bin(tmp_path / "a.bin")
    write_meta(path, meta)
    with pytest.raises(DataError, match=r"a\.bin\.meta: its (shape|dtype) is"):
        InternLMFiles.open(path)


@pytest.mark.parametrize("offset", [-2147483000, 10_000])
def test_an_offset_outside_the_bin_is_refused(tmp_path, offset):
    path = write_bin(tmp_path / "a.bin")
    write_meta(path, np.array([[0, 5], [offset, 2]]))
    with pytest.raises(DataError, match=f"row 1 says byte {offset}, 2 tokens, but a.bin has"):
        InternLMFiles.open(path)


def test_lines_that_the_meta_does_not_list_are_refused(tmp_path):
    path = write_bin(tmp_path / "a.bin")
    meta = np.load(tmp_path / "a.bin.meta")
    for kept, unlisted in ((3, 1), (0, 4)):
        write_meta(path, meta[:kept])
        size = len(b"".join(path.read_bytes().splitlines(keepends=True)[-unlisted:]))
        with pytest.raises(DataError, match=rf"its last {size} bytes are lines that a\.bin\.meta doesn't list"):
            InternLMFiles.open(path)


def test_a_bin_cut_off_in_its_last_line_is_refused_when_opened(tmp_path):
    path = write_bin(tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="its last line was cut off"):
        InternLMFiles.open(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [1, 2', "not a line"),
        ('{"ids": [1, 2]}', "not a line"),
        ("[1, 2]", "not a line"),
        ('{"tokens": 5}', "must be a list of whole numbers"),
        ('{"tokens": [1.5, 2]}', "must be a list of whole numbers"),
        ('{"tokens": ["a", "b"]}', "must be a list of whole numbers"),
        ('{"tokens": [[1, 2]]}', "must be a list of whole numbers"),
        ('{"tokens": [1, 2, 3]}', "3 tokens, but its .meta says 2"),
    ],
)
def test_a_malformed_line_is_refused_with_file_line_and_byte(tmp_path, line, message):
    path = tmp_path / "a.bin"
    good = '{"tokens": [1, 2]}\n'
    path.write_text(good + line + "\n" + good)
    offsets = [0, len(good), len(good) + len(line) + 1]
    write_meta(path, np.array([(offset, 2) for offset in offsets]))
    data = InternLMFiles.open(path)
    assert data.document(2)[0].tolist() == [1, 2]
    with pytest.raises(DataError, match=rf"a\.bin:2 \(document 1, byte {len(good)}\): .*{message}"):
        data.document(1)


@pytest.mark.parametrize("scan_bytes", [1, 7, 4 << 20])
def test_ids_outside_the_vocabulary_are_found_before_anything_is_read(tmp_path, monkeypatch, scan_bytes):
    monkeypatch.setattr("ternlm.data.internlm._SCAN_BYTES", scan_bytes)
    write_bin(tmp_path / "a.bin")
    write_bin(tmp_path / "b.bin", [[1, 99], [5, -103029, 2]])
    data = InternLMFiles.open(tmp_path)
    data.check_ids(103030)
    with pytest.raises(DataError, match=r"b\.bin:2: token id 103029 is not below the model's vocab_size = 103029"):
        data.check_ids(103029)
    with pytest.raises(DataError, match=r"a\.bin:4: token id 103027 .* vocab_size = 5000"):
        data.check_ids(5000)


def test_the_search_for_large_ids_ends_after_its_limit(tmp_path):
    write_bin(tmp_path / "a.bin", [[1, 2], [70]])
    data = InternLMFiles.open(tmp_path)
    data.check_ids(50, max_bytes=20)
    with pytest.raises(DataError, match="token id 70"):
        data.check_ids(50)
