import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation_sets import Item, meta_lines, read
from pipeline.measures import EvaluationError

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="|", exclude_categories=("C", "Z")), min_size=1)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.booleans())
def test_meta_lst_holds_what_it_was_given(tmp_path_factory, rows, with_reference):
    file = tmp_path_factory.mktemp("set") / "meta.lst"
    items = [
        Item(f"item-{n}", text, "", f"/p/{n}.wav", prompt, f"/r/{n}.wav" if with_reference else "")
        for n, (text, prompt, _) in enumerate(rows)
    ]
    file.write_bytes("".join(meta_lines(items)).encode())
    assert read(str(file)) == (items, [])


def test_what_meta_lst_cannot_hold_is_refused():
    with pytest.raises(EvaluationError, match="no escape"):
        list(meta_lines([Item("a", "one | two")]))


def test_json_lines_with_audio_beside_them_and_bad_lines_by_their_number(tmp_path):
    lines = [
        json.dumps({"id": "a/1", "text": "Hello.", "prompt": "audio/p.wav", "voice": "ann"}),
        "no json",
        json.dumps({"id": "a/1", "text": "Again."}),
        json.dumps({"id": "../b", "text": "Out."}),
        json.dumps({"id": "c", "text": "  "}),
        json.dumps({"id": "d", "text": 7}),
        "",
        json.dumps({"id": "e", "text": "Last.", "reference": "/else/e.wav"}),
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(lines))
    items, rejects = read(str(file))
    assert items == [
        Item("a/1", "Hello.", "ann", str(tmp_path / "audio/p.wav")),
        Item("e", "Last.", reference="/else/e.wav"),
    ]
    assert [(r.where, r.reason) for r in rejects] == [
        ("set.jsonl:2", "not-json"),
        ("set.jsonl:3", "duplicate-id"),
        ("set.jsonl:4", "bad-id"),
        ("set.jsonl:5", "no-text"),
        ("set.jsonl:6", "bad-field"),
    ]


@pytest.mark.parametrize("content", [None, "", "a|b|c\n"])
def test_a_set_with_nothing_to_say_is_refused(tmp_path, content):
    file = tmp_path / "meta.lst"
    if content is not None:
        file.write_text(content)
    with pytest.raises(EvaluationError, match=r"meta\.lst"):
        read(str(file))
