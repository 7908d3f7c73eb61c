"""Slurm job scripts and the parts that their array indices train."""

import os
import shutil
import subprocess

import pytest

from snella_lab.comparison.cells import Plan, units
from snella_lab.comparison.compare import compare
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.slurm import MAX_PARTS, write_slurm_scripts

from .conftest import rows_of

SBATCH = """#!/bin/bash
# Runs all array indices of a job immediately and prints the job ID.
echo "$@" >> "$CALLS"
script="${!#}"
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
for index in $(seq 0 "${last:-0}"); do
  SLURM_ARRAY_TASK_ID=$index bash "$script" >> "$CALLS.log" 2>&1 || echo "index $index: $?" >> "$CALLS"
done
echo "7;cluster"
"""


def cells_of(plan):
    """Return the names of all cells that a plan without a search trains."""
    return [cell.name for cell in plan.ready()]


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_parts_without_a_search_partition_the_cells(tiny, count):
    experiment = tiny(methods=["linear", "bias"], data=["digits", "mnist5k"], seeds=2, grid={"lr_factors": [1.0]})
    parts = [cells_of(Plan(experiment, {}, units(experiment)[number::count])) for number in range(count)]
    assert len(units(experiment)) == 8
    assert sorted(name for part in parts for name in part) == sorted(cells_of(Plan(experiment, {})))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_rows_of_other_parts_are_not_counted_as_done(tiny, make_row):
    experiment = tiny(methods=["linear"], seeds=2, grid={"lr_factors": [1.0]})
    rows = {"digits/linear/seed-0": make_row(experiment, "digits", "linear", 0)}
    parts = [Plan(experiment, rows, [unit]) for unit in units(experiment)]
    assert [(part.done, part.left) for part in parts] == [(1, 0), (0, 1)]


def test_search_stays_in_one_part(tiny, make_row):
    experiment = tiny(methods=["linear", "bias"], seeds=3)
    assert [(data.name, method.name, seeds) for data, method, seeds in units(experiment)] == [
        ("digits", "linear", (0, 1, 2)),
        ("digits", "bias", (0, 1, 2)),
    ]
    plan = Plan(experiment, {}, units(experiment)[1::2])
    assert {cell.method.name for cell in plan.ready()} == {"bias"} and plan.left == 5
    row = make_row(experiment, "digits", "linear", 0)
    plan.record(row)
    assert plan.left == 5 and plan.done == 0


def test_scripts_contain_array_log_and_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submit = write_slurm_scripts(
        tmp_path / "my runs", tiny(seeds=2), ExecutionConfig(workers=2, threads=3, run_limit=90.0)
    )
    assert submit == tmp_path / "my runs" / "slurm" / "submit.sh"
    train = (submit.parent / "train.sh").read_text()
    assert "#SBATCH --array=0-1\n#SBATCH --cpus-per-task=6\n" in train
    assert f'#SBATCH --output="{submit.parent}/logs/%a.txt"\n' in train and (submit.parent / "logs").is_dir()
    assert f"cd {tmp_path}\n" in train
    assert train.endswith('--part "$SLURM_ARRAY_TASK_ID/2" --workers 2 --threads 3 --run-limit 90\n')
    for script in submit.parent.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", script], check=True)


def test_large_comparisons_have_several_units_per_index(tiny, tmp_path):
    experiment = tiny(seeds=MAX_PARTS, grid={"lr_factors": [1.0]})
    execution = ExecutionConfig(emit="slurm", emit_to=str(tmp_path / "jobs"))
    train = write_slurm_scripts(tmp_path, experiment, execution).with_name("train.sh")
    assert f"--array=0-{MAX_PARTS - 1}\n" in train.read_text() and f"/{MAX_PARTS}" in train.read_text()
    write_slurm_scripts(tmp_path, experiment, execution)
    with pytest.raises(FileExistsError, match=r"emit_to=.*jobs contains a different train.sh; choose an empty or new"):
        write_slurm_scripts(tmp_path / "other", experiment, execution)


