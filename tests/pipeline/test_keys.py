"""Keys: safe in a tar, split by WebDataset where we split them, and reversible."""

import io
import tarfile

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.keys import LONGEST_SUFFIX, id_of, key_of
from pipeline.shards import split_name
from pipeline.utterances import Unusable


@given(st.text(max_size=120))
@example("small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb_0")
@example("1688-142285-0000")
@example("a//b/.c/%2F~")
@example("/absolute")
@example("Zoë.wav")
def test_a_key_gives_its_id_back_and_survives_a_tar(id):
    try:
        key = key_of(id)
    except Unusable as error:
        assert error.reason in ("bad-id", "id-too-long")
        assume(False)
    assert id_of(key) == id
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(f"{key}.phones.txt"))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        (name,) = tar.getnames()
    assert split_name(name) == (key, "phones.txt")
    assert not name.startswith("/") and ".." not in name.split("/")


@given(st.lists(st.text(alphabet="ab./%~é -", min_size=1, max_size=12), unique=True))
def test_different_ids_have_different_keys(ids):
    usable = [id for id in ids if ".." not in id.split("/")]
    assert len({key_of(id) for id in usable}) == len(usable)


@pytest.mark.parametrize("id", ["", "..", "a/../b", "nul\0", "line\nbreak", "\ud800"])
def test_dangerous_ids_are_refused(id):
    with pytest.raises(Unusable, match="bad-id"):
        key_of(id)


def test_a_long_id_needs_a_slash_where_a_tar_header_can_split_it():
    assert key_of("a" * 100 + "/" + "b" * 80)
    longest = 100 - LONGEST_SUFFIX
    assert key_of("a" * longest)
    with pytest.raises(Unusable, match="id-too-long"):
        key_of("a" * (longest + 1))
