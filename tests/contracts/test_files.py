"""What is there is whole, and what fails leaves what was there."""

import errno

import pytest

from potstill.contracts.errors import RunError
from potstill.contracts.files import disk_errors, read_json, whole_file, whole_folder, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "new" / "a.txt"
    write_text(place, "first")
    with pytest.raises(ZeroDivisionError), whole_file(place) as part:
        part.write_text("half")
        assert place.read_text() == "first" and part.parent == place.parent
        1 / 0  # noqa: B018
    assert place.read_text() == "first" and names(place.parent) == ["a.txt"]
    write_json(place, {"b": 1, "a": None})
    assert read_json(place) == {"a": None, "b": 1} and names(place.parent) == ["a.txt"]


def test_a_folder_is_replaced_by_a_whole_one(tmp_path):
    for text, fails in (("first", False), ("half", True), ("second", False)):
        try:
            with whole_folder(tmp_path / "f") as part:
                (part / f"{text}.txt").write_text(text)
                assert not fails or 1 / 0
        except ZeroDivisionError:
            pass
        assert names(tmp_path) == ["f"] and names(tmp_path / "f") == [f"{'first' if fails else text}.txt"]


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (OSError(errno.ENOSPC, "No space"), "The disk is full: here could not be written. Do this"),
        (ValueError("I/O error (os error 28)"), "The disk is full: here could not be written. Do this"),
        (OSError(errno.EACCES, "no"), "here may not be written. Choose another folder"),
    ],
)
def test_the_disk_speaks_plainly(cause, message):
    with pytest.raises(RunError, match=message), disk_errors("here", "Do this."):
        raise cause
    with pytest.raises(KeyError), disk_errors("here"):
        raise KeyError("something else")
