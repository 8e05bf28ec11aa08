"""Fixtures of the tests of the reference training."""

from __future__ import annotations

import pytest

from tests.training.notes import write_notes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of text that is learnt in a few steps."""
    return write_notes(tmp_path_factory.mktemp("corpus"))
