"""NLTK's data out of installed packages."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from infra import nltk_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nltk_data.build(tmp_path_factory.mktemp("prefix") / "share" / "nltk_data")


def test_nltk_reads_it(data: Path) -> None:
    lexicon = zipfile.ZipFile(data / "corpora/cmudict.zip").read("cmudict/cmudict").decode()
    assert "READ 1 R EH1 D\nREAD 2 R IY1 D\n" in lexicon
    assert lexicon.count("\n") > 130_000 and "#" not in lexicon and "(" not in lexicon
    from nltk.tag.perceptron import PerceptronTagger

    tagger = PerceptronTagger(load=False)
    folder = data / "taggers/averaged_perceptron_tagger_eng"
    import nltk

    nltk.data.path.insert(0, str(data))
    try:
        tagger.load_from_json(lang="eng", loc=str(folder))
    finally:
        nltk.data.path.remove(str(data))
    tags = dict(tagger.tag("she read the old book".split()))
    assert (tags["read"], tags["the"], tags["book"]) == ("VBD", "DT", "NN")


def test_building_again_gives_the_same_bytes_and_leaves_nothing_behind(data: Path) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert nltk_data.build(data) == data
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert [path.name for path in data.parent.iterdir()] == ["nltk_data"]


def test_a_missing_part_says_what_to_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(nltk_data.MissingData, match=r"cmudict\.zip is missing: run `make install`"):
        nltk_data.require(tmp_path)
    assert nltk_data.require(data) == data


def test_a_failed_build_leaves_the_old_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk_data, "TAGGER_SHA256", "0" * 64)
    with pytest.raises(nltk_data.MissingData, match="has sha256 1109164b"):
        nltk_data.build(data)
    assert nltk_data.require(data) == data
    assert os.listdir(data.parent) == ["nltk_data"]


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


@pytest.mark.parametrize("content", [_Evil(), Path("a"), io.BytesIO, complex(1, 2), bytearray(b"a")])
def test_the_unpickler_builds_plain_containers_only(content: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="only plain containers"):
        nltk_data.PlainContainersUnpickler(io.BytesIO(pickle.dumps(content))).load()
    plain = ({"a": [1, 2.5, "b"]}, {"x", "y"}, None)
    assert nltk_data.PlainContainersUnpickler(io.BytesIO(pickle.dumps(plain))).load() == plain
