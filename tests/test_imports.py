"""How the modules of the package import each other."""

from __future__ import annotations

import ast
import pathlib

import cimjax

PACKAGE = pathlib.Path(cimjax.__file__).parent


def name_of(file: pathlib.Path) -> str:
    """What a file is called where it is imported."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """What stands below `if TYPE_CHECKING:`, which is never executed, as the public names in `cimjax` themselves."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def imported_by(file: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, inside its functions as well."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in set(ast.walk(tree)) - only_for_types(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: {ast.unparse(node)}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {str(node.module) for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_no_modules_import_each_other_in_a_circle_not_even_inside_functions() -> None:
    """Without exceptions: a circle hides in a function only until somebody moves its import to the top."""
    left = {name: imported_by(file) for name, file in MODULES.items()}
    assert sum(map(len, left.values())) > 500
    while done := {name for name, imports in left.items() if not imports & set(left)}:
        left = {name: imports for name, imports in left.items() if name not in done}
    # What is left only leads to a circle, from outside: take that away too.
    while entries := {name for name in left if not any(name in imports for imports in left.values())}:
        left = {name: imports for name, imports in left.items() if name not in entries}
    assert not left, {name: sorted(imports & set(left)) for name, imports in left.items()}
