"""What holds for every file format."""

import importlib
import pkgutil

import loraparam as lp
from loraparam.formats import FORMATS


def test_each_format_stands_under_the_name_that_its_module_has() -> None:
    assert {name: module.NAME for name, module in FORMATS.items()} == {name: name for name in FORMATS}


def test_no_format_is_left_out() -> None:
    names = [module.name for module in pkgutil.iter_modules(lp.formats.__path__, "loraparam.formats.")]
    found = [module for module in map(importlib.import_module, names) if hasattr(module, "NAME")]
    assert {module.__name__ for module in found} == {module.__name__ for module in FORMATS.values()}
