"""Completion scripts complete commands, options and values in real shells."""

import os
import shutil
import subprocess

import pytest

from snella_app.cli.completion import _PATHS, SHELLS, completion_script
from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS, options_of

BASH = """
source "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE}
complete -p snella >/dev/null
function=$(complete -p snella | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
$function snella "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(shell, script, *args, cwd):
    """Completions of the last word in a real shell."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    file = cwd / f"snella.{shell}"
    file.write_text(script)
    if shell == "bash":
        command = [program, "--norc", "-c", BASH, "bash", str(file), "snella", *args]
    else:
        line = " ".join(("snella", *args))
        command = [program, "--no-config", "-c", f"source {file}; complete -C '{line}'"]
    environment = {**os.environ, "HOME": str(cwd)}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert not process.stderr
    return [line.split("\t")[0].strip() for line in process.stdout.splitlines() if line.strip()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["tr"], {"train"}),
        (["evaluate-"], {"evaluate-generation", "evaluate-language"}),
        (["train", "--ba"], {"--backbone", "--batch-size"}),
        (["train", "--augment", "cr"], {"crop", "crop-no-flip"}),
        (["train", "--overwrite", "--resu"], {"--resume"}),
        (["train", "--pretrained", "f"], {"false"}),
        (["compare", "--pretrained", "f"], {"false"}),
        (["train", "--backbone", "eff"], {"efficientnet_lite0.pypi"}),
        (["export", "run", "--format", "on"], {"onnx"}),
        (["data", "ch"], {"check"}),
        (["--comp"], {"--completion"}),
        (["train", "--config", "se"], {"settings.yaml"}),
        (["evaluate", "--data", "se"], {"settings.yaml"}),
    ],
)
def test_a_shell_completes_commands_options_values_and_files(shell, args, expected, tmp_path):
    (tmp_path / "settings.yaml").touch()
    assert set(complete(shell, completion_script(shell), *args, cwd=tmp_path)) == expected


def test_zsh_allows_options_after_a_flag_and_completes_values_of_other_booleans():
    script = completion_script("zsh")
    assert "--resume[" in script and ":resume:(true false)" not in script
    assert ":pretrained:(true false)" in script


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_valid_and_lists_every_command_and_option(shell, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--completion", shell])
    script = capsys.readouterr().out
    assert caught.value.code == 0
    for name, command in COMMANDS.items():
        assert name in script
        for option in options_of(command.function):
            assert option.is_positional or option.typed.removeprefix("--") in script
    program = shutil.which(shell)
    if program is not None:
        file = tmp_path / "script"
        file.write_text(script)
        subprocess.run([program, "-n", str(file)], check=True, timeout=30)


@pytest.mark.parametrize(("args", "shown"), [(["nu"], "nu"), ([], "nothing")])
def test_an_unknown_shell_is_an_error(args, shown, capsys):
    assert main(["--completion", *args]) == 2
    assert capsys.readouterr().err == f"snella: --completion must be one of bash, zsh, fish, got {shown}\n"


def test_every_completed_path_option_belongs_to_a_command():
    assert {option.name for command in COMMANDS.values() for option in options_of(command.function)} >= _PATHS
