"""The table of mutations is true: each line stands in its module, breaking it leaves Python, and its tests exist."""

import ast

import pytest

from .mutations import MUTATIONS, REPOSITORY, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[each.name for each in MUTATIONS])
def test_it_applies(mutation: Mutation) -> None:
    source = (REPOSITORY / mutation.path).read_text()
    broken = mutation.apply(source)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source)), "nothing is broken"
    named = [test for test in mutation.tests if test.startswith("tests/")]
    assert named
    for test in named:
        path, _, function = test.partition("::")
        assert function in {"", *_functions(path)}, f"there is no test {test}"


def _functions(path: str) -> set[str]:
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_names_are_unique() -> None:
    assert len({each.name for each in MUTATIONS}) == len(MUTATIONS)


def test_a_line_that_moved_on_is_noticed() -> None:
    mutation = MUTATIONS[0]
    source = (REPOSITORY / mutation.path).read_text()
    for changed in (source.replace(mutation.line, "pass"), source + mutation.line):
        with pytest.raises(ValueError, match="times in dedupfs"):
            mutation.apply(changed)
