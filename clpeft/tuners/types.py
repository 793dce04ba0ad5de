"""New members of `peft.PeftType`: PEFT knows its methods by an Enum."""

from __future__ import annotations

from peft import PeftType


def new_peft_type(name: str) -> PeftType:
    """Adds a method to `peft.PeftType`, so that `peft.utils.register_peft_method` takes it.

    An Enum is closed by its definition and PEFT has no other way in; what is written here is what
    Python's own EnumType keeps of a member.

    Args:
        name: In capital letters; also what adapter_config.json says.

    Returns:
        The member, to be given as a config's `peft_type`.

    Raises:
        ValueError: If PEFT has a method of that name.
    """
    if name in PeftType.__members__:
        raise ValueError(f"PEFT has a method called {name} already; choose another name.")
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
