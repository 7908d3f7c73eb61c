"""Importing the package is all that registering takes."""

from __future__ import annotations

import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import save_and_load

import snella
from snella.compat.registration import _KEY_FUNCTION, PEFT_TYPE, register


def test_peft_knows_the_tuner_once_the_package_is_imported():
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


def test_peft_still_names_base_parameters_by_one_function():
    # when this fails, look for what get_base_model_state_dict of this PEFT asks for a parameter's former name
    assert getattr(save_and_load, _KEY_FUNCTION).__wrapped__.__module__ == save_and_load.__name__


def test_peft_has_no_member_of_our_name_yet():
    # when this fails, PEFT has gained a SNELLA of its own: register under its member instead of the plain string
    assert PEFT_TYPE not in PeftType.__members__
    assert PEFT_TYPE not in {member.value for member in PeftType}


def test_importing_the_package_loads_none_of_the_heavy_libraries():
    heavy = ["timm", "diffusers", "matplotlib", "sklearn", "torchvision", "rich", "jsonargparse"]
    # peft brings what it brings
    code = (
        "import sys, peft; before = set(sys.modules); import snella; "
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(snella, name) is not None for name in snella.__all__)


def test_transformers_callbacks_can_be_imported_after_the_package():
    code = "import snella; from transformers import TrainerCallback as T; assert issubclass(snella.SnellaCallback, T)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
