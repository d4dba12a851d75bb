"""Rows of JSON Lines, CSV, TSV and Parquet, one at a time.

CSV is RFC 4180 with a header line. TSV has a header line and no quoting at all: a quotation mark in a sentence is a
quotation mark. In both, an empty field is an absent one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from pipeline.manifests import fields
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.lines import LONGEST_LINE, lines, open_binary
from pipeline.utterances import Reject, Unusable, Utterance

_NUMBERS = ("start", "duration", "channel")
_SAMPLE = 100


def read_jsonl(url: str, folder: str) -> Iterator[Utterance | Reject]:
    """One utterance or reject for each line that is not blank."""
    name = fields.name_of(url)
    for number, line in enumerate(lines(url), 1):
        if not line or line.isspace():
            continue
        where = f"{name}:{number}"
        try:
            row = json_object(line)
        except Unusable as error:
            yield fields.reject(error, where)
            continue
        yield fields.utterance(row, folder, where)


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        Unusable: `not-json`, `not-utf8` (also lone surrogates, which no UTF-8 can hold) or `bad-field` (NaN, infinity).
    """
    import orjson

    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _why_not_json(line, error) from None
    if not isinstance(row, dict):
        raise Unusable("not-json", f"expected an object {{...}}, found {fields.shown(row)}")
    return row


def sample(url: str) -> list[dict[str, Any]]:
    """The objects among the first lines of a JSON Lines file, to see what kind of manifest it is.

    Raises:
        ManifestError: it is empty, or none of those lines holds an object.
    """
    rows, problem, number = [], None, 0
    for line in lines(url):
        if not line or line.isspace():
            continue
        number += 1
        try:
            rows.append(json_object(line))
        except Unusable as error:
            problem = problem or error
        if number == _SAMPLE:
            break
    if not number:
        raise ManifestError(f"{url}: is empty: there is nothing to read")
    if not rows:
        raise ManifestError(f"{url}: is not JSON Lines (an object {{...}} a line): its first line is {problem}")
    return rows


def read_delimited(url: str, folder: str, delimiter: str) -> Iterator[Utterance | Reject]:
    """One utterance or reject for each row of a CSV (`,`) or TSV (tab) file."""
    name = fields.name_of(url)
    rows = _records(url, delimiter)
    _, columns = next(rows, (0, []))
    for number, row in rows:
        where = f"{name}:{number}"
        try:
            if isinstance(row, Unusable):
                raise row
            if len(row) != len(columns):
                raise Unusable("bad-row", f"the row has {len(row)} fields, the header {len(columns)}")
            values = {column: _typed(column, field) for column, field in zip(columns, row, strict=True) if field}
        except Unusable as error:
            yield fields.reject(error, where)
            continue
        yield fields.utterance(values, folder, where)


def header(url: str, delimiter: str) -> list[str]:
    """The column names of a CSV or TSV file."""
    _, row = next(_records(url, delimiter), (0, []))
    if isinstance(row, Unusable):
        raise ManifestError(f"{url}: its header cannot be read: {row}")
    if not row:
        raise ManifestError(f"{url}: is empty: there is nothing to read")
    twice = sorted({name for name in row if row.count(name) > 1})
    if twice:
        raise ManifestError(f"{url}: its header names the column {twice[0]!r} twice")
    return row


def _records(url: str, delimiter: str) -> Iterator[tuple[int, list[str] | Unusable]]:
    """Line number and fields of each record, or what is wrong with it; blank lines are left out."""
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are no UTF-8 pass through csv as surrogates, so that one bad row does not hide the others.
    decoded = (line.rstrip(b"\r").decode("utf-8", "surrogateescape") + "\n" for line in lines(url))
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(decoded, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row: list[str] | Unusable = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = Unusable("bad-row", f"not a row of CSV: {error} (up to line {reader.line_num})")
        else:
            if not any(field.strip() for field in row):
                continue
            try:
                "".join(row).encode("utf-8")
            except UnicodeEncodeError:
                row = Unusable("not-utf8", f"the row is not UTF-8: {fields.shown(row)}")
        yield number, row


def _typed(column: str, field: str) -> str | float:
    """Numbers where they are expected; what is no number stays text, for the check of the field to refuse."""
    if column not in _NUMBERS:
        return field
    try:
        return float(field)
    except ValueError:
        return field


def read_parquet(urls: tuple[str, ...], folder: str) -> Iterator[Utterance | Reject]:
    """One utterance or reject for each row of Parquet files, row group by row group."""
    import pyarrow as pa

    for url in urls:
        name, number = fields.name_of(url), 0
        with open_binary(url) as file:
            try:
                for batch in _parquet(file, url).iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        given = {column: value for column, value in row.items() if value is not None}
                        yield fields.utterance(given, folder, f"{name}:{number}")
            except (pa.ArrowException, OSError) as error:
                raise ManifestError(f"{url}: cannot be read after row {number}: {error}") from None


def parquet_columns(url: str) -> list[str]:
    with open_binary(url) as file:
        return _parquet(file, url).schema_arrow.names


def _parquet(file: Any, url: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{url}: is not a Parquet file: {error}") from None


def require_audio(url: str, columns: list[str]) -> None:
    """Refuses a table that cannot name a single recording."""
    if "audio" not in columns:
        found = ", ".join(sorted(map(fields.shown, columns))[:20]) or "none"
        known = ", ".join(fields.COLUMNS)
        raise ManifestError(f"{url}: has no column 'audio'; it has {found}; columns with a meaning are {known}")


def _why_not_json(line: bytes, error: Exception) -> Unusable:
    """What a line that is not JSON is instead; Python's own parser takes some of what the standard forbids."""
    import json

    if len(line) > LONGEST_LINE:
        return Unusable("not-json", f"the line is longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return Unusable("not-utf8", f"{problem.reason} at byte {problem.start} of the line")
    try:
        lenient = json.loads(text)
        json.dumps(lenient, ensure_ascii=False).encode("utf-8")
        json.dumps(lenient, allow_nan=False)
    except UnicodeEncodeError:
        return Unusable("not-utf8", "the line holds half of a surrogate pair (\\ud800 … \\udfff): no character")
    except (ValueError, RecursionError) as problem:
        if "Out of range float" in str(problem):
            return Unusable("bad-field", "NaN and infinite numbers are not JSON: write null")
    return Unusable("not-json", f"{error}: {fields.shown(text)}")
