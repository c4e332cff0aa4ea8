"""files.py: a file gets its name only once it is complete."""

import pytest

from unext import files


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    assert files.output_folder(tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc"):
        with pytest.raises(OSError, match=f"{path}: nothing can be written there"):
            files.output_folder(path)
