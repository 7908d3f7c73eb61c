"""Rows in `results.jsonl` (truncated, duplicate, lost, restored), and locks of cells."""

import json
import multiprocessing
import os
import re
import signal
import time

import pytest

from snella_app.files import sealed
from snella_app.records.record import plain
from snella_lab.comparison import store
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.store import (
    append_row,
    cell_lock,
    collect,
    drop_failed,
    is_locked,
    read_lines,
    read_row,
    remove_lock,
)

FORK = multiprocessing.get_context("fork")


def row(cell, seed, status="success", **results):
    return CellRow(
        **{"cell": cell, "status": status, "purpose": "final", "created_at": "2026-01-01", "seed": seed},
        **{"task_name": "t", "experiment_name": "m"},
        results=CellResults(**results) if status == "success" else None,
    )


@pytest.fixture
def root(tmp_path):
    for number in range(3):
        append_row(tmp_path, tmp_path / "cells" / f"c{number}", row(f"c{number}", number))
    return tmp_path


def seeds(root):
    return {name: stored.seed for name, stored in read_lines(root / "results.jsonl")[0].items()}


def test_each_row_is_a_line(root):
    lines = (root / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2]
    assert collect(root)[1] == []


def test_truncated_line_is_restored_from_its_cell_with_a_note(root):
    path = root / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    rows, notes = collect(root)
    assert sorted(rows) == ["c0", "c1", "c2"] and seeds(root) == {"c0": 0, "c1": 1, "c2": 2}
    assert "results.jsonl, line 3 is truncated" in notes[0] and "1 row restored" in notes[1]
    assert collect(root)[1] == []


def test_truncated_line_without_its_cell_is_dropped(root):
    path = root / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    (root / "cells" / "c2" / "cell.json").unlink()
    rows, notes = collect(root)
    assert sorted(rows) == ["c0", "c1"] and len(notes) == 1
    assert path.read_text().count("\n") == 2


def test_row_after_a_truncated_line_starts_a_new_line(root):
    path = root / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    append_row(root, root / "cells" / "c3", row("c3", 3))
    assert seeds(root) == {"c0": 0, "c1": 1, "c3": 3}


def test_rows_without_folders_are_kept_and_missing_rows_are_restored(root):
    (root / "cells" / "c0" / "cell.json").unlink()
    lines = (root / "results.jsonl").read_text().splitlines(keepends=True)
    (root / "results.jsonl").write_text("".join(lines[:2]))
    assert sorted(collect(root)[0]) == ["c0", "c1", "c2"] and seeds(root) == {"c0": 0, "c1": 1, "c2": 2}


def test_duplicate_rows_are_removed(root):
    path = root / "results.jsonl"
    path.write_text(path.read_text() * 2)
    collect(root)
    assert path.read_text().count("\n") == 3


def test_file_replaced_while_waiting_for_the_lock_is_read_again(root, monkeypatch):
    path, original = root / "results.jsonl", store.cell_lock
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))

    def lock_after_another_process(*args, **options):
        append_row(root, root / "cells" / "late", row("late", 9))
        replacement = root / "replacement"
        replacement.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))
        replacement.replace(path)
        return original(*args, **options)

    monkeypatch.setattr(store, "cell_lock", lock_after_another_process)
    collect(root)
    assert seeds(root) == {"c0": 0, "c1": 1, "c2": 2, "late": 9}
    assert path.read_text().count("\n") == 4


def test_invalid_lines_are_noted(root):
    path = root / "results.jsonl"
    path.write_text('{"a": 1}\n[]\n' + path.read_text())
    notes = collect(root)[1]
    assert "line 1 is not a comparison row" in notes[0] and "line 2" in notes[1]


def test_failed_rows_can_be_dropped(root):
    append_row(root, root / "cells" / "bad", row("bad", 9, "failed"))
    assert drop_failed(root) == ["bad"]
    assert sorted(collect(root)[0]) == ["c0", "c1", "c2"]
    assert drop_failed(root) == []


