"""A node and a driver killed at random moments: the same command again gives the bytes of an undisturbed run.

Workers are killed in test_tokenization.py; `python -m tests.chaos --times 100` kills all three.
"""

import random

import pytest

from tests.chaos import SETTINGS, contents, disturb, finish_run, start_run
from tests.corpora import write_codec, write_corpus


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return ["--input", str(write_corpus(folder / "corpus", 140)), "--codec", write_codec(folder / "codec"), *SETTINGS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fixed):
    output = tmp_path_factory.mktemp("chaos-quiet") / "tokens"
    assert finish_run(start_run([*fixed, "--output", str(output)], nodes=1)) == 0
    return contents(output)


def test_a_lost_node_and_a_killed_driver_change_no_byte(tmp_path, fixed, undisturbed):
    output = tmp_path / "tokens"
    arguments = [*fixed, "--output", str(output)]
    what = disturb(arguments, output, ("node", "driver"), random.Random(1), nodes=2)
    assert contents(output) == undisturbed, what
