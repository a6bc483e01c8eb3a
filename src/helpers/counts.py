"""Read dense count tables into sparse matrices.

STimage-1K4M stores counts as comma-separated text with one cell per spot and gene, and most
cells are zero.
`read_dense` parses such a table line by line and keeps the non-zero counts only, so the dense
matrix is never in memory. `load` does this once and caches the result.
Almost every line consists of digits and commas, and is parsed by numpy as a whole; other spellings
of whole numbers (``3.0``, ``"3"``, ``1e+05``) are parsed more slowly.
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

from helpers.files import DataError, atomic, cache_dir, digest, fingerprint, mistaken_for

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache; increase it when the stored arrays or the parsing change
LARGEST = 2**24  # whole numbers up to here are exact in float32
_AGAIN = "delete the file, which may be incomplete, and fetch it again"
Row = tuple[int, np.ndarray, np.ndarray]  # number of cells, columns of non-zero counts, counts


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

    The cache has one uncompressed npz file per table, with the smallest integer type that holds the
    counts. Its name depends on the table's path and content, so a changed table is read again.

    Parameters
    ----------
    path
        Comma-separated table as `read_dense` takes it.
    slide
        Slide name for messages.

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
        except Exception as error:  # damaged bytes raise many kinds of errors
            logger.warning("%s is damaged (%r); reading %s again", stored, error, path)
    counts = read_dense(path, slide=slide)
    with atomic(stored) as temporary:
        _to_cache(counts, temporary)
    return counts


def read_dense(path: Path | str, *, slide: str | None = None) -> Counts:
    """Read a dense table of counts (rows = spots, columns = genes) into a sparse matrix.

    The idea, without the checks and at a fraction of the speed::

        rows, spots = [], []
        with open(path) as file:
            genes = next(file).rstrip().split(",")[1:]
            for line in file:
                spot, *cells = line.rstrip().split(",")
                spots.append(spot)
                rows.append(sparse.csr_matrix([[float(cell) for cell in cells]]))
        counts = Counts(sparse.vstack(rows), pd.Index(spots), pd.Index(genes))

    The last line must end with a newline, because without one its last count may be incomplete.
    A table that was cut off at the end of a line looks complete; `helpers.slides` notices, because
    it compares the spots with the coordinates.

    Parameters
    ----------
    path
        Comma-separated table: a header line with one cell for the ids and one per gene symbol, then
        one line per spot. Counts are whole numbers, also if written ``3.0``, ``"3"`` or ``1e+05``.
    slide
        Slide name for messages.

    Returns
    -------
    Counts
        Columns with the same gene symbol are added, and one warning is logged.

    Raises
    ------
    DataError
        When the file is missing, empty, cut off or not such a table; when a count is not a whole
        number from 0 to 2**24; when a spot id is missing or a duplicate.
    """
    path = Path(path)

    def fail(what: str, fix: str = _AGAIN) -> DataError:
        return DataError(what, slide=slide, file=path, fix=fix)

    if not path.is_file():
        raise fail("the count table is missing")
    with path.open("rb", buffering=2**20) as stream:  # a line is long
        if wrong := mistaken_for(stream.peek(1024)):
            raise fail(f"the count table {wrong}")
        header = _header(stream, fail)
        indices, data, indptr, spots = _rows(stream, header, fail)
    genes = pd.Index(header).unique()
    X = sparse.csr_matrix((data, indices, indptr), shape=(len(spots), len(header)))
    if len(genes) < len(header):
        X = add_up(X, pd.Index(header), genes, slide, path)
    return Counts(X, pd.Index(spots), genes)


def _header(stream: BinaryIO, fail: Callable[..., DataError]) -> list[str]:
    """Read the gene symbols in the first line."""
    line = stream.readline()
    try:
        cells = next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise fail(f"the header of the count table cannot be read ({error})") from error
    genes = cells[1:]
    if not genes:
        raise fail("the header of the count table has no genes", "separate its cells by commas")
    if "" in genes:
        raise fail(f"column {genes.index('') + 2} of the header has no gene symbol")
    return genes


def _rows(
    stream: BinaryIO, genes: list[str], fail: Callable[..., DataError]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Read column indices, values and row pointers of the non-zero counts, and the spot ids."""
    # A bytearray grows in place, so the result is in memory only once.
    indices, data = bytearray(), bytearray()
    indptr, lines = [0], {}
    for number, line in enumerate(stream, start=2):
        ended, line = line.endswith(b"\n"), line.rstrip(b"\r\n")
        if not line.strip():
            continue
        spot, body = _split_id(line, number, fail)
        if spot in lines:
            twice = f"duplicate spot id {spot!r} in lines {lines[spot]} and {number}"
            raise fail(twice, "keep one line per spot")
        lines[spot] = number
        where = f"line {number} (spot {spot!r})"
        row = _plain(body) or _plain((body + b",").replace(b".0,", b",")[:-1])  # `.0` is common
        cells, columns, values = row or _spelled(body, where, genes, fail)
        if cells != len(genes):
            raise fail(f"{where} has {cells} counts for {len(genes)} genes")
        if not ended:
            raise fail(f"{where} is the last and has no newline at its end")
        indices += columns.astype(np.int32).tobytes()
        data += values.astype(np.float32).tobytes()
        indptr.append(indptr[-1] + len(columns))
    if not lines:
        raise fail("the count table has a header but no rows")
    # scipy needs the same integer type for both; 32 bits suffice below 2**31 non-zero counts.
    pointers = np.array(indptr, np.int32 if indptr[-1] < 2**31 else np.int64)
    return np.frombuffer(indices, np.int32), np.frombuffer(data, np.float32), pointers, list(lines)


