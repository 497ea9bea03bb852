"""Keys split as webdataset splits them."""

from __future__ import annotations

import pytest
from webdataset.tariterators import base_plus_ext

from vitdist.data.storage.keys import plain, split_name

NAMES = [
    "a.jpg",
    "a.b.jpg",
    "x/IMG.2021.jpg",
    "x.y/a.cls",
    ".hidden",
    "x/.hidden.jpg",
    "noext",
    "a.JPG",
    "ä ö/ü.json",
    "a.",
]


@pytest.mark.parametrize("name", NAMES)
def test_splits_as_webdataset_does(name: str) -> None:
    key, suffix = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, suffix.lower()))


def test_meta_members_belong_to_no_sample() -> None:
    assert split_name("__index__.json") is None or split_name("__index__/a.json") is None


def test_plain_text_has_no_dots() -> None:
    assert plain("001.Black footed/Ä.x") == "001_Black_footed_x"
