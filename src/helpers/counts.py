"""Dense count tables, read into sparse matrices.

STimage-1K4M stores counts as comma-separated text with one cell per spot and gene, and most
cells are zero.
`read_dense` goes through such a table line by line and keeps the non-zero cells only, so the
dense matrix never exists in memory; `load` does the same once and keeps the result in a cache.
A line of plain digits and commas, which is what almost every line is, is parsed as a whole with
numpy; any other spelling of a whole number (``3.0``, ``"3"``, ``1e+05``) takes a slower path.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from scipy import sparse

from helpers.files import DataError, atomic, cache_dir, digest, fingerprint

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache; raise it when what is stored, or how a table is read, changes
LARGEST = 2**24  # whole numbers up to here are exact in float32
_AGAIN = "delete the file and fetch it again"
Row = tuple[int, np.ndarray, np.ndarray]  # number of cells, columns above zero, their counts


@dataclass(frozen=True)
class Counts:
    """Raw counts of one slide.

    Attributes
    ----------
    X : scipy.sparse.csr_matrix
        Counts, float32, shape (n_spots, n_genes), zeros not stored.
    spots : pandas.Index
        Spot ids, one per row, unique.
    genes : pandas.Index
        Gene symbols, one per column, unique.
    """

    X: sparse.csr_matrix
    spots: pd.Index
    genes: pd.Index


def load(path: Path | str, *, slide: str | None = None) -> Counts:
    """Read a dense count table through the cache.

    The cache is one uncompressed npz file per table, with the narrowest integers that hold the
    counts. Its name carries the table's path, size and time of change, so a table that changed
    is read anew. The file is written beside its final name and renamed when complete.

    Parameters
    ----------
    path
        Comma-separated table as `read_dense` takes it.
    slide
        Slide name for messages.

    Returns
    -------
    Counts

    Raises
    ------
    DataError
        As `read_dense`, or when the cache folder cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("the count table is missing", slide=slide, file=path, fix=_AGAIN)
    key = digest(path=str(path.resolve()), state=fingerprint(path), format=FORMAT)
    stored = cache_dir() / "counts" / f"{path.stem}-{key}.npz"
    if stored.is_file():
        try:
            return _from_cache(stored)
        except Exception as error:  # at damaged bytes zipfile and numpy throw a dozen kinds
            logger.warning("%s is damaged (%r); reading %s again", stored, error, path)
    counts = read_dense(path, slide=slide)
    with atomic(stored) as temporary:
        _to_cache(counts, temporary)
    return counts


def read_dense(path: Path | str, *, slide: str | None = None) -> Counts:
    """Read a dense table of counts (rows = spots, columns = genes) into a sparse matrix.

    The last line has to end with a newline: without one, its last count may have been cut short.
    A table cut off exactly at the end of a row is still a valid table. Only the list of spots in
    the coordinate file can tell (`helpers.slides` compares).

    Parameters
    ----------
    path
        Comma-separated table: a header of gene symbols after one cell for the ids, then one row
        per spot. Counts are whole numbers, also when written ``3.0``, ``"3"`` or ``1e+05``.
    slide
        Slide name for messages.

    Returns
    -------
    Counts
        Columns of the same gene symbol are added up, and one warning is logged.

    Raises
    ------
    DataError
        When the file is missing, empty, cut off, ragged or no table; when a count is missing,
        negative, fractional or above 2**24; when a spot id is missing or comes twice.
    """
    path = Path(path)

    def fail(what: str, fix: str = _AGAIN) -> DataError:
        return DataError(what, slide=slide, file=path, fix=fix)

    if not path.is_file():
        raise fail("the count table is missing")
    with path.open("rb", buffering=2**20) as stream:  # a line is long
        _sniff(stream, fail)
        header = _header(stream, fail)
        indices, data, indptr, spots = _rows(stream, header, fail)
    genes = pd.Index(header).unique()
    X = sparse.csr_matrix((data, indices, indptr), shape=(len(spots), len(header)))
    if len(genes) < len(header):
        X = add_up(X, pd.Index(header), genes, slide, path)
    return Counts(X, pd.Index(spots), genes)


