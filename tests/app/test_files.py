"""Atomic file writes."""

import hashlib
import os
import subprocess
import sys
import threading

import pytest

from snella_app.files import _machine, check_new, write_bytes


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


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    path = tmp_path / "model.safetensors"
    ended_process = subprocess.Popen([sys.executable, "-c", ""])
    ended_process.wait()
    killed, running, remote = (
        tmp_path / f".{path.name}.{machine}-{process}-0123abcd.tmp"
        for machine, process in (
            (_machine(), ended_process.pid),
            (_machine(), os.getpid()),
            ("other1", ended_process.pid),
        )
    )
    for file in (killed, running, remote):
        file.touch()
    write_bytes(path, b"x")
    assert sorted(tmp_path.iterdir()) == sorted([path, running, remote])


def test_a_file_with_the_longest_name_is_written(tmp_path):
    leftover = tmp_path / f".{hashlib.sha256(b'x' * 255).hexdigest()}.{_machine()}-{2**22 - 1}-0.tmp"
    leftover.touch()
    write_bytes(tmp_path / ("x" * 255), b"content")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x" * 255, b"content")]


def test_temporary_file_is_removed_after_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_does_not_replace_a_folder_or_the_reverse(overwrite, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"out=.* is a folder, which cannot be replaced by a file; choose"):
        check_new("out", tmp_path, overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"file is a file, which cannot be replaced by a folder; choose"):
        check_new("out", tmp_path / "file", overwrite=overwrite, is_folder=True)
    check_new("out", tmp_path, overwrite=True, is_folder=True)
    check_new("out", tmp_path / "file", overwrite=True)
