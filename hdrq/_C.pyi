# The bindings of csrc/module.cpp; hdrq/native is their only caller.
from typing import Any

def __getattr__(name: str) -> Any: ...
