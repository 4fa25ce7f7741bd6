"""Which files a dataset names, and that ranges of any size give every row once and in order."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.config.schema import Dataset
from rayft.data.sources import COMPRESSIONS, read_rows, resolve_files, row_place, split_ranges
from rayft.errors import DataError

# Everything that some readers take for a line end, and only "\n" is one: CR, VT, FF, FS, NEL, LS, PS.
TEXTS = st.text(st.sampled_from('ab{}" \r\x0b\x0c\x1c\x85\u2028\u2029\u00e9\U0001f600'), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n"])
BLANKS = st.lists(st.sampled_from(["", " ", "\r", "\t"]), max_size=2)


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write."""
    half = len(data) // 2
    return b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in (data[:half], data[half:]))


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def rows_of(file: Path, target: int) -> list[tuple[int, dict[str, Any]]]:
    return [row for start, stop in split_ranges(file, target) for row in read_rows(file, start, stop)]


def values(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(file)]


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(BLANKS, TEXTS, ENDS), min_size=1, max_size=8), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 120))
def test_json_lines_in_any_ranges(
    tmp_path: Path, lines: list[tuple[list[str], str, str]], last_end: bool, bom: bool, escape: bool, target: int
) -> None:
    content, expected = b"\xef\xbb\xbf" if bom else b"", []
    for blanks, text, end in lines:
        content += "".join(blank + end for blank in blanks).encode()
        # A byte order mark belongs to the first row, whose first byte it is.
        expected.append((0 if content == b"\xef\xbb\xbf" else len(content), {"t": text}))
        content += (json.dumps({"t": text}, ensure_ascii=escape) + end).encode()
    file = write(tmp_path / "rows.jsonl", content if last_end else content.rstrip(b"\r\n"))
    assert rows_of(file, target) == expected
    for start, stop in split_ranges(file, target):
        assert all(start <= place and (stop is None or place < stop) for place, _ in read_rows(file, start, stop))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS, min_size=1, max_size=8), ENDS, st.booleans(), st.integers(1, 40))
def test_text_lines_in_any_ranges(tmp_path: Path, texts: list[str], end: str, last_end: bool, target: int) -> None:
    content = end.join(texts) + (end if last_end else "")
    file = write(tmp_path / "rows.txt", content or "\n")
    expected = [line.removesuffix("\r") for line in content.split("\n") if line.strip(" \t\r\x0b\x0c")]
    assert [row["text"] for _, row in rows_of(file, target)] == expected


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 3000))
def test_parquet_in_any_ranges(tmp_path: Path, rows: int, group: int, target: int) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"n": pa.array(range(rows), pa.int64()), "m": [[{"role": "user", "content": f"x{i}"}] for i in range(rows)]})
    pq.write_table(table, file, row_group_size=group)
    expected = [(i, {"n": i, "m": [{"role": "user", "content": f"x{i}"}]}) for i in range(rows)]
    assert rows_of(file, target) == expected
    assert list(read_rows(file)) == expected


def test_ranges_are_of_the_size_asked_for(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 1000)
    assert split_ranges(lines, 4000) == [(0, 4000), (4000, 8000), (8000, None)]
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), parquet, row_group_size=100, compression="none", use_dictionary=False)
    size = sum(pq.ParquetFile(parquet).metadata.row_group(0).column(i).total_compressed_size for i in range(1))
    assert split_ranges(parquet, size) == [(i, i + 1) for i in range(9)] + [(9, None)]
    assert split_ranges(parquet, size + 1) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, None)]
    assert split_ranges(parquet, 10 * size) == [(0, None)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_files_have_one_range_and_the_same_rows(tmp_path: Path, compression: str) -> None:
    pq.write_table(pa.table({"a": list(range(50))}), tmp_path / "a.parquet", row_group_size=7)
    write(tmp_path / "a.jsonl", "".join(json.dumps({"a": i}) + "\n" for i in range(50)))
    write(tmp_path / "a.csv", "a,b\n" + "".join(f'{i},"x\ny"\n' for i in range(50)))
    write(tmp_path / "a.json", json.dumps([{"a": i} for i in range(50)]))
    write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(50)))
    for plain in sorted(tmp_path.iterdir()):
        packed = write(plain.with_name(plain.name + compression), PACK[compression](plain.read_bytes()))
        assert split_ranges(packed, 10) == [(0, None)]
        assert list(read_rows(packed)) == list(read_rows(plain)) != []
        with pytest.raises(ValueError, match="no ranges"):
            list(read_rows(packed, 1, None))


