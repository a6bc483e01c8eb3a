import logging
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import counts
from helpers.files import DataError

SLIDE = "Demo_Slide_1"
GOOD = ",A,B,C\ns_1x1,0,3,12\ns_1x2,5,0,0\ns_2x1,0,0,0\n"
DENSE = np.array([[0, 3, 12], [5, 0, 0], [0, 0, 0]], np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "Demo_Slide_1_count.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# What is read


def test_a_plain_table(table):
    read = counts.read_dense(table(GOOD))
    assert read.X.format == "csr"
    assert read.X.dtype == np.float32
    np.testing.assert_array_equal(read.X.toarray(), DENSE)
    assert read.spots.tolist() == ["s_1x1", "s_1x2", "s_2x1"]
    assert read.genes.tolist() == ["A", "B", "C"]


def test_zeros_are_not_stored(table):
    assert counts.read_dense(table(GOOD)).X.nnz == 3


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("\n", "\r\n"),
        GOOD + "\n\n",
        "\ufeff" + GOOD,
        GOOD.replace(",3,", ",3.0,").replace("12", "12.0"),
        GOOD.replace(",3,", ",3.,").replace("12", "+12.00"),
        GOOD.replace(",3,", ',"3",').replace("12", '"12.0"'),
        GOOD.replace(",3,", ", 3,"),
        GOOD.replace("12", "1.2e+01"),
        GOOD.replace("12", "0000000000012"),
        GOOD.replace("s_1x1", '"s_1x1"').replace("A,B", '"A","B"'),
        "spot" + GOOD,
    ],
    ids=[
        "crlf",
        "blank-lines",
        "bom",
        ".0",
        ".00",
        "quoted",
        "space",
        "exponent",
        "zeros",
        "ids",
        "corner",
    ],
)
def test_other_spellings_of_the_same_table(table, text):
    read = counts.read_dense(table(text))
    np.testing.assert_array_equal(read.X.toarray(), DENSE)
    assert read.spots[0] == "s_1x1"
    assert read.genes.tolist() == ["A", "B", "C"]


def test_an_id_in_quotes_may_hold_commas_and_quotes(table):
    read = counts.read_dense(table(GOOD.replace("s_1x1", '"s,""1"""')))
    assert read.spots[0] == 's,"1"'
    np.testing.assert_array_equal(read.X.toarray(), DENSE)


def test_numbers_of_every_length(table):
    values = [10**k for k in range(8)] + [counts.LARGEST, 99999, 101]
    row = ",".join(map(str, values))
    read = counts.read_dense(table(",".join(["", *map(str, range(11))]) + f"\ns,{row}\n"))
    np.testing.assert_array_equal(read.X.toarray(), [values])


symbols = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
spellings = st.sampled_from(["{}", "{}", "{}", "{}.0", '"{}"', " {}", '"{}.0"'])