def test_failed_rows_are_not_dropped_while_another_process_writes(root, monkeypatch):
    append_row(root, root / "cells" / "bad", row("bad", 9, "failed"))
    before = (root / "results.jsonl").read_bytes()
    monkeypatch.setattr(store, "_WRITE_WAIT_S", 0.1)
    with (
        cell_lock(root / "locks", "results.jsonl"),
        pytest.raises(TimeoutError, match=r"another process has locked .*results\.jsonl for more than 0\.1 s"),
    ):
        drop_failed(root)
    assert (root / "results.jsonl").read_bytes() == before and (root / "cells" / "bad" / "cell.json").exists()
    assert drop_failed(root) == ["bad"]


def test_folder_without_rows_is_empty(tmp_path):
    assert collect(tmp_path) == ({}, []) and not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("name", ["../../victim", "/etc", "a/../../victim", "..", ".", "a//b", "", 3, None, ["a"]])
def test_cell_name_outside_the_folder_is_rejected(root, name):
    victim = root.parent / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "cell.json").write_text("mine")
    with (root / "results.jsonl").open("a") as file:
        file.write(json.dumps(plain(row(name, 9, "failed"))) + "\n")
    notes = read_lines(root / "results.jsonl")[1]
    assert (
        f"line 4 has the cell name {name!r}, which must be a relative path such as 'digits/lora-8/seed-0'" in notes[0]
    )
    assert drop_failed(root) == [] and (victim / "cell.json").read_text() == "mine"
    assert sorted(collect(root)[0]) == ["c0", "c1", "c2"]


def modify(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("has_digest", [True, False], ids=["new", "without a digest"])
def test_modified_cell_is_restored_from_its_valid_line(root, has_digest):
    cell = root / "cells" / "c1" / "cell.json"
    if not has_digest:
        for path in [*root.rglob("cell.json"), root / "results.jsonl"]:
            path.write_text(re.sub(r',\s*"sha256": "\w+"', "", path.read_text()))
    modify(cell, '"seed": 1', '"seed": 7')
    rows, notes = collect(root)
    assert rows["c1"].seed == seeds(root)["c1"] == json.loads(cell.read_text())["seed"] == 1
    reason = (
        "was modified after it was written (the sha256 of 'c1' differs)" if has_digest else "differs from results.jsonl"
    )
    assert notes == [f"{cell} {reason}; restored from results.jsonl"]
    assert collect(root)[1] == []


def test_modified_line_is_restored_from_its_cell(root):
    modify(root / "results.jsonl", '"seed": 1', '"seed": 7')
    rows, notes = collect(root)
    assert rows["c1"].seed == seeds(root)["c1"] == 1
    assert "line 2 was modified after it was written" in notes[0] and "1 row restored" in notes[1]


def test_row_modified_in_both_places_is_dropped(root):
    modify(root / "results.jsonl", '"seed": 1', '"seed": 7')
    modify(root / "cells" / "c1" / "cell.json", '"seed": 1', '"seed": 8')
    assert sorted(collect(root)[0]) == ["c0", "c2"] and read_row(root / "cells" / "c1") is None


def test_row_in_the_folder_of_another_cell_is_dropped(root):
    (root / "cells" / "c0").rename(root / "cells" / "other")
    (root / "results.jsonl").unlink()
    rows, notes = collect(root)
    assert sorted(rows) == ["c1", "c2"] and "other/cell.json contains the row of another cell, 'c0'" in notes[0]


def test_digest_is_unchanged_by_a_json_round_trip(tmp_path):
    append_row(tmp_path, tmp_path / "cells" / "a", row("a", 0, sizes={10: 1, 9: 2}))
    assert read_row(tmp_path / "cells" / "a").results.sizes == {"10": 1, "9": 2} and collect(tmp_path)[1] == []


def test_unknown_columns_are_kept_when_the_file_is_rewritten(root):
    path = root / "results.jsonl"
    lines = [{**json.loads(line), "unknown_column": [1, {"a": None}]} for line in path.read_text().splitlines()]
    text = "".join(json.dumps(sealed(line)) + "\n" for line in lines)
    path.write_text(text + text[:40])
    for line in lines:
        (root / "cells" / line["cell"] / "cell.json").write_text(json.dumps(sealed(line)))
    assert sorted(collect(root)[0]) == ["c0", "c1", "c2"] and path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"task_name": "t"', '"task": "t"', "is not a comparison row: 'task_name' is missing"),
        ('"purpose": "final"', '"purpose": "last"', "'purpose' must be 'final' or 'trial', got 'last'"),
        ('"kept_weights": null', '"kept_weights": "few"', "'results.kept_weights' must be a valid integer"),
    ],
)
def test_line_with_another_schema_is_dropped_with_a_note(tmp_path, old, new, message):
    append_row(tmp_path, tmp_path / "cells" / "a", row("a", 0))
    line = (tmp_path / "results.jsonl").read_text()
    assert old in line
    columns = {key: value for key, value in json.loads(line.replace(old, new)).items() if key != "sha256"}
    (tmp_path / "results.jsonl").write_text(json.dumps(columns) + "\n")
    rows, notes = read_lines(tmp_path / "results.jsonl")
    assert rows == {} and message in notes[0]


