"""Importing the package registers SNELLA in PEFT."""

from __future__ import annotations

import functools
import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import save_and_load

import snella
from snella.compat.registration import _KEY_FUNCTION, PEFT_TYPE, register


def test_importing_the_package_registers_the_tuner():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is snella.SnellaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is snella.SnellaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == "snella_"


def test_registering_twice_changes_nothing():
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(table) for table in tables]
    function = getattr(save_and_load, _KEY_FUNCTION)
    register()
    assert [dict(table) for table in tables] == before
    assert getattr(save_and_load, _KEY_FUNCTION) is function


def test_a_function_wrapped_by_another_library_is_still_wrapped(monkeypatch):
    plain = getattr(save_and_load, _KEY_FUNCTION).__wrapped__

    @functools.wraps(plain)
    def wrapped(*args):
        return plain(*args)

    monkeypatch.setattr(save_and_load, _KEY_FUNCTION, wrapped)
    register()
    assert getattr(save_and_load, _KEY_FUNCTION).__wrapped__ is wrapped


def test_peft_still_has_the_wrapped_key_function():
    # on failure, check which function maps parameter names in get_base_model_state_dict of this PEFT version
    assert getattr(save_and_load, _KEY_FUNCTION).__wrapped__.__module__ == save_and_load.__name__


def test_peft_has_no_snella_member_yet():
    # on failure, PEFT has added SNELLA: register under its member instead of the plain string
    assert PEFT_TYPE not in PeftType.__members__
    assert PEFT_TYPE not in {member.value for member in PeftType}


def test_importing_the_package_loads_no_heavy_libraries():
    heavy = ["timm", "diffusers", "matplotlib", "sklearn", "torchvision", "rich", "jsonargparse"]
    # ignore the imports of peft
    code = (
        "import sys, peft; before = set(sys.modules); import snella; "
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_transformers_callbacks_can_be_imported_after_the_package():
    code = "import snella; from transformers import TrainerCallback as T; assert issubclass(snella.SnellaCallback, T)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