def test_csv_values_are_strings_and_quoted_newlines_stay(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", '\ufeffid,text\r\n1,"a\r\nb, ""c"""\r\n\r\n2,\r\n')
    assert list(read_rows(file)) == [(0, {"id": "1", "text": 'a\r\nb, "c"'}), (1, {"id": "2", "text": ""})]
    assert values(write(tmp_path / "a.tsv", "a\tb\n1,2\t3")) == [{"a": "1,2", "b": "3"}]
    assert len(values(write(tmp_path / "long.csv", "a\n" + "x" * 300_000))[0]["a"]) == 300_000


def test_json_arrays_and_the_object_around_one(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": "\u2028"}]
    assert values(write(tmp_path / "a.json", "\ufeff" + json.dumps(rows))) == rows
    assert values(write(tmp_path / "b.json", json.dumps({"version": 2, "tags": ["x"], "data": rows}))) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', "a.jsonl, line 3 (byte 10): the line is not JSON (Expecting value"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "a.jsonl, line 2 (byte 9): every line must be a JSON object, but this one is [2]"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, byte 16: the byte 0xff there is not UTF-8 (invalid start byte)"),
        ("a.txt", b"\xef\xbb\xbfa\xc3\n", "a.txt, byte 4: the byte 0xc3 there is not UTF-8"),
        ("a.csv", b"a\n\xe9\n", "a.csv, byte 2: the byte 0xe9 there is not UTF-8"),
        ("a.json", b'["\xff"]', "a.json, byte 2: the byte 0xff there is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", "a.csv, line 4: the row has 3 fields, the header 2"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv, line 2: the line is not CSV (unexpected end of data)"),
        ("a.csv", b"a,a\n1,2\n", "a column name occurs twice"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "name it .jsonl"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "an array of objects, or an object with one such array"),
        ("a.json", b'[{"a": 1}, 2]', "a.json, row 2: every row must be a JSON object, but this one is 2"),
        ("a.parquet", b"no parquet", "a.parquet: the file is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-20], "a.jsonl.gz: the file is damaged"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz: the file is damaged"),
        ("a.jsonl.bz2", b"no bzip2 at all", "a.jsonl.bz2: the file is damaged"),
        ("a.jsonl.xz", b"no xz at all", "a.jsonl.xz: the file is damaged"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst: the file is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{'), "a.jsonl.gz, line 2 (byte 9): the line is not JSON"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        rows_of(file, 1000)
    assert said in str(caught.value)


def test_parquet_strings_that_are_not_utf8_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": pa.array([b"\xff"]).view(pa.string())}), file)
    with pytest.raises(DataError, match=r"a\.parquet: the file is damaged \('utf-8' codec"):
        values(file)


def test_errors_of_the_operating_system_are_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        values(tmp_path / "a.jsonl")


def test_a_range_names_lines_from_the_start_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 9 + "{\n")
    with pytest.raises(DataError, match=r"line 10 \(byte 81\)"):
        list(read_rows(file, 80, None))
    assert row_place(file, 81) == f"{file}, byte 81"
    assert row_place(tmp_path / "a.csv", 0) == f"{tmp_path}/a.csv, row 1"


def test_lines_stream_in_constant_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for _ in range(40):
            stream.write((json.dumps({"a": "x" * 1000}) + "\n").encode() * 500)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2e6  # of 20 MB


def test_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b/2.jsonl", "b/10.jsonl.gz", "a.PARQUET", "b/c/x.txt", "README.md", ".hidden/x.jsonl", "b/.x.jsonl", "b/x.json.zip"]
    for name in names:
        write(tmp_path / name, "x")
    expected = tuple(str(tmp_path / name) for name in ("a.PARQUET", "b/10.jsonl.gz", "b/2.jsonl", "b/c/x.txt"))
    assert resolve_files("d", Dataset(path=str(tmp_path))) == expected
    assert resolve_files("d", Dataset(path=f"{tmp_path}/b/*.jsonl*")) == expected[1:3]
    assert resolve_files("d", Dataset(path=f"{tmp_path}/**/*.txt")) == expected[3:]
    monkeypatch.chdir(tmp_path)
    assert resolve_files("d", Dataset(path="b/2.jsonl")) == (str(tmp_path / "b/2.jsonl"),)
    # A link, as in a Hugging Face cache, keeps the name that tells its kind.
    blob = write(tmp_path / "blob", "x")
    (tmp_path / "link.jsonl").symlink_to(blob)
    assert resolve_files("d", Dataset(path="link.jsonl")) == (str(tmp_path / "link.jsonl"),)
    # A name with glob characters is taken as it stands when it exists.
    write(tmp_path / "x[1].txt", "x")
    assert resolve_files("d", Dataset(path="x[1].txt")) == (str(tmp_path / "x[1].txt"),)


def test_refused_paths_name_the_dataset(tmp_path: Path) -> None:
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "x.docx", "x")
    (tmp_path / "nothing").mkdir()
    cases = {
        "missing.jsonl": "no data file is found",
        "nothing": "no data file is found",
        "*.parquet": "no data file is found",
        "empty.jsonl": "empty.jsonl is empty",
        "x.docx": "x.docx is not one of .json",
        "*.docx": "x.docx is not one of .json",
    }
    for path, said in cases.items():
        with pytest.raises(DataError) as caught:
            resolve_files("mine", Dataset(path=f"{tmp_path}/{path}"), "eval")
        assert str(caught.value).startswith("data.eval.mine.path = ")
        assert said in str(caught.value)
    with pytest.raises(DataError, match=r"no-such://b/x\.jsonl': no-such:// cannot be reached from here"):
        resolve_files("mine", Dataset(path="no-such://b/x.jsonl"))
