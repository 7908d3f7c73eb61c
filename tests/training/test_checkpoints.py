import errno

import pytest

from snella.training.checkpoints import (
    CheckpointError,
    is_write_failure,
    latest_checkpoint,
    remove_incomplete,
    reporting_write_errors,
    staged,
)


def checkpoint(folder, name):
    with staged(folder, name) as staging:
        (staging / name / "weights").write_text(name)


def test_the_latest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path / "missing") is None
    for step in (5, 20, 100):
        checkpoint(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-x").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_incomplete_and_old_checkpoints_are_ignored_and_removed(tmp_path):
    checkpoint(tmp_path, "checkpoint-5")
    checkpoint(tmp_path, "checkpoint-10")
    (tmp_path / ".staging-checkpoint-15" / "checkpoint-15").mkdir(parents=True)
    (tmp_path / "stray").write_text("x")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert remove_incomplete(tmp_path) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]
    assert remove_incomplete(tmp_path / "missing") == 0


def test_a_checkpoint_appears_only_when_it_is_complete(tmp_path):
    with staged(tmp_path, "checkpoint-1") as staging:
        (staging / "checkpoint-1" / "weights").write_text("x")
        assert latest_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path):
    checkpoint(tmp_path, "checkpoint-1")
    with (
        pytest.raises(
            CheckpointError,
            match=r"checkpoint-2: the disk is full \(\d+ MiB free\); the previous one, .*checkpoint-1, is intact",
        ),
        staged(tmp_path, "checkpoint-2"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_without_an_earlier_checkpoint_the_message_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="there is no earlier one"), staged(tmp_path, "checkpoint-2"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")
    with (
        pytest.raises(CheckpointError, match=r"adapter: .*; there is no earlier one"),
        reporting_write_errors(tmp_path / "adapter"),
    ):
        raise OSError(errno.EDQUOT, "Quota exceeded")


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(KeyError, match="bug"), staged(tmp_path, "checkpoint-2"):
        raise KeyError("bug")
    with pytest.raises(KeyError, match="bug"), reporting_write_errors(tmp_path):
        raise KeyError("bug")
    assert not is_write_failure(ValueError("shapes differ")) and not is_write_failure(FileNotFoundError("x"))
    assert not list(tmp_path.iterdir())


def test_torch_s_words_for_a_full_disk_are_put_plainly_and_an_empty_folder_is_no_earlier_adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    plain = (
        r"adapter: the disk is full, or a limit on the size of files was met \(\d+ MiB free\); there is no earlier one"
    )
    with pytest.raises(CheckpointError, match=plain), reporting_write_errors(tmp_path / "adapter"):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with (
        pytest.raises(CheckpointError, match=r"the previous one, .*adapter, is intact"),
        reporting_write_errors(tmp_path / "adapter"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