@st.composite
def tables(draw):
    genes = draw(st.lists(symbols, min_size=1, max_size=6, unique=True))
    spots = draw(st.lists(symbols, min_size=1, max_size=6, unique=True))
    number = st.one_of(st.just(0), st.integers(0, 12), st.integers(0, counts.LARGEST))
    values = [[draw(number) for _ in genes] for _ in spots]

    def name(text):
        special = any(mark in text for mark in ',"')
        return '"' + text.replace('"', '""') + '"' if special or draw(st.booleans()) else text

    rows = [",".join(["", *map(name, genes)])]
    for spot, row in zip(spots, values, strict=True):
        rows.append(",".join([name(spot), *(draw(spellings).format(value) for value in row)]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join(rows) + end, spots, genes, values


@given(tables())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_valid_table_reads_as_pandas_reads_it(table, drawn):
    text, spots, genes, values = drawn
    path = table(text)
    read = counts.read_dense(path)
    assert read.spots.tolist() == spots
    assert read.genes.tolist() == genes
    np.testing.assert_array_equal(read.X.toarray(), values)
    frame = pd.read_csv(path, dtype={0: str}, skipinitialspace=True)
    np.testing.assert_array_equal(read.X.toarray(), frame.iloc[:, 1:].to_numpy(np.float32))


@pytest.mark.real
def test_a_real_slide_reads_as_pandas_reads_it(real_root):
    path = next((real_root / "ST" / "gene_exp").glob("*_Rep8_count.csv"))
    frame, read = pd.read_csv(path, index_col=0), counts.read_dense(path)
    np.testing.assert_array_equal(read.X.toarray(), frame.to_numpy())
    assert read.genes.equals(frame.columns)
    assert read.spots.equals(frame.index.astype(str).rename(None))


def test_counts_of_one_gene_symbol_are_added_with_one_warning(table, caplog):
    path = table(",A,B,A\ns_1,1,2,4\ns_2,0,3,0\n")
    with caplog.at_level(logging.WARNING):
        read = counts.read_dense(path, slide=SLIDE)
    assert read.genes.tolist() == ["A", "B"]
    np.testing.assert_array_equal(read.X.toarray(), [[5, 2], [0, 3]])
    assert read.X.has_canonical_format
    (record,) = caplog.records
    for part in (SLIDE, path.name, "1 gene symbols", "(A)"):
        assert part in record.getMessage()


# What is refused


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("", ["empty"], id="empty"),
        pytest.param(" \n\n", ["empty"], id="blank"),
        pytest.param(",A,B,C\n", ["no rows"], id="no-rows"),
        pytest.param("\n <!DOCTYPE html><html>404</html>", ["HTML"], id="html"),
        pytest.param(
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["git-lfs"], id="lfs"
        ),
        pytest.param(b"\x1f\x8b\x08\x00rest", ["header", "cannot be read"], id="gzip"),
        pytest.param(b"\x89HDF\r\n\x1a\n\x00\x00", ["header", "cannot be read"], id="binary"),
        pytest.param(b",A,\xff\xfe\ns,1,2\n", ["header"], id="not-text"),
        pytest.param(b",A\n\xff\xfe,1\n", ["line 2", "id"], id="id-not-text"),
        pytest.param("\tA\tB\ns\t1\t2\n", ["no genes"], id="tabs"),
        pytest.param(",A,,C\ns,1,2,3\n", ["column 3", "no gene symbol"], id="nameless-gene"),
        pytest.param(GOOD.replace("12", "2.5"), ["line 2", "s_1x1", "'C'", "2.5"], id="fraction"),
        pytest.param(
            GOOD.replace("12", "-1"),
            ["line 2", "s_1x1", "'C'", "'-1'", "whole number"],
            id="negative",
        ),
        pytest.param(GOOD.replace("5", "NaN"), ["line 3", "'A'", "'NaN'"], id="nan"),
        pytest.param(GOOD.replace("5", "inf"), ["line 3", "'A'", "inf"], id="infinite"),
        pytest.param(GOOD.replace("5", ""), ["line 3", "'A'", "is ''"], id="empty-cell"),
        pytest.param(GOOD.replace("5", "high"), ["line 3", "'high'"], id="word"),
        pytest.param(
            GOOD.replace("5", "16777217"), ["line 3", "16777217", "to 16777216"], id="too-large"
        ),
        pytest.param(GOOD[:-3], ["line 4", "s_2x1", "2 counts for 3 genes"], id="cut-in-a-row"),
        pytest.param(GOOD[:-8], ["line 4", "no spot id or no counts"], id="cut-in-an-id"),
        pytest.param(GOOD[:-2], ["line 4", "'C'", "fetch"], id="cut-before-a-cell"),
        pytest.param(GOOD + '"s_9', ["line 5", "spot id"], id="cut-in-a-quoted-id"),
        pytest.param(GOOD[:-1], ["line 4", "no newline", "incomplete"], id="no-newline"),
        pytest.param(GOOD.replace("3", "3\r4"), ["line 2", "cannot be read"], id="lone-cr"),
        pytest.param(
            GOOD.replace("3", f'"{"1" * 200_000}"'), ["line 2", "field limit"], id="endless-cell"
        ),
        pytest.param(GOOD.replace("12", '1"2'), ["line 2", "'C'", "whole number"], id="quote"),
        pytest.param(GOOD.replace("12", '"1"2'), ["line 2", "cannot be read"], id="half-quoted"),
        pytest.param(GOOD.replace("12", '"1,234"'), ["'C'", "'1,234'"], id="thousands"),
        pytest.param(GOOD.replace("3,12", '"3,12"'), ["2 counts for 3"], id="two-in-quotes"),
        pytest.param(GOOD.replace("s_1x1", '"s"_1x1'), ["line 2", "spot id"], id="quoted-id"),
        pytest.param(GOOD.replace("12", "12,1"), ["4 counts for 3 genes"], id="too-many-cells"),
        pytest.param(GOOD.replace(",A,", "A,"), ["3 counts for 2 genes"], id="shifted-header"),
        pytest.param(GOOD.replace("1x2", "1x1"), ["'s_1x1'", "2 and 3"], id="duplicate-spot"),
        pytest.param(GOOD.replace("s_1x2", ""), ["line 3", "no spot id"], id="nameless-spot"),
    ],
)
def test_bad_tables_are_refused_by_name(table, text, parts):
    path = table(text)
    with pytest.raises(DataError) as refused:
        counts.read_dense(path, slide=SLIDE)
    message = str(refused.value)
    for part in [SLIDE, path.name, *parts]:
        assert part in message