def hold(folder, ready):
    with cell_lock(folder, "a/b") as is_acquired:
        ready.put(is_acquired)
        time.sleep(60)


@pytest.fixture
def owner(tmp_path):
    """Start a process that holds the lock."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=30)
    yield process
    if process.is_alive():
        process.kill()
    process.join()


def test_held_lock_can_be_acquired_only_after_its_owner_is_killed(owner, tmp_path):
    assert is_locked(tmp_path, "a/b")
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert not is_acquired
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert not is_locked(tmp_path, "a/b")
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert is_acquired and is_locked(tmp_path, "a/b")
    assert not is_locked(tmp_path, "a/b")


def test_stopped_owner_keeps_its_lock(owner, tmp_path):
    os.kill(owner.pid, signal.SIGSTOP)
    assert is_locked(tmp_path, "a/b")


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(KeyError), cell_lock(tmp_path, "x"):
        raise KeyError
    with cell_lock(tmp_path, "x") as is_acquired:
        assert is_acquired


def contend(folder, names):
    for name in names:
        with cell_lock(folder / "locks", name) as is_acquired:
            if is_acquired and not (folder / f"{name}.done").exists():
                with (folder / "log").open("a") as log:
                    log.write(f"{name}\n")
                time.sleep(0.002)
                (folder / f"{name}.done").touch()
        remove_lock(folder / "locks", name) if (folder / f"{name}.done").exists() else None


def test_concurrent_processes_run_each_cell_once(tmp_path):
    names = [f"cell-{i}" for i in range(25)]
    processes = [FORK.Process(target=contend, args=(tmp_path, names)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert sorted((tmp_path / "log").read_text().split()) == sorted(names)


def test_locks_ignore_the_clock(owner, tmp_path, monkeypatch):
    """A clock change does not release a lock."""
    for step_s in (-86400, 86400):
        now = time.time() + step_s
        os.utime(tmp_path / "a!b.lock", (now, now))
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert is_locked(tmp_path, "a/b")
        with cell_lock(tmp_path, "a/b") as is_acquired:
            assert not is_acquired
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert is_acquired


def test_children_of_a_killed_owner_do_not_hold_its_lock(tmp_path):
    """Data loader workers can outlive a run that was killed for its memory."""
    ready = FORK.Queue()

    def hold_with_child():
        with cell_lock(tmp_path, "x"):
            child = FORK.Process(target=time.sleep, args=(30,))
            child.start()
            ready.put(child.pid)
            time.sleep(60)

    process = FORK.Process(target=hold_with_child)
    process.start()
    child = ready.get(timeout=30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        os.kill(child, 0)
        with cell_lock(tmp_path, "x") as is_acquired:
            assert is_acquired
    finally:
        os.kill(child, signal.SIGKILL)


def test_checking_a_free_lock_does_not_block_others(tmp_path):
    (tmp_path / "x.lock").touch()
    stop = FORK.Event()

    def check():
        while not stop.is_set():
            is_locked(tmp_path, "x")

    process = FORK.Process(target=check)
    process.start()
    try:
        for _ in range(100):
            with cell_lock(tmp_path, "x") as is_acquired:
                assert is_acquired
    finally:
        stop.set()
        process.join()


def test_names_with_a_common_prefix_have_different_locks(tmp_path):
    with cell_lock(tmp_path, "x") as first, cell_lock(tmp_path, "x.1") as second:
        assert first and second
