"""Files are whole or not there."""

import json
from pathlib import Path

import pytest

from senri_hf.files import whole, write_json, write_text


def test_json_is_read_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    write_json(path, {"名": [1, 2.5], "none": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"名": [1, 2.5], "none": None}
    assert "名" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_two_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    with whole(path) as first, whole(path) as second:
        second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first" and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_file_before_it_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_text(path, "before")
    with pytest.raises(RuntimeError, match="full"), whole(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError("full")
    with pytest.raises(TypeError):
        write_json(path, {"not JSON": object()})
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == [path.name]
