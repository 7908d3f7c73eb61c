"""Makes PEFT know the tuner: the only lines of the project that touch PEFT's tables.

PEFT's own `register_peft_method` refuses names outside of its enumeration, so the tables get the string `"SNELLA"`,
which they look up all the same. A test tells when PEFT gains a member of that name.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from snella.tuner import SnellaConfig, SnellaModel
from snella.tuner.config import PEFT_TYPE


def register() -> None:
    """Enter the tuner into PEFT's tables; doing it twice changes nothing."""
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SnellaConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SnellaModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SnellaModel.prefix),
    )
    for table, value in tables:
        table[PEFT_TYPE] = value


register()
