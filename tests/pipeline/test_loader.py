"""Index and loader over real shards: what is read is what was written, from anywhere, and damage is named."""

import json
import logging
import multiprocessing
import re
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from pipeline import phonemes, shards
from pipeline.loader import Loader, collate
from pipeline.sample_reader import SampleReader
from pipeline.schedule import Schedule
from pipeline.shard_cache import ShardCache
from pipeline.token_index import DataError, TokenIndex
from tests.pipeline.token_data import CODEC, read_all, samples_of, write_dataset

COUNTS = (14, 9, 0, 21, 12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """(folder, its samples in order) of a sound dataset, which no test changes."""
    folder = str(tmp_path_factory.mktemp("tokens"))
    return folder, write_dataset(folder, COUNTS)


@pytest.fixture
def own(tmp_path):
    """A dataset that a test may damage."""
    return tmp_path / "tokens", write_dataset(str(tmp_path / "tokens"), COUNTS)


def schedule_of(index, **settings):
    return Schedule(index, **({"seed": 1, "budget": 700, "window": 2} | settings))


def epoch_of(schedule, **settings):
    """An epoch's steps from a loader, and the loader."""
    with Loader(schedule, stop_step=schedule.steps_per_epoch(), **settings) as loader:
        return list(loader), loader


def assert_holds(micro, samples, codebooks=4):
    """The tensors of a micro-batch are the samples of its rows, and padding."""
    phones, phone_lengths, codes, code_lengths = (tensor.numpy() for tensor in micro.batch)
    assert codes.shape[:2] == (len(micro.rows), codebooks) and codes.shape[2] == code_lengths.max()
    assert phones.shape == (len(micro.rows), phone_lengths.max())
    for place, row in enumerate(micro.rows.tolist()):
        sample = samples[row]
        assert micro.keys[place] == sample.key and micro.speakers[place] == sample.meta["speaker"]
        assert np.array_equal(codes[place, :, : code_lengths[place]], sample.codes[:codebooks])
        assert code_lengths[place] == sample.codes.shape[1]
        said = phonemes.decode(phones[place, : phone_lengths[place]].tolist())
        assert said == ["<bos>", *sample.phones.split(), "<eos>"]
        assert not phones[place, phone_lengths[place] :].any()


def test_an_epoch_holds_what_was_written(dataset):
    folder, samples = dataset
    index = TokenIndex.open(folder)
    assert (len(index), index.frames) == (len(samples), sum(s.codes.shape[1] for s in samples))
    assert [index.speakers[n] for n in index.columns["speaker"]] == [s.meta["speaker"] for s in samples]
    assert index.columns["phones"].tolist() == [len(s.phones.split()) for s in samples]
    schedule = schedule_of(index, accumulate=2)
    steps, loader = epoch_of(schedule)
    for k, step in enumerate(steps):
        assert step.step == k and len(step.micro_batches) == 2
        assert np.concatenate([m.rows for m in step.micro_batches]).tolist() == schedule.batch(k).tolist()
        for micro in step.micro_batches:
            if micro.rows.size:
                assert_holds(micro, samples)
    assert sum(m.rows.size for step in steps for m in step.micro_batches) == len(samples)
    assert loader.waited == pytest.approx(sum(step.waited for step in steps)) and not loader.bad


def test_a_loader_that_starts_later_goes_on_with_the_same_batches(dataset):
    schedule = schedule_of(TokenIndex.open(dataset[0]))
    whole, _ = epoch_of(schedule)
    with Loader(schedule_of(TokenIndex.open(dataset[0])), start_step=4, prefetch=1, threads=1) as loader:
        for before, after in zip(whole[4:], loader, strict=False):
            assert before.step == after.step
            for a, b in zip(before.micro_batches, after.micro_batches, strict=True):
                assert a.keys == b.keys and all(x.equal(y) for x, y in zip(a.batch, b.batch, strict=True))


def test_workers_share_a_step(dataset):
    folder, samples = dataset
    schedule = schedule_of(TokenIndex.open(folder), codebooks=2, budget=1000)
    workers = [epoch_of(schedule, rank=rank, world=3)[0] for rank in range(3)]
    for k, steps in enumerate(zip(*workers, strict=True)):
        micros = [step.micro_batches[0] for step in steps]
        assert np.concatenate([micro.rows for micro in micros]).tolist() == schedule.batch(k).tolist()
        for micro in micros:
            if micro.rows.size:
                assert_holds(micro, samples, codebooks=2)


def test_reading_ahead_is_bounded_and_happens_while_the_caller_works(dataset):
    schedule = schedule_of(TokenIndex.open(dataset[0]))
    asked, third = [], threading.Event()
    with Loader(schedule, prefetch=3, threads=1, stop_step=schedule.steps_per_epoch()) as loader:
        load = loader.load

        def counted(step):
            asked.append(step)
            if step == 2:
                third.set()
            return load(step)

        loader.load = counted
        steps = iter(loader)
        next(steps)
        assert third.wait(20), "two more are read though nobody asks"
        loader._pool.submit(lambda: None).result()
        assert asked == [0, 1, 2]
        assert [step.step for step in steps] == list(range(1, schedule.steps_per_epoch()))


def test_the_empty_marker_is_something_the_network_can_read():
    import torch

    from model.lina import Lina
    from model.lina_config import LinaConfig

    batch = collate([shards.Sample("", np.zeros((8, 0), np.uint16), "", {})], 4)
    assert batch.phone_lengths.tolist() == [2] and batch.code_lengths.tolist() == [0]
    model = Lina(LinaConfig(encoder_layers=1, decoder_layers=1, text_layers=1))
    output = model(batch)
    (output.loss * 0).backward()
    assert torch.isfinite(output.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_neighbours_are_read_at_once(dataset, monkeypatch):
    folder, samples = dataset
    reader, read, asked = SampleReader(TokenIndex.open(folder)), storage.read_range, []
    monkeypatch.setattr(storage, "read_range", lambda *span: asked.append(span) or read(*span))
    good, _ = reader.read(np.array([16, 2, 0, 1, 14, 17]))
    assert len(asked) == 2 and sorted(good) == [0, 1, 2, 14, 16, 17]
    assert all(np.array_equal(good[row].codes, samples[row].codes) for row in good)
    offset, size = (reader.index.columns[name] for name in ("offset", "size"))
    assert asked[0] == (reader.index.shards[0].url, 0, int(offset[2] + size[2]))


def test_storage_that_fails_is_asked_again(dataset, monkeypatch):
    read, failures = storage.read_range, [OSError("timed out"), OSError("reset")]

    def flaky(*span):
        if failures:
            raise failures.pop()
        return read(*span)

    monkeypatch.setattr(storage, "read_range", flaky)
    monkeypatch.setattr("pipeline.sample_reader._PAUSES", (0, 0))
    reader = SampleReader(TokenIndex.open(dataset[0]))
    good, bad = reader.read(np.array([0]))
    assert good and not bad
    failures += [OSError("timed out")] * 3
    with pytest.raises(OSError, match="timed out"):
        reader.read(np.array([0]))
    assert reader.read(np.array([0]))[0], "a failure of the storage is not held against the shard"


def test_storage_that_goes_on_failing_ends_the_run_with_its_own_error(dataset, monkeypatch):
    """So that the workers are started again: samples that storage kept back are neither damaged nor left out."""

    def fails(*span):
        raise OSError("timed out")

    monkeypatch.setattr(storage, "read_range", fails)
    monkeypatch.setattr("pipeline.sample_reader._PAUSES", (0,))
    with Loader(schedule_of(TokenIndex.open(dataset[0]))) as loader, pytest.raises(OSError, match="timed out"):
        next(iter(loader))
    assert not loader.bad


# Damage.


def damaged_epoch(folder, caplog, **settings):
    with caplog.at_level(logging.WARNING):
        return epoch_of(schedule_of(TokenIndex.open(str(folder))), **settings)


def test_a_truncated_shard_costs_the_samples_that_it_lost(own, caplog):
    folder, samples = own
    tar = folder / "shards/000003.tar"
    index = TokenIndex.open(str(folder))
    rows = np.arange(14 + 9, 14 + 9 + 21)
    keep = int(index.columns["offset"][rows[15]]) + 700
    tar.write_bytes(tar.read_bytes()[:keep])
    steps, loader = damaged_epoch(folder, caplog)
    assert sorted(loader.bad) == rows[15:].tolist()
    assert all("too early" in bad.reason and bad.shard == str(tar) for bad in loader.bad.values())
    assert sum("left out sample" in record.message and "000003.tar" in record.message for record in caplog.records) == 6
    kept = sorted(row for step in steps for micro in step.micro_batches for row in micro.rows.tolist())
    assert kept == sorted(set(range(len(samples))) - set(loader.bad))
    for step in steps:
        for micro in step.micro_batches:
            if micro.rows.size:
                assert_holds(micro, samples)


def test_a_missing_shard_is_named_and_a_batch_of_nothing_else_is_empty(own, caplog):
    folder, _ = own
    (folder / "shards/000001.tar").unlink()
    index = TokenIndex.open(str(folder))
    schedule = Schedule(index, budget=260, window=1)  # a shard at a time, in batches of a few samples
    with caplog.at_level(logging.WARNING):
        steps, loader = epoch_of(schedule)
    assert sorted(loader.bad) == list(range(14, 14 + 9))
    assert all("cannot be read" in bad.reason and "000001.tar" in bad.reason for bad in loader.bad.values())
    empty = [step for step in steps if not step.micro_batches[0].rows.size]
    assert empty and all(step.micro_batches[0].batch.code_lengths.tolist() == [0] for step in empty)
    assert all(set(schedule.batch(step.step)) <= set(loader.bad) for step in empty)


def test_too_many_bad_samples_end_the_run_at_the_same_step_every_time(own, caplog):
    folder, _ = own
    (folder / "shards/000001.tar").unlink()
    schedule = schedule_of(TokenIndex.open(str(folder)))
    ends = []
    for threads in (1, 4, 4):
        with Loader(schedule, threads=threads, max_bad_samples=3, stop_step=schedule.steps_per_epoch()) as loader:
            with pytest.raises(DataError, match=r"more than max_bad_samples 3; the last one is sample \d+ of .*000001"):
                list(loader)
            ends.append((loader.next_step, sorted(loader.bad)))
    assert ends[0] == ends[1] == ends[2]


def test_a_lost_shard_counts_once_and_too_many_end_the_run(tmp_path, caplog):
    """A shard of LibriLight has thousands of samples: one of 150 is more than 100 single ones already."""
    folder = tmp_path / "tokens"
    write_dataset(str(folder), (150, 12, 9, 20))
    for shard in (0, 1, 2):
        (folder / f"shards/00000{shard}.tar").unlink()
    _, loader = damaged_epoch(folder, caplog)
    assert sorted(loader.bad) == list(range(150 + 12 + 9))
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 11 + 11 + 9 and sum("it counts as a lost shard" in line for line in said) == 2
    with pytest.raises(DataError, match=r"2 shards have each lost more than 10 samples, .* max_bad_shards 1; the last"):
        damaged_epoch(folder, caplog, max_bad_shards=1)
    with pytest.raises(DataError, match="9 samples cannot be used, more than max_bad_samples 8") as found:
        damaged_epoch(folder, caplog, max_bad_samples=8, max_bad_shards=2)
    assert "shards" not in str(found.value).split(";")[0]


def rewritten(folder, change):
    """Writes shard 0 again with samples that `change` has had, under the index of before."""
    before = (folder / "shards/000000.index.parquet").read_bytes()
    shards.write_shard(str(folder), 0, change(samples_of(0, 14)), [], {"versions": {}})
    (folder / "shards/000000.index.parquet").write_bytes(before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s._replace(codes=s.codes | np.uint16(1024)), "code .* is not below 1024"),
        (lambda s: s._replace(codes=s.codes.reshape(4, -1)), r"codes are \(4, .*, not \(8, "),
        (lambda s: s._replace(phones="XX " + s.phones[3:]), "'XX' is not one of"),
        (lambda s: s._replace(key=s.key[:-1] + "x"), "has another sample"),
    ],
    ids=["a code too large", "another shape", "an unknown phone", "another key"],
)
def test_a_sample_that_contradicts_its_index_is_left_out(own, caplog, change, reason):
    folder, _ = own
    rewritten(folder, lambda samples: [*samples[:3], change(samples[3]), *samples[4:]])
    _, loader = damaged_epoch(folder, caplog)
    assert sorted(loader.bad) == [3]
    assert re.search(reason, loader.bad[3].reason)


