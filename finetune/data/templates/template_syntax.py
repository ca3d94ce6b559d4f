"""Which jinja texts cannot take more time or memory than their length times that of what goes in."""

from __future__ import annotations

from jinja2 import nodes

_MAX_DEPTH = 50
# Without assignments and loops every text that is built is the sum of its parts.
_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Operand)
_EXPRESSIONS = (
    nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Tuple, nodes.CondExpr,
    nodes.Compare, nodes.Not, nodes.And, nodes.Or, nodes.Concat, nodes.Add, nodes.Sub,
    nodes.Neg,
)  # fmt: skip
_FILTERS = {
    "trim", "upper", "lower", "capitalize", "title", "default", "d", "string", "safe", "length", "count", "first",
    "last",
}  # fmt: skip
_TESTS = {
    "defined", "undefined", "none", "string", "boolean", "true", "false", "number", "odd", "even", "eq", "equalto",
    "ne", "in",
}  # fmt: skip
_METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith", "upper", "lower", "capitalize", "title"}
_FUNCTIONS = {"raise_exception"}


_CHOOSING = frozenset({"selectattr", "rejectattr"})
_TESTS_OF_KIND = frozenset({"string", "iterable", "sequence", "mapping"})


def is_linear(tree: nodes.Template) -> bool:
    """Whether a parsed template uses nothing but what is known to be cheap."""
    waiting: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _MAX_DEPTH or not _is_cheap(node):
            return False
        waiting += [(child, depth + 1) for child in node.iter_child_nodes()]
    return True


def _is_cheap(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, nodes.Call):
        called = node.node
        is_method = isinstance(called, nodes.Getattr) and called.attr in _METHODS
        return is_method or (isinstance(called, nodes.Name) and called.name in _FUNCTIONS)
    return type(node) in _STATEMENTS or type(node) in _EXPRESSIONS


def takes_parts(tree: nodes.Template) -> bool:
    """Whether a chat template takes what messages say as a list of parts alone, as those of multimodal models may.

    It walks through the parts of a message, and nowhere asks whether there is a text instead.
    """
    walks = any(_is_content(each.iter) for each in tree.find_all(nodes.For))
    chooses = any(each.name in _CHOOSING and _is_content(each.node) for each in tree.find_all(nodes.Filter))
    asks = any(each.name in _TESTS_OF_KIND for each in tree.find_all(nodes.Test))
    return (walks or chooses) and not asks


def _is_content(node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if not isinstance(node, nodes.Getitem) or not isinstance(node.arg, nodes.Const):
        return False
    return bool(node.arg.value == "content")
