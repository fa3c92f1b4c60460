"""The package as a user imports it: what comes with it, and that the README's examples run."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import cimjax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_every_public_name_can_be_had_and_nothing_else() -> None:
    for name in cimjax.__all__:
        assert getattr(cimjax, name) is not None
        assert name in dir(cimjax)
    with pytest.raises(AttributeError, match="module 'cimjax' has no attribute 'CIMCon'"):
        cimjax.CIMCon  # noqa: B018


def test_every_room_can_be_had_after_a_plain_import_and_dir_shows_nothing_else() -> None:
    folders = {path.parent.name for path in pathlib.Path(cimjax.__file__).parent.glob("*/__init__.py")}
    code = f"""
import cimjax
shown = set(dir(cimjax))
assert shown == {{*cimjax.__all__, *{sorted(folders)}, '__version__'}}, shown
assert cimjax.data.Dataset.from_arrays and cimjax.spec.CIMSpec is cimjax.CIMSpec
for name in {sorted(folders)}:
    assert getattr(cimjax, name).__name__ == 'cimjax.' + name
assert set(dir(cimjax)) == shown
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_and_its_layers_imports_only_jax_flax_and_numpy() -> None:
    """Everything else that is installed beside them must stay out."""
    others = "orbax optax chex hypothesis tensorflow_datasets grain ml_collections sklearn matplotlib tensorflow torch"
    code = f"""
import sys, jax, flax, numpy
before = set(sys.modules)
import cimjax
light = set(sys.modules) - before
assert light == {{'cimjax'}}, light
for name in ('CIMConv', 'calibrate', 'layer_cost'):
    getattr(cimjax, name)
loaded = [name for name in '{others}'.split() if name in sys.modules and name not in before]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_of_the_readme_print_what_it_says(tmp_path: pathlib.Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    expected = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert len(expected) >= 8
    result = subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == expected
