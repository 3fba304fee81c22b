"""Files: written together or not at all, and errors that name them."""

import errno
import json
import os

import pytest

from svd_engine.utils import files
from tests.cli.test_full_disk import full_disk


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_written_together(tmp_path):
    files.write_together({tmp_path / "x" / "a": b"1", tmp_path / "b": b"2"})
    assert (tmp_path / "x" / "a").read_bytes() == b"1" and (tmp_path / "b").read_bytes() == b"2"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "x"]
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_changes_nothing(tmp_path):
    (tmp_path / "a").touch()
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        files.write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert raised.value.filename == str(tmp_path / "a")
    assert contents(tmp_path) == {"a": b""}


@pytest.mark.parametrize("call", ["mkstemp", "chmod", "replace", "fdopen"])
@pytest.mark.parametrize("number", [1, 2])
def test_any_failure_leaves_no_temporary_file(tmp_path, monkeypatch, call, number):
    owner = files.tempfile if call == "mkstemp" else os
    original, called = getattr(owner, call), []

    def failing(*arguments, **keywords):
        called.append(arguments)
        if len(called) == number:
            raise OSError(errno.EROFS, "Read-only file system")
        return original(*arguments, **keywords)

    files.write_together({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, failing)
        with pytest.raises(OSError, match="Read-only") as raised:
            files.write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert raised.value.filename == str(tmp_path / "ab"[number - 1])
    renamed = call == "replace" and number == 2
    assert contents(tmp_path) == {"a": b"new" if renamed else b"old", "b": b"old"}


def test_a_folder_in_the_way_is_found_before_any_rename(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        files.write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert raised.value.filename == str(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 400 + b"}", "an integer has 400 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "digits"),
        (b"[]", "an object is needed; got list"),
        (b"null", "an object is needed; got NoneType"),
        (b"\xff", "can't decode"),
        (b"", "Expecting value"),
    ],
    ids=range(7),
)
def test_what_is_no_object(tmp_path, text, reason):
    (tmp_path / "f.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"f\.json is not a thing: .*" + reason):
        files.read_object(tmp_path / "f.json", "a thing")


def test_an_object(tmp_path):
    value = {"a": [1, 10**30, 1e300, None], "é": "\u2028"}
    (tmp_path / "f.json").write_text(json.dumps(value), encoding="utf-8")
    assert files.read_object(tmp_path / "f.json", "a thing") == value


def test_a_place_below_a_file(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match=r"f is a file"):
        files.check_place(tmp_path / "f" / "x" / "y")
    files.check_place(tmp_path / "x" / "y")