def test_other_scripts_are_not_overwritten(tiny, tmp_path):
    (tmp_path / "report.sh").write_text("mine")
    with pytest.raises(FileExistsError, match=r"contains a different report\.sh"):
        write_slurm_scripts(tmp_path / "run", tiny(), ExecutionConfig(emit="slurm", emit_to=str(tmp_path)))
    assert (tmp_path / "report.sh").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("argument", ["out", "emit_to"])
def test_invalid_characters_are_attributed_to_the_argument_that_contains_them(tiny, tmp_path, argument):
    roots = {"out": tmp_path, "emit_to": tmp_path / "jobs"} | {argument: tmp_path / 'a"b'}
    execution = ExecutionConfig(emit="slurm", emit_to=None if argument == "out" else str(roots["emit_to"]))
    with pytest.raises(ValueError, match=f'^{argument} must not contain double quotes, .*, got .*/a"b'):
        write_slurm_scripts(roots["out"], tiny(), execution)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1", "a/b", "1/2/3", "-1/2"])
def test_invalid_part_is_rejected(text):
    with pytest.raises(ValueError, match=f"part must be INDEX/COUNT, e.g. 0/8, got '{text}'"):
        ExecutionConfig(part=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "2/2"}, "part must be INDEX/COUNT with INDEX < COUNT and cannot be combined with draw_only, got 2/2"),
        ({"part": "0/2", "draw_only": True}, "cannot be combined with draw_only, got 0/2"),
        ({"part": "0/2"}, "part trains the experiment stored in out=.* and cannot be combined with an experiment"),
        ({"emit": "pbs"}, "emit must be slurm, got 'pbs'"),
        ({"emit": "slurm", "part": "0/2"}, "emit='slurm' cannot be combined with ray, part or draw_only"),
        ({"emit_to": "jobs"}, "emit_to requires emit, got 'jobs' without emit; set emit to slurm"),
        ({"retry_failed": True, "draw_only": True}, "retry_failed cannot be combined with draw_only, which trains"),
        (
            {"run_limit": 5.0, "workers": 0},
            "run_limit must be positive and requires ray or workers, got 5 and workers=0",
        ),
        *(
            ({"gpus": gpus, "ray": True}, rf"gpus must be in \[0, 1\] or an integer, .* got {gpus:g} and ray=True")
            for gpus in (float("inf"), float("nan"), -1.0, 1.5)
        ),
        ({"gpus": 0.5}, r"gpus must be in \[0, 1\] or an integer, and requires ray, got 0.5 and ray=False"),
    ],
)
def test_conflicting_options_are_rejected(options, message, tiny, tmp_path, console):
    with pytest.raises(ValueError, match=message):
        compare(tiny(), tmp_path / "c", ExecutionConfig(**options), console)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_printed_command_trains_every_cell_once_and_writes_the_report(tiny, tmp_path, console, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    root = tmp_path / "c"
    submit = compare(tiny(grid={"lr_factors": [1.0]}), root, ExecutionConfig(workers=0, emit="slurm"), console=console)
    printed = console.file.getvalue().splitlines()[-1]
    assert printed == f"2 runs to train; submit with: bash {submit}" and not (root / "results.jsonl").exists()
    for attempt in (1, 2):
        subprocess.run(["bash", "-c", printed.partition("with: ")[2] + " --partition=gpu"], check=True)
        log = (tmp_path / "calls.log").read_text()
        assert (tmp_path / "calls").read_text().splitlines() == attempt * [
            f"--parsable --partition=gpu {root}/slurm/train.sh",
            f"--partition=gpu --dependency=afterany:7 {root}/slurm/report.sh",
        ], log
        assert sorted(rows_of(root)) == ["digits/linear/seed-0", "digits/lora-2/seed-0"]
        assert len((root / "results.jsonl").read_text().splitlines()) == 2
        assert log.count("1 run to train") == 2 and "lora-2" in (root / "comparison.html").read_text()