@pytest.mark.parametrize("read", [counts.load, counts.read_dense])
def test_a_missing_table(tmp_path, read):
    with pytest.raises(DataError, match=f"{SLIDE}.*nowhere.csv.*missing"):
        read(tmp_path / "nowhere.csv", slide=SLIDE)


# The cache


def same(one, two):
    assert (one.X != two.X).nnz == 0
    assert one.X.dtype == two.X.dtype
    assert one.spots.equals(two.spots)
    assert one.genes.equals(two.genes)
    return True


def refuse(*args, **kwargs):
    raise AssertionError("the table was read again")


def test_the_second_load_does_not_read_the_table(table, monkeypatch):
    path = table(GOOD.replace("5", "16777216"))
    first = counts.load(path)
    monkeypatch.setattr(counts, "read_dense", refuse)
    assert same(first, counts.load(path))


def test_a_cached_matrix_can_be_changed_without_changing_the_cache(table):
    path = table(GOOD)
    counts.load(path)
    counts.load(path).X.data[:] = 77
    np.testing.assert_array_equal(counts.load(path).X.toarray(), DENSE)


def test_a_changed_table_is_read_anew(table):
    path = table(GOOD)
    counts.load(path)
    before = path.stat()
    path.write_text(GOOD.replace("5", "6"))  # same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert counts.load(path).X[1, 0] == 6


def test_tables_of_one_name_in_two_folders_do_not_meet(tmp_path):
    for folder, value in (("one", "1"), ("two", "2")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "t_count.csv"
        path.write_text(f",A\ns,{value}\n")
        os.utime(path, (1, 1))
    assert counts.load(tmp_path / "one" / "t_count.csv").X[0, 0] == 1
    assert counts.load(tmp_path / "two" / "t_count.csv").X[0, 0] == 2


def test_an_interrupted_write_leaves_nothing_behind(table, cache, monkeypatch):
    path = table(GOOD)

    def half(counts_, temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(counts, "_to_cache", half)
        with pytest.raises(KeyboardInterrupt):
            counts.load(path)
    assert [item for item in (cache / "counts").rglob("*") if item.is_file()] == []
    np.testing.assert_array_equal(counts.load(path).X.toarray(), DENSE)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "method", "encrypted"])
def test_a_damaged_cache_is_never_read(table, cache, damage, caplog):
    path = table(GOOD)
    counts.load(path)
    (stored,) = (cache / "counts").glob("*.npz")
    good = stored.read_bytes()
    place = good.index(np.array([3, 12, 5], np.uint8).tobytes())  # the values themselves
    flipped = good[:place] + b"\x09" + good[place + 1 :]
    entry = good.index(b"PK\1\2")  # of the zip's table of contents
    damaged = {
        "cut": good[:-50],
        "flipped": flipped,
        "empty": b"",
        "method": good[: entry + 10] + b"\x63" + good[entry + 11 :],  # NotImplementedError
        "encrypted": good[: entry + 8] + b"\1" + good[entry + 9 :],  # RuntimeError
    }
    stored.write_bytes(damaged[damage])
    np.testing.assert_array_equal(counts.load(path).X.toarray(), DENSE)
    assert "damaged" in caplog.text
    assert stored.read_bytes() == good


def test_a_refused_table_is_not_cached(table, cache):
    with pytest.raises(DataError):
        counts.load(table(GOOD.replace("5", "-5")))
    assert list(cache.rglob("*.npz")) == []
