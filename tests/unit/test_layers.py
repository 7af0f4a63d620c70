"""The picture of the layers holds: an import points down, never up or in a circle, and is at the top of its file."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dedupfs

PACKAGE = Path(dedupfs.__file__).parent

# From the bottom to the top; a module may import what stands before it.
LAYERS = [
    # words
    "errors",
    "model",
    # pure
    "rules",
    "claims",
    "quiet",
    "config",
    "digest",
    "codec",
    "magic",
    "raw",
    "phash",
    "likeness",
    "difference",
    "authority",
    "png",
    # storage
    "backing",
    "readahead",
    "readme",
    "store",
    "reserve",
    "history",
    "blobs",
    "trash",
    "imagetables",
    "environment",
    "index",
    "decisions",
    # workers
    "sandbox",
    "describer",
    "workers",
    # engine
    "openfiles",
    "journal",
    "sharing",
    "matching",
    "settle",
    "asking",
    "duplicates",
    "gallery",
    "similar",
    "describing",
    "pictures",
    "watching",
    "imaging",
    "orphans",
    "fileio",
    "vfs",
    "reconcile",
    "scrub",
    "restore",
    "report",
    "health",
    "engine",
    "fsck",
    "gc",
    "leave",
    "survey",
    "lookalikes",
    "estimate",
    # edges
    "hardlinks",
    "kernelcache",
    "passthrough",
    "control",
    "notify",
    "metrics",
    "libfuse",
    "fusefs",
    "unmount",
    "mount",
    "page",
    "cli",
    "__main__",
]

# A library is the business of one module; another may take its place without the rest noticing.
OWNERS = {
    "lmdb": "environment",
    "prometheus_client": "metrics",
    "mfusepy": "libfuse",
    "xxhash": "digest",
    "PIL": "phash",
    "imagehash": "phash",
    "pillow_heif": "phash",
    "re2": "claims",
}

# Importing inside a function hides a circle, or is needed: (importer, imported) with the reason.
LATE = {
    ("mount", "metrics"),  # slow to load, and only who asks for metrics needs it
    ("claims", "re2"),  # large, and most commands and mounts do without
    ("cli.targets", "engine"),  # slow to load, and commands that ask a mount do without
    ("engine", "imaging"),  # loads numpy, which commands without a mount do without
    ("estimate", "lookalikes"),  # the same
    ("mount", "fusefs"),  # loads libfuse, which the other commands do without
    ("cli.output", "rich"),  # slow to load, and only a progress bar on a terminal needs it
    ("libfuse", "mfusepy"),  # takes the library it finds first, so that has to be chosen before
}


@dataclass(frozen=True)
class Import:
    importer: str  # dotted, below dedupfs: "cli.mount"
    imported: str  # the same, or the name of somebody else's top-level package
    ours: bool
    late: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a subpackage is called like its directory."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts:
            found[".".join(parts)] = path
    return found


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = ["dedupfs", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()

    def visit(node: ast.AST, *, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield made(alias.name, child.lineno, late=late)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = base + (child.module.split(".") if child.module else [])
                for alias in child.names:
                    # `from . import codec` names a module, `from .codec import encode` something in one
                    whole = ".".join([*base, alias.name])
                    yield made(
                        whole if whole.removeprefix("dedupfs.") in known else ".".join(base), child.lineno, late=late
                    )
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, late=late or inside)

    def made(target: str, line: int, *, late: bool) -> Import:
        if target == "dedupfs":
            return Import(name, "", ours=True, late=late, line=line)
        if target.startswith("dedupfs."):
            return Import(name, target.removeprefix("dedupfs."), ours=True, late=late, line=line)
        return Import(name, target.split(".")[0], ours=False, late=late, line=line)

    yield from visit(ast.parse(path.read_bytes()), late=False)


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    found = modules()
    return [each for name, path in found.items() for each in imports_of(name, path, set(found))]


def layer(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_its_layer() -> None:
    assert {layer(name) for name in modules()} <= set(LAYERS)


def test_imports_point_down(all_imports: list[Import]) -> None:
    height = {name: number for number, name in enumerate(LAYERS)}
    upwards = [
        str(each)
        for each in all_imports
        if each.ours
        and each.imported
        and layer(each.importer) != layer(each.imported)
        and height.get(layer(each.imported), -1) > height.get(layer(each.importer), -1)
    ]
    assert not upwards


def test_no_circles_within_a_layer(all_imports: list[Import]) -> None:
    below: dict[str, set[str]] = {}
    for each in all_imports:
        if each.ours and layer(each.importer) == layer(each.imported):
            below.setdefault(each.importer, set()).add(each.imported)

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle of imports: {' -> '.join([*trail, name])}"
        for lower in below.get(name, ()):
            follow(lower, (*trail, name))

    for name in below:
        follow(name, ())


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_importer(library: str, all_imports: list[Import]) -> None:
    owner = OWNERS[library]
    importers = {each.importer for each in all_imports if each.imported == library and not each.ours}
    assert importers == ({owner} if owner in modules() else set())


def test_imports_are_at_the_top(all_imports: list[Import]) -> None:
    hidden = [str(each) for each in all_imports if each.late and (each.importer, each.imported) not in LATE]
    assert not hidden


def test_own_imports_are_relative() -> None:
    """So that a copy under another name, or the tests' own package, is never mixed in."""
    absolute = [
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_bytes()))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "dedupfs")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "dedupfs" for alias in node.names))
        if name != "__main__"
    ]
    assert not absolute


def test_the_reader_of_imports_reads(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import os.path\n"
        "from . import errors, something\n"
        "from ..index import Index\n"
        "def later():\n"
        "    if True:\n"
        "        from dedupfs.mount import serve\n"
    )
    found = [
        (each.imported, each.ours, each.late) for each in imports_of("cli.sample", path, {"cli", "cli.errors", "index"})
    ]
    assert found == [
        ("os", False, False),
        ("cli.errors", True, False),
        ("cli", True, False),
        ("index", True, False),
        ("mount", True, True),
    ]
