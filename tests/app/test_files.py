"""Atomic file writes."""

import threading

import pytest

from snella_app.files import write_bytes


def test_concurrent_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, errors = tmp_path / "frozen.json", []

    def write(content):
        try:
            for _ in range(50):
                write_bytes(path, content)
        except OSError as error:
            errors.append(error)

    contents = [bytes([number]) * 1000 for number in range(4)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_file_is_removed_after_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