@settings(max_examples=150)
@given(st.data())
def test_damage_anywhere_gives_the_sample_or_a_reason(dataset, data):
    folder, samples = dataset
    index = TokenIndex.open(folder)
    raw = bytearray(storage.read_range(index.shards[0].url, 0, int(index.columns["size"][0])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, len(raw) - 1), st.integers(0, 700)))
        raw[place] = data.draw(st.integers(0, 255))
    try:
        sample = SampleReader(index)._checked(0, bytes(raw))
    except ValueError as error:
        assert str(error)
    else:
        assert sample.key == samples[0].key and sample.codes.shape == samples[0].codes.shape


# What is refused.


def test_a_dataset_of_another_codec_is_refused(dataset):
    schedule = schedule_of(TokenIndex.open(dataset[0]))
    Loader(schedule, codec=CODEC).close()
    with pytest.raises(DataError, match=r"made with another codec than the model is for: digest: 'eeee.* → 'cccc"):
        Loader(schedule, codec=CODEC | {"digest": "e" * 64})
    with pytest.raises(DataError, match="codebooks must be 1 to 8, what the dataset stores, not 9"):
        Loader(schedule_of(schedule.index, codebooks=9))
    with pytest.raises(ValueError, match="workers × accumulate 1 need 40"):
        Loader(schedule, world=40)
    with pytest.raises(ValueError, match="rank must be 0 to 1"):
        Loader(schedule, rank=2, world=2)


