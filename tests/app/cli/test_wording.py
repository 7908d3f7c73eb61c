import pytest

from snella_app.cli.parser import as_flags


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("skip them with --skip-corrupt (skip_corrupt=True)", "skip them with --skip-corrupt"),
        ("Without the Hub, use weights=PATH with a file", "Without the Hub, use --weights PATH with a file"),
        ("or pretrained=False for random weights", "or --pretrained false for random weights"),
        ("set skip_corrupt=True", "set --skip-corrupt"),
        ("x is damaged; train again with overwrite", "x is damaged; train again with --overwrite"),
        (
            "resume and overwrite are mutually exclusive, got both",
            "--resume and --overwrite are mutually exclusive, got both",
        ),
        ("seed must be 1; val_size must be 2", "--seed must be 1; --val-size must be 2"),
        ("set with val_fraction and test_fraction", "set with --val-fraction and --test-fraction"),
        ("out=a.csv exists", "--out a.csv exists"),
        ("run must be a folder; images must be there", "run must be a folder; images must be there"),
        ("the data must be there, as r=7", "the data must be there, as r=7"),
    ],
)
def test_hints_use_command_line_syntax(message, typed):
    assert as_flags(message) == typed


def test_options_of_other_commands_are_not_named():
    message = "data must contain the images of runs/photos; batch_size must be at least 1, got 0"
    assert as_flags(message, "explain") == message.replace("batch_size", "--batch-size")
    assert as_flags(message, "evaluate") == f"--{message}".replace("batch_size", "--batch-size")
