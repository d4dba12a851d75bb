"""A plan puts every usable utterance into one place, and is a pure function of the manifest and the configuration."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import planning
from pipeline.plan import Plan, PlanError, differences, read_rows, round_digest, shard_digest
from pipeline.planning import Sizes, batches_by_length, make_round
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Reject, Utterance

SIZES = Sizes(bytes_per_second=1200.0, audio_base="/corpus")


def utterance(number, **fields):
    values = {"id": f"book/{number:05d}", "audio": f"/corpus/{number}.flac", "text": f"text {number}", "speaker": "s"}
    return Utterance(**values | {"duration": 5.0 + number % 7, "where": f"m.jsonl:{number}"} | fields)


def rows_of(output, round_):
    return [row for shard in round_.shards for row in read_rows(str(output), round_, shard).to_pylist()]


texts = st.one_of(st.none(), st.sampled_from(["yes", "no", "", "a longer text"]))
items = st.lists(
    st.one_of(
        st.builds(
            lambda id, text, seconds: utterance(id, text=text, duration=seconds),
            st.integers(0, 60),
            texts,
            st.one_of(st.none(), st.floats(0.01, 80)),
        ),
        st.just(Reject("x", "manifest", "not-json", "no JSON", "m:1")),
        st.just(utterance(0, id="../evil")),
        st.just(utterance(0, id="", start=1.5)),
    ),
    max_size=80,
)


@settings(max_examples=40)
@given(items=items, shard_kilobytes=st.integers(10, 300))
def test_every_item_is_planned_once_or_rejected_with_its_reason(tmp_path_factory, items, shard_kilobytes):
    output = tmp_path_factory.mktemp("plan")
    config = TokenizeConfig(shard_megabytes=shard_kilobytes / 1000, batch_seconds=40)
    round_, rejects = make_round(items, config, SIZES, "plan.parquet", output=str(output))
    rows = rows_of(output, round_)
    assert len(rows) == round_.utterances == len({row["id"] for row in rows})
    assert len(rows) + sum(rejects.values()) == len(items)
    written = [json.loads(line) for line in (output / "quarantine" / "plan.jsonl").read_text().splitlines()]
    assert Counter(f"{r['stage']}/{r['reason']}" for r in written) == Counter(rejects)
    for shard in round_.shards:
        rows = read_rows(str(output), round_, shard)
        batches = Counter(rows["batch"].to_pylist())
        assert sorted(batches) == list(range(round_.batches[shard]))
        for batch, count in batches.items():
            lengths = [r["duration"] or planning.UNKNOWN_SECONDS for r in rows.to_pylist() if r["batch"] == batch]
            assert count == 1 or count * max(lengths) <= 40 + 1e-6


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 60), min_size=1, max_size=200), st.floats(1, 200))
def test_batches_hold_like_lengths_within_the_budget(seconds, budget):
    order, batch = batches_by_length(np.array(seconds), budget)
    assert sorted(order.tolist()) == list(range(len(seconds)))
    lengths = np.array(seconds)[order]
    assert (np.diff(lengths) <= 0).all() and (np.diff(batch) >= 0).all()
    for b in range(batch[-1] + 1):
        inside = lengths[batch == b]
        assert len(inside) == 1 or len(inside) * inside[0] <= budget


def test_the_same_input_gives_the_same_bytes_and_another_text_another_digest(tmp_path):
    config = TokenizeConfig(shard_megabytes=0.1)
    made = []
    for name, change in (("a", {}), ("b", {}), ("c", {"text": "changed"})):
        items = [utterance(i, **change if i == 77 else {}) for i in range(200)]
        round_, _ = make_round(items, config, SIZES, "plan.parquet", output=str(tmp_path / name))
        made.append((round_, (tmp_path / name / "plan.parquet").read_bytes()))
    assert made[0] == made[1]
    assert made[0][0].digest != made[2][0].digest
    digests = [shard_digest(read_rows(str(tmp_path / "a"), made[0][0], shard)) for shard in made[0][0].shards]
    assert round_digest(digests) == made[0][0].digest and len(digests) > 5


def test_a_dry_run_plans_the_same_and_writes_nothing(tmp_path):
    items = [utterance(i) for i in range(100)]
    dry, _ = make_round(items, TokenizeConfig(), SIZES, "plan.parquet")
    real, _ = make_round(items, TokenizeConfig(), SIZES, "plan.parquet", output=str(tmp_path))
    assert dry == real


def test_the_first_of_two_equal_ids_is_used(tmp_path):
    items = [utterance(i) for i in range(20)] + [utterance(3, text="other"), utterance(4, text="other")]
    round_, rejects = make_round(items, TokenizeConfig(), SIZES, "plan.parquet", output=str(tmp_path))
    assert rejects == {"plan/duplicate-id": 2}
    assert {row["text"] for row in rows_of(tmp_path, round_)} == {f"text {i}" for i in range(20)}


def test_utterances_that_may_be_copies_share_a_shard(tmp_path):
    items = [utterance(i) for i in range(3000)]
    for place in (100, 1500, 2900):
        items[place] = utterance(place, text="chapter one", duration=1.25)
    round_, _ = make_round(items, TokenizeConfig(shard_megabytes=1), SIZES, "plan.parquet", output=str(tmp_path))
    rows = rows_of(tmp_path, round_)
    assert len(rows) == 3000 and len(round_.batches) > 5
    assert len({row["shard"] for row in rows if row["text"] == "chapter one"}) == 1


def test_shards_are_even_and_keep_the_manifests_order(tmp_path):
    items = [utterance(i) for i in range(5000)]
    round_, _ = make_round(items, TokenizeConfig(shard_megabytes=2), SIZES, "plan.parquet", output=str(tmp_path))
    shards = {row["id"]: row["shard"] for row in rows_of(tmp_path, round_)}
    in_order = [shards[item.id] for item in items]
    assert in_order == sorted(in_order)
    sizes = list(Counter(in_order).values())
    assert len(sizes) == -(-round_.bytes // 2_000_000) and max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("fields, reason", [({"text": None}, "no-text"), ({"duration": 0.01}, "too-short")])
def test_what_needs_no_audio_to_be_refused_is_refused_at_once(fields, reason):
    _, rejects = make_round([utterance(1, **fields), utterance(2)], TokenizeConfig(), SIZES, "plan.parquet")
    assert rejects == {f"plan/{reason}": 1}


def test_channels_of_one_file_are_utterances_of_their_own(tmp_path):
    items = [utterance(1, id="", channel=channel, text=f"speaker {channel}") for channel in (0, 1, None)]
    items += [item._replace(duration=None) for item in items]
    round_, rejects = make_round(items, TokenizeConfig(), SIZES, "plan.parquet", output=str(tmp_path))
    assert rejects == {}
    assert {row["id"] for row in rows_of(tmp_path, round_)} == {
        *("1", "1-c0", "1-c1", "1-00000000", "1-00000000-c0", "1-00000000-c1")
    }


def test_other_languages_get_no_english_phonemes(tmp_path):
    spoken = ["en", "en-GB", "eng", "English", "", None]
    items = [utterance(n, language=language) for n, language in enumerate([*spoken, "de", "French"])]
    round_, rejects = make_round(items, TokenizeConfig(), SIZES, "plan.parquet", output=str(tmp_path))
    assert rejects == {"phonemise/not-english": 2} and round_.utterances == len(spoken)
    bare = [item._replace(text=None) for item in items]
    for config, expected in (
        (TokenizeConfig(keep_untranscribed=True), {}),
        (TokenizeConfig(transcribe="whisper-tiny.en"), {"phonemise/not-english": 2}),
    ):
        assert make_round(bare, config, SIZES, "plan.parquet")[1] == expected


def test_a_plan_survives_its_file_and_notices_a_change(tmp_path):
    round_, rejects = make_round([utterance(1)], TokenizeConfig(), SIZES, "plan.parquet")
    plan = Plan({"a": 1}, {"name": "c"}, "demo", {"sha256": "0"}, "/corpus", rejects).with_round(round_)
    plan.save(str(tmp_path))
    assert Plan.load(str(tmp_path)) == plan
    assert Plan.load(str(tmp_path / "nothing")) is None
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"a": 1', '"a": 2'))
    with pytest.raises(PlanError, match="changed by hand"):
        Plan.load(str(tmp_path))
    (tmp_path / "plan.json").write_text(text[:50])
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(str(tmp_path))


def test_differences_name_the_field_and_both_values():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 → 3", "c: None → 4"]