def _sniff(stream: BinaryIO, fail: Callable[..., DataError]) -> None:
    """Refuse what is no table at all, by its first bytes."""
    start = stream.read(1024)
    stream.seek(0)
    if not start.strip():
        raise fail("the count table is empty")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise fail("the count table is a web page (HTML), not a table")
    if start.startswith(b"version https://git-lfs"):
        raise fail("the count table is a git-lfs pointer, not the table", "run `git lfs pull`")
    if start.startswith(b"\x1f\x8b"):
        raise fail("the count table is compressed (gzip)", "unpack it with gunzip")
    if b"\0" in start:
        raise fail("the count table holds binary data, not text")


def _header(stream: BinaryIO, fail: Callable[..., DataError]) -> list[str]:
    """Gene symbols of the first line."""
    line = stream.readline()
    try:
        cells = next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise fail(f"the header of the count table cannot be read ({error})") from error
    genes = cells[1:]
    if not genes:
        raise fail("the header of the count table names no gene", "save it comma-separated")
    if "" in genes:
        raise fail(f"column {genes.index('') + 2} of the header has no gene symbol")
    return genes


def _rows(
    stream: BinaryIO, genes: list[str], fail: Callable[..., DataError]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Column indices, values and row pointers of the non-zero counts, and the spot ids."""
    # A bytearray grows in place, so the result is never held twice.
    indices, data = bytearray(), bytearray()
    indptr, lines = [0], {}
    for number, line in enumerate(stream, start=2):
        ended, line = line.endswith(b"\n"), line.rstrip(b"\r\n")
        if not line.strip():
            continue
        spot, body = _split_id(line, number, fail)
        if spot in lines:
            twice = f"spot id {spot!r} comes twice, in lines {lines[spot]} and {number}"
            raise fail(twice, "keep one row per spot")
        lines[spot] = number
        where = f"line {number} (spot {spot!r})"
        row = _plain(body) or _plain((body + b",").replace(b".0,", b",")[:-1])  # `.0` is common
        cells, columns, values = row or _spelled(body, where, genes, fail)
        if cells != len(genes):
            short = "the file may be half a download; " if cells < len(genes) else ""
            raise fail(f"{where} has {cells} counts for {len(genes)} genes", short + _AGAIN)
        if not ended:
            what = f"{where} is the last and has no newline at its end"
            raise fail(what, f"the file may be half a download; {_AGAIN}")
        indices += columns.astype(np.int32).tobytes()
        data += values.astype(np.float32).tobytes()
        indptr.append(indptr[-1] + len(columns))
    if not lines:
        raise fail("the count table has a header but no rows")
    # scipy wants one integer type for both; 32 bits do unless one slide has 2**31 counts.
    pointers = np.array(indptr, np.int32 if indptr[-1] < 2**31 else np.int64)
    return np.frombuffer(indices, np.int32), np.frombuffer(data, np.float32), pointers, list(lines)


def _split_id(line: bytes, number: int, fail: Callable[..., DataError]) -> tuple[str, bytes]:
    """Spot id and the rest of a line; an id in quotes may hold commas and doubled quotes."""
    end = 0
    if line.startswith(b'"'):
        end = line.find(b'"', 1) + 1
        while end and line[end : end + 1] == b'"':
            end = line.find(b'"', end + 1) + 1
    rest, comma, body = line[end:].partition(b",")
    spot = line[1 : end - 1].replace(b'""', b'"') if end else rest
    if not spot.strip() or not comma or (end and rest):
        raise fail(f"line {number} has no spot id or no counts")
    try:
        return spot.decode(), body
    except UnicodeDecodeError as error:
        raise fail(f"the spot id in line {number} is not text ({error})") from error


def _plain(body: bytes) -> Row | None:
    """Parse cells that are digits only; None when any cell is not."""
    text = np.frombuffer(body + b",", np.uint8)
    comma = text == ord(",")
    digits = text - np.uint8(ord("0"))  # wraps round, so every other byte is above 9
    empty = comma[0] or (comma[1:] & comma[:-1]).any()
    if empty or not ((digits < 10) | comma).all():
        return None
    at = np.flatnonzero((digits > 0) & ~comma)  # zeros, most of a table, are never looked at
    cell = np.cumsum(comma, dtype=np.int32)[at]
    values = digits[at].astype(float)
    longer, step = np.arange(len(at)), 1
    while len(longer := longer[~comma[at[longer] + step]]):  # a digit with more digits behind it
        values[longer] *= 10
        step += 1
    first = np.flatnonzero(np.diff(cell, prepend=-1))  # of the digits of one cell
    values = np.add.reduceat(values, first) if len(first) else values
    if values.max(initial=0) > LARGEST:
        return None
    return int(comma.sum()), cell[first], values


def _spelled(body: bytes, where: str, genes: list[str], fail: Callable[..., DataError]) -> Row:
    """Parse cells in any spelling, or say which one is no count."""
    try:
        cells = next(csv.reader([body.decode("utf-8", "replace")], strict=True), [])
    except csv.Error as error:
        raise fail(f"{where} cannot be read ({error})") from error
    row = _plain((",".join(cells) + ",").replace(".0,", ",")[:-1].encode())
    if row is not None and row[0] == len(cells):  # else a cell in quotes holds a comma
        return row
    values = pd.to_numeric(pd.Series(cells, dtype=str), errors="coerce").to_numpy(float)
    with np.errstate(invalid="ignore"):
        good = (values >= 0) & (values <= LARGEST) & (values == np.floor(values))
    if len(cells) != len(genes) or good.all():
        filled = np.flatnonzero(values)
        return len(cells), filled, values[filled]
    column = int(np.flatnonzero(~good)[0])
    cell, value = cells[column], values[column]
    if not cell.strip():
        raise fail(f"{where}: the count of gene {genes[column]!r} is empty")
    if np.isnan(value):
        kind = f"is {cell!r}, not a number"
    elif value < 0:
        kind = f"is negative ({cell})"
    elif value > LARGEST:
        kind = f"is too large ({cell}); counts up to {LARGEST} are held exactly"
    else:
        kind = f"is fractional ({cell}); normalised values are no counts"
    raise fail(f"{where}: the count of gene {genes[column]!r} {kind}", "use the raw count table")


def add_up(
    X: sparse.csr_matrix, header: pd.Index, genes: pd.Index, slide: str | None, path: Path
) -> sparse.csr_matrix:
    """Add the columns of `X` that carry the same gene symbol, and log one warning.

    `header` names the columns of `X`; `genes` are its unique symbols, the columns of the result.
    """
    repeated = header[header.duplicated()].unique()
    logger.warning(
        "slide %s, file %s: %d gene symbols come more than once (%s); their counts are added",
        slide or "?",
        path,
        len(repeated),
        ", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else ""),
    )
    target = genes.get_indexer(header).astype(X.indices.dtype)
    X = sparse.csr_matrix((X.data, target[X.indices], X.indptr), shape=(X.shape[0], len(genes)))
    X.sum_duplicates()
    return X


def _to_cache(counts: Counts, path: Path) -> None:
    X = counts.X
    parts = {
        "data": X.data.astype(np.min_scalar_type(int(X.data.max(initial=0)))),
        "indices": X.indices.astype(np.min_scalar_type(X.shape[1])),
        "indptr": X.indptr,
        "spots": np.frombuffer("\n".join(counts.spots).encode(), np.uint8),
        "genes": np.frombuffer("\n".join(counts.genes).encode(), np.uint8),
    }
    with path.open("wb") as stream:
        np.savez(stream, **parts)


def _from_cache(path: Path) -> Counts:
    with np.load(path) as stored:  # the zip's checksums are verified while reading
        data, indices = stored["data"].astype(np.float32), stored["indices"].astype(np.int32)
        spots, genes = (stored[k].tobytes().decode().split("\n") for k in ("spots", "genes"))
        X = sparse.csr_matrix((data, indices, stored["indptr"]), (len(spots), len(genes)))
    return Counts(X, pd.Index(spots), pd.Index(genes))