def _split_id(line: bytes, number: int, fail: Callable[..., DataError]) -> tuple[str, bytes]:
    """Split a line into the spot id and the rest."""
    try:
        if line.startswith(b'"'):  # an id in quotes may contain commas
            spot, *cells = next(csv.reader([line.decode()], strict=True))
            body = ",".join(cells).encode()
        else:
            start, _, body = line.partition(b",")
            spot = start.decode()
    except (UnicodeDecodeError, csv.Error) as error:
        raise fail(f"line {number} has an unreadable spot id ({error})") from error
    if not spot.strip() or not body:
        raise fail(f"line {number} has no spot id or no counts")
    return spot, body


def _plain(body: bytes) -> Row | None:
    """Parse cells that consist of digits; return None if any cell does not."""
    text = np.frombuffer(body + b",", np.uint8)
    comma = text == ord(",")
    digits = text - np.uint8(ord("0"))  # unsigned, so all other bytes are above 9
    empty = comma[0] or (comma[1:] & comma[:-1]).any()
    if empty or not ((digits < 10) | comma).all():
        return None
    at = np.flatnonzero((digits > 0) & ~comma)  # skips the zeros, most of the table
    cell = np.cumsum(comma, dtype=np.int32)[at]
    values = digits[at].astype(float)
    longer, step = np.arange(len(at)), 1
    while len(longer := longer[~comma[at[longer] + step]]):  # digits followed by another
        values[longer] *= 10
        step += 1
    first = np.flatnonzero(np.diff(cell, prepend=-1))  # the first digit of each cell
    values = np.add.reduceat(values, first) if len(first) else values
    if values.max(initial=0) > LARGEST:
        return None
    return int(comma.sum()), cell[first], values


def _spelled(body: bytes, where: str, genes: list[str], fail: Callable[..., DataError]) -> Row:
    """Parse cells in any spelling."""
    try:
        cells = next(csv.reader([body.decode("utf-8", "replace")], strict=True), [])
    except csv.Error as error:
        raise fail(f"{where} cannot be read ({error})") from error
    values = pd.to_numeric(pd.Series(cells, dtype=str), errors="coerce").to_numpy(float)
    good = (values >= 0) & (values <= LARGEST) & (values == np.floor(values))
    if len(cells) == len(genes) and not good.all():
        column = int(np.argmin(good))
        what = f"the count of gene {genes[column]!r} is {cells[column]!r}"
        fix = "use the table of raw counts; if this is that table, " + _AGAIN
        raise fail(f"{where}: {what}, not a whole number from 0 to {LARGEST}", fix)
    columns = np.flatnonzero(values)
    return len(cells), columns, values[columns]


def add_up(
    X: sparse.csr_matrix, header: pd.Index, genes: pd.Index, slide: str | None, path: Path
) -> sparse.csr_matrix:
    """Add the columns of `X` that have the same gene symbol, and log one warning.

    `header` has the symbols of the columns of `X`, `genes` the unique ones: those of the result.
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
