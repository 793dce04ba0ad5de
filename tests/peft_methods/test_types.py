"""A PEFT type of one's own stands in PEFT's list as its own do."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from peft import PeftType

from clpeft.tuners.types import new_peft_type


@pytest.fixture
def invented() -> Iterator[Any]:
    """A type that PEFT knows for as long as a test takes."""
    yield new_peft_type("INVENTED")
    type.__delattr__(PeftType, "INVENTED")
    PeftType._member_names_.remove("INVENTED")
    del PeftType._member_map_["INVENTED"], PeftType._value2member_map_["INVENTED"]


def test_it_is_found_as_a_member_is(invented: Any) -> None:
    known = PeftType.LORA
    for member, name in ((known, "LORA"), (invented, "INVENTED")):
        assert type(member) is PeftType
        assert member.name == member.value == name
        assert getattr(PeftType, name) is PeftType(name) is PeftType[name] is member
        assert name in list(PeftType)
        assert name in PeftType.__members__
        assert member in PeftType
        # a plain string finds it in PEFT's tables, and a config it is written to
        assert {member: 1}[name] == 1
        assert json.dumps({"peft_type": member}) == f'{{"peft_type": "{name}"}}'
        assert copy.deepcopy(member) is member
        assert pickle.loads(pickle.dumps(member)) is member
        assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert invented != known


def test_name_that_is_taken() -> None:
    count = len(PeftType)
    with pytest.raises(ValueError, match="PEFT has a method called LORA already"):
        new_peft_type("LORA")
    assert len(PeftType) == count
