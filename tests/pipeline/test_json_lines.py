"""A row a line, whatever its texts are made of."""

from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from pipeline import json_lines

ROWS = st.lists(st.dictionaries(st.text(st.characters()), st.text(st.characters())), max_size=4)


@given(ROWS)
def test_any_text_comes_back(rows):
    json_lines.write("memory://lines.jsonl", rows)
    assert json_lines.read("memory://lines.jsonl") == rows
    assert storage.read_bytes("memory://lines.jsonl").count(b"\n") == len(rows)


def test_lines_of_other_writers_end_at_line_feeds_alone():
    storage.write_text("memory://others.jsonl", '{"text": "Good\u2028morn\x85ing\u2029."}\n\n{"text": "Rain."}')
    assert [row["text"] for row in json_lines.read("memory://others.jsonl")] == [
        "Good\u2028morn\x85ing\u2029.",
        "Rain.",
    ]


def test_halves_of_surrogate_pairs_are_kept():
    json_lines.write("memory://half.jsonl", [{"id": "\ud800"}])
    assert json_lines.read("memory://half.jsonl") == [{"id": "\ud800"}]