def test_a_dataset_that_is_not_whole_is_refused(own):
    folder, _ = own
    with pytest.raises(DataError, match=r"000003.index.parquet is missing"):
        (folder / "shards/000003.index.parquet").rename(folder / "aside")
        TokenIndex.open(str(folder))
    with pytest.raises(DataError, match=r"000003.index.parquet has 14 samples, not 21"):
        (folder / "shards/000003.index.parquet").write_bytes((folder / "shards/000000.index.parquet").read_bytes())
        TokenIndex.open(str(folder))
    with pytest.raises(DataError, match=r"000003.index.parquet is damaged"):
        (folder / "shards/000003.index.parquet").write_bytes(b"PAR1 no")
        TokenIndex.open(str(folder))
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        (folder / "dataset.json").write_text("{}")
        TokenIndex.open(str(folder))
    with pytest.raises(DataError, match=r"dataset.json is missing: no finished dataset"):
        (folder / "dataset.json").unlink()
        TokenIndex.open(str(folder))


# Caches and remote storage.


def same(a: TokenIndex, b: TokenIndex) -> bool:
    return a.speakers == b.speakers and all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)


def test_the_merged_index_is_kept_and_needs_the_shards_no_more(own, tmp_path):
    folder, _ = own
    first = TokenIndex.open(str(folder), cache=str(tmp_path / "cache"))
    for file in (folder / "shards").glob("*.parquet"):
        file.unlink()
    again = TokenIndex.open(str(folder), cache=str(tmp_path / "cache"))
    assert same(first, again) and isinstance(again.columns["offset"], np.memmap)
    summary = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(summary | {"digest": "f" * 64}))
    with pytest.raises(DataError, match="is missing"):
        TokenIndex.open(str(folder), cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.part-*"))


@pytest.fixture(scope="module")
def remote(bucket):
    return f"{bucket}/tokens", write_dataset(f"{bucket}/tokens", COUNTS)


def test_a_bucket_is_read_in_stretches(remote, dataset):
    url, samples = remote
    index = TokenIndex.open(url)
    assert same(index, TokenIndex.open(dataset[0]))
    steps, loader = epoch_of(schedule_of(index))
    assert sum(len(step.micro_batches[0].keys) for step in steps) == len(samples) and not loader.bad
    for step in steps:
        assert_holds(step.micro_batches[0], samples)


def test_a_truncated_object_costs_the_samples_that_it_lost(bucket):
    url = f"{bucket}/short"
    write_dataset(url, (10, 10))
    index = TokenIndex.open(url)
    data = storage.read_bytes(shards.tar_url(url, 1))
    storage.write_bytes(shards.tar_url(url, 1), data[: int(index.columns["offset"][14]) + 100])
    good, bad = SampleReader(index).read(np.arange(20))
    assert sorted(good) == list(range(14)) and [sample.row for sample in bad] == list(range(14, 20))
    good, bad = SampleReader(index).read(np.array([18, 19]))  # nothing but what lies behind the end
    assert not good and len(bad) == 2


def test_the_cache_holds_whole_shards_within_its_limit(remote, tmp_path):
    url, samples = remote
    index = TokenIndex.open(url)
    sizes = [shard.bytes for shard in index.shards]
    cache = ShardCache(str(tmp_path / "cache"), max(sizes) + min(sizes))
    reader = SampleReader(index, cache)
    folder = Path(cache.folder)
    for row in (0, 20, 1, 30, 2, 50, 3):  # shards 0, 1, 0, 2, 0, 3, 0
        good, bad = reader.read(np.array([row]))
        assert np.array_equal(good[row].codes, samples[row].codes) and not bad
        assert sum(file.stat().st_size for file in folder.glob("*.tar")) <= cache.limit_bytes
    assert (folder / f"{index.shards[0].sha256[:40]}.tar").exists(), "what is used stays"
    assert not list(folder.glob("*.part-*"))


def test_what_killed_loaders_left_goes_with_the_next_shard_under_the_same_lock(tmp_path):
    write_dataset("memory://left/tokens", (6, 6))
    index = TokenIndex.open("memory://left/tokens")
    cache = ShardCache(str(tmp_path / "cache"), 1 << 20)
    path = Path(cache.folder, f"{index.shards[0].sha256[:40]}.tar.part-")
    neighbour = Path(cache.folder, f"{index.shards[0].sha256[:8]}{'0' * 32}.tar.part-0")
    theirs = f"{(int(index.shards[0].sha256[:8], 16) ^ 1):08x}{'0' * 32}.tar.part-0"
    for left in (f"{path}0", f"{path}1", neighbour, Path(cache.folder, theirs)):
        Path(left).write_bytes(b"half")
    SampleReader(index, cache).read(np.array([0]))
    assert [file.name for file in Path(cache.folder).glob("*.part-*")] == [theirs], "whoever writes it may be alive"


def test_what_a_killed_process_left_of_an_index_goes_with_the_next_try(tmp_path):
    write_dataset("memory://left/tokens", (6, 6))
    whole = TokenIndex.open("memory://left/tokens", cache=str(tmp_path))
    (folder,) = tmp_path.glob("index-*[0-9a-f]")
    folder.rename(f"{folder}.part-0")
    assert len(TokenIndex.open("memory://left/tokens", cache=str(tmp_path))) == len(whole)
    assert {file.name for file in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_what_is_cached_is_not_asked_for_again(tmp_path):
    url = "memory://cached/tokens"
    samples = write_dataset(url, (6, 6))
    index = TokenIndex.open(url)
    schedule = schedule_of(index)
    cached = {"cache": str(tmp_path / "cache"), "cache_bytes": 1 << 20}
    first, _ = epoch_of(schedule, **cached)
    fsspec.filesystem("memory").rm("/cached", recursive=True)
    second, loader = epoch_of(schedule, **cached)
    assert [s.micro_batches[0].keys for s in first] == [s.micro_batches[0].keys for s in second] and not loader.bad
    assert sum(len(s.micro_batches[0].keys) for s in second) == len(samples)


def test_a_shard_of_another_size_is_not_cached(tmp_path):
    url = "memory://resized/tokens"
    write_dataset(url, (6, 6))
    storage.write_bytes(shards.tar_url(url, 0), b"short")
    index = TokenIndex.open(url)
    cache = ShardCache(str(tmp_path / "cache"), 1 << 20)
    good, bad = SampleReader(index, cache).read(np.arange(12))
    assert sorted(good) == list(range(6, 12)) and len(bad) == 6
    assert all(f"5 bytes instead of {index.shards[0].bytes}" in sample.reason for sample in bad)
    assert len(list(Path(cache.folder).glob("*.tar"))) == 1


def test_a_cache_too_small_for_its_windows_is_warned_of(remote, tmp_path, caplog):
    schedule = schedule_of(TokenIndex.open(remote[0]))
    with caplog.at_level(logging.WARNING):
        Loader(schedule, cache=str(tmp_path), cache_bytes=1000).close()
    assert "may not hold two windows of 2 shards" in caplog.text


def test_processes_share_a_cache_that_is_too_small_for_them(tmp_path):
    """Local files behind a URL that counts as remote, so that other processes find them, too."""
    write_dataset(str(tmp_path / "tokens"), (12, 12, 12, 12))
    url = f"local://{tmp_path}/tokens"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=read_all, args=(url, str(tmp_path / "cache"), seed, results)) for seed in range(2)
    ]
    for worker in workers:
        worker.start()
    assert sorted(results.get(timeout=120) for _ in workers) == [(seed, 0, 48) for seed in range(2)]
    for worker in workers:
        worker.join()
    assert not list((tmp_path / "cache").rglob("*.part-*"))
