import subprocess
import sys

import pytest


def interrupt(program, then=""):
    code = (
        "import os, signal, sys; from snella_app.cli.main import exit_on_interrupt, raise_on_interrupt\n"
        # a shell that started the tests in the background lets its children ignore the signal
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv = [{program!r}]; exit_on_interrupt(); {then}\n"
        "class Imported:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "Imported()\n"
        "for _ in range(1000): pass\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("program", ["/usr/bin/snella", "snella.exe"])
def test_ctrl_c_during_imports_prints_one_line_and_exits_with_130(program):
    process = interrupt(program)
    assert (process.returncode, process.stderr) == (130, "snella: interrupted\n")


def test_other_programs_and_running_commands_receive_the_exception():
    for process in (interrupt("train.py"), interrupt("snella", "raise_on_interrupt()")):
        assert "KeyboardInterrupt" in process.stderr and "interrupted" not in process.stderr
