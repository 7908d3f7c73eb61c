"""Slurm job scripts that train the parts of a comparison and then write its report."""

import shlex
import sys
from pathlib import Path

from snella_app.files import write_text
from snella_lab.comparison.cells import units
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.options import ExecutionConfig

MAX_PARTS = 1000
"""Maximum number of array indices. Slurm's default for MaxArraySize is 1001."""

_TRAIN = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task={cpus}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Trains one part of {out}. Skips finished runs and resumes interrupted ones from their checkpoints.
set -euo pipefail
cd {folder}
exec {command} --part "$SLURM_ARRAY_TASK_ID/{count}"{options}
"""

_REPORT = """#!/bin/bash
#SBATCH --job-name={name}-report
#SBATCH --output={report_log}
# Writes the tables and the report of {out}.
set -euo pipefail
cd {folder}
exec {command} --draw-only
"""

_SUBMIT = """#!/bin/bash
# Submits the array job, then the report job. Arguments are passed to sbatch, e.g. --partition=gpu --gres=gpu:1
# --time=04:00:00. Run this script again to train the remaining runs.
set -euo pipefail
job=$(sbatch --parsable "$@" {train})
sbatch "$@" --dependency="afterany:${{job%%;*}}" {report}
"""


def write_slurm_scripts(root: Path, experiment: Experiment, execution: ExecutionConfig) -> Path:
    """Write `train.sh` (an array job), `report.sh`, and `submit.sh`, and return the path of `submit.sh`.

    The experiment is split into `units`, which can be trained independently. Each array index trains one unit, or
    several if there are more than `MAX_PARTS` units, with the `workers`, `threads` (1 if None), and `run_limit` of
    `execution`. All machines must share the file system that contains `root`.

    Raises:
        ValueError: If the scripts' path contains double quotes, backslashes, or newlines.
        FileExistsError: If `emit_to` contains files with these names that were not written for `root`.
    """
    root = root.resolve()
    scripts = root / "slurm" if execution.emit_to is None else Path(execution.emit_to).resolve()
    if any(character in str(scripts) for character in '"\\\n'):  # the scripts contain log paths in double quotes
        argument = "out" if execution.emit_to is None else "emit_to"
        raise ValueError(f"{argument} must not contain double quotes, backslashes or newlines, got {scripts}")
    command = f"-m snella_app.cli.main compare --out {shlex.quote(str(root))}"
    names = ("train.sh", "report.sh", "submit.sh")
    existing = [scripts / name for name in names if (scripts / name).exists()]
    if execution.emit_to is not None and existing:
        train_script = scripts / names[0]
        is_own = train_script.is_file() and f"{command} --part" in train_script.read_text(errors="replace")
        if not is_own:
            raise FileExistsError(
                f"emit_to={scripts} contains a different {existing[0].name}; choose an empty or new folder"
            )
    (scripts / "logs").mkdir(parents=True, exist_ok=True)
    logs = str(scripts / "logs").replace("%", "%%")  # Slurm replaces patterns such as %a in log paths
    num_parts = min(len(units(experiment)), MAX_PARTS)
    workers = execution.workers
    threads = execution.threads or 1
    options = f" --workers {workers} --threads {threads}"
    if execution.run_limit is not None:
        options += f" --run-limit {execution.run_limit:g}"
    characters = [character if character.isalnum() or character in "-_." else "-" for character in experiment.name]
    job_name = "".join(characters)
    values = {
        "name": job_name,
        "count": num_parts,
        "last": num_parts - 1,
        "cpus": max(workers, 1) * threads,
        "log": f'"{logs}/%a.txt"',
        "report_log": f'"{logs}/report.txt"',
        "out": " ".join(str(root).split()),  # newlines would end the comment in the script
        "folder": shlex.quote(str(Path.cwd())),
        "command": f"{shlex.quote(sys.executable)} {command}",
        "options": options,
        "train": shlex.quote(str(scripts / "train.sh")),
        "report": shlex.quote(str(scripts / "report.sh")),
    }
    for name, template in zip(names, (_TRAIN, _REPORT, _SUBMIT), strict=True):
        write_text(scripts / name, template.format(**values))
        (scripts / name).chmod(0o755)
    return scripts / "submit.sh"
