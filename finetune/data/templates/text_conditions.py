"""Which texts a jinja template places as they are, so that a placeholder may stand for them while it is rendered.

Read from the template's syntax. What only joins texts places any of them. What trims them, or asks whether they hold
a name such as ``</think>``, places those that have no blanks at their ends and no such name. Of a template that does
anything else with a text (upper case, a slice, its length), none is known to be placed: `TextConditions.is_opaque`.
Wrong in one direction only: a template may be taken for opaque that is not, and costs more time then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jinja2 import nodes

_TRIMMING = frozenset({"strip", "lstrip", "rstrip"})
_PARTING = frozenset({"split", "rsplit", "partition", "rpartition"})
_SEARCHING = frozenset(
    _PARTING
    | {"replace", "removeprefix", "removesuffix"}
    | {"startswith", "endswith", "count", "find", "rfind", "index", "rindex"}
)
_OF_OBJECTS = frozenset(
    {"items", "keys", "values", "get", "append", "update", "pop", "copy", "extend", "insert", "join"}
)
_PLACING_FILTERS = frozenset(
    {"default", "d", "string", "safe", "selectattr", "rejectattr", "map", "attr", "text_parts"}
)
_PLACING_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true"}
    | {"false", "integer", "float", "odd", "even", "divisibleby", "callable"}
)
_EQUALITY_TESTS = frozenset({"eq", "equalto", "==", "ne", "!=", "sameas"})
_FUNCTIONS = frozenset({"raise_exception", "namespace", "range", "strftime_now", "dict", "caller"})
# What these names hold is never the text of a message.
_OTHER_NAMES = frozenset(
    {"role", "name", "type", "function", "parameters", "properties", "arguments", "tool_calls", "tool_call"}
    | {"required", "enum", "id", "index", "index0", "revindex", "revindex0", "last", "first", "loop", "tools"}
    | {
        "tool",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "messages",
        "loop_messages",
        "enable_thinking",
    }
    | {"tool_call_id", "documents", "description"}
)
_MAX_ALIASES = 20
_VALUES_OF_TOOLS = frozenset(
    {"tool", "tools", "tool_call", "tool_calls", "function", "arguments", "parameters", "properties", "enum"}
    | {"required", "type", "name", "documents", "description"}
)


@dataclass
class TextConditions:
    """What must hold of a text that a template places as it is.

    Attributes:
        is_opaque: Nothing is known of any text.
        edges: Characters that must not stand at an end of the text.
        trims: Whether blanks must not stand there.
        parts: Texts that must not stand in it.
        wholes: Texts that it must not be.
    """

    is_opaque: bool = False
    trims: bool = False
    edges: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    wholes: set[str] = field(default_factory=set)

    def hold(self, text: str) -> bool:
        """Whether the template places a text as it is."""
        if self.is_opaque or not text or text.isspace() or text in self.wholes:
            return False
        ends = (text[0], text[-1])
        if self.trims and any(map(str.isspace, ends)):
            return False
        return self.edges.isdisjoint(ends) and not any(part in text for part in self.parts)


def find_conditions(tree: nodes.Template) -> TextConditions:
    """The conditions of a parsed template."""
    try:
        reader = _Reader(tree)
        reader.read(tree)
    except RecursionError:  # nested too deep to be read
        return TextConditions(is_opaque=True)
    return reader.found


class _Reader:
    def __init__(self, tree: nodes.Template):
        self.found = TextConditions()
        self._functions = _FUNCTIONS | {macro.name for macro in tree.find_all(nodes.Macro)}
        assigned = list(_assignments(tree))
        self._holds_text = {name: value is None for name, value in assigned}
        for _ in range(_MAX_ALIASES):
            texts = {name for name, value in assigned if value is None or self._is_text(value)}
            if all(self._holds_text[name] for name in texts):
                break
            self._holds_text |= dict.fromkeys(texts, True)
        else:
            self._holds_text = {}

    def read(self, tree: nodes.Template) -> None:
        """Gathers the conditions of all that a template does."""
        waiting: list[nodes.Node] = [tree]
        readers = {
            nodes.Filter: self._read_filter,
            nodes.Test: self._read_test,
            nodes.Call: self._read_call,
            nodes.Compare: self._read_compare,
            nodes.Getitem: self._read_item,
            nodes.For: self._read_loop,
            nodes.Mod: self._read_modulo,
        }
        while waiting:
            node = waiting.pop()
            read = readers.get(type(node))
            if read is not None:
                read(node)  # type: ignore[operator]
            waiting += node.iter_child_nodes()

    def _is_text(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be the text of a message or made of it; in doubt it is."""
        if isinstance(node, nodes.Const):
            return False
        if isinstance(node, nodes.Compare | nodes.Not | nodes.Test | nodes.List | nodes.Dict | nodes.Tuple):
            return False
        if isinstance(node, nodes.Sub | nodes.Div | nodes.FloorDiv | nodes.Neg | nodes.Pos):
            return False
        if isinstance(node, nodes.BinExpr):
            return self._is_text(node.left) or self._is_text(node.right)
        if isinstance(node, nodes.Filter):
            return node.name not in ("length", "count", "list", "selectattr", "rejectattr", "map", "items")
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_text(node.node)
        if isinstance(node, nodes.Name) and node.name not in _OTHER_NAMES:
            return self._holds_text.get(node.name, True)
        return _tail(node) not in _OTHER_NAMES

    def _read_filter(self, node: nodes.Filter) -> None:
        if node.name in _PLACING_FILTERS and not (node.name == "map" and node.args):
            return
        if node.name == "trim":
            self._note_trimming(node.args)
        elif node.name == "tojson":
            self.found.is_opaque |= _tail(node.node) not in _VALUES_OF_TOOLS
        elif node.name == "replace":
            self._note_search(node.args, node.node)
        elif node.name in ("list", "first", "last") and isinstance(node.node, nodes.Filter):
            return
        else:
            self.found.is_opaque |= self._is_text(node.node)

    def _read_test(self, node: nodes.Test) -> None:
        if node.name in _PLACING_TESTS:
            return
        if node.name in _EQUALITY_TESTS and node.args:
            self._note_equality(node.node, node.args[0])
        else:
            self.found.is_opaque |= self._is_text(node.node)

    def _read_call(self, node: nodes.Call) -> None:
        called = node.node
        if isinstance(called, nodes.Name):
            self.found.is_opaque |= called.name not in self._functions
            return
        if not isinstance(called, nodes.Getattr):
            self.found.is_opaque = True
            return
        is_joined = called.attr == "join" and isinstance(called.node, nodes.Const)
        if called.attr in _OF_OBJECTS and (called.attr != "join" or is_joined):
            return
        if not self._is_text(called.node) and not isinstance(called.node, nodes.Const):
            return
        if called.attr in _TRIMMING:
            self._note_trimming(node.args)
        elif called.attr in _SEARCHING:
            self._note_search(node.args, called.node)
        else:
            self.found.is_opaque = True

    def _read_compare(self, node: nodes.Compare) -> None:
        left = node.expr
        for operand in node.ops:
            right = operand.expr
            if operand.op in ("eq", "ne"):
                self._note_equality(left, right)
            elif operand.op in ("in", "notin"):
                self._note_membership(left, right)
            else:  # of an order
                self.found.is_opaque |= self._is_text(left) and self._is_text(right)
            left = right

    def _read_item(self, node: nodes.Getitem) -> None:
        names_key = isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
        called = node.node.node if isinstance(node.node, nodes.Call) else None
        # Of a text that is not parted there is one part, and a placeholder has the same.
        is_part = isinstance(called, nodes.Getattr) and called.attr in _PARTING
        if not (names_key or is_part):
            self.found.is_opaque |= self._is_text(node.node)

    def _read_loop(self, node: nodes.For) -> None:
        is_call = isinstance(node.iter, nodes.Call)  # items() of an object, range()
        self.found.is_opaque |= not is_call and self._is_text(node.iter)

    def _read_modulo(self, node: nodes.Mod) -> None:
        is_number = isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
        self.found.is_opaque |= not is_number

    def _note_trimming(self, arguments: list[nodes.Expr]) -> None:
        if not arguments:
            self.found.trims = True
        elif (characters := _text_of(arguments[0])) is not None:
            self.found.edges |= set(characters)
        else:
            self.found.is_opaque = True

    def _note_search(self, arguments: list[nodes.Expr], searched: nodes.Node | None) -> None:
        if searched is not None and not self._is_text(searched):
            return
        sought = _text_of(arguments[0]) if arguments else None
        if sought:
            self.found.parts.add(sought)
        else:
            self.found.is_opaque = True

    def _note_equality(self, left: nodes.Node, right: nodes.Node) -> None:
        for text, other in ((left, right), (right, left)):
            if self._is_text(text):
                if (whole := _text_of(other)) is not None:
                    self.found.wholes.add(whole)
                else:
                    self.found.is_opaque |= self._is_text(other)

    def _note_membership(self, left: nodes.Node, right: nodes.Node) -> None:
        if (part := _text_of(left)) is not None:
            if self._is_text(right):
                self.found.parts.add(part)
        elif self._is_text(left):
            items = right.items if isinstance(right, nodes.List | nodes.Tuple) else None
            texts = [_text_of(item) for item in items or ()]
            if items is None or None in texts:
                self.found.is_opaque = True
            self.found.wholes |= {text for text in texts if text}


def _assignments(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node | None]]:
    """Names with what they are set to; None where that is not one expression."""
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name):
            yield assigned.target.name, assigned.node
        else:
            yield from ((name.name, None) for name in assigned.target.find_all(nodes.Name))
    for block in tree.find_all(nodes.AssignBlock):
        if isinstance(block.target, nodes.Name):
            yield block.target.name, None
    for macro in tree.find_all(nodes.Macro):
        yield from ((argument.name, None) for argument in macro.args)
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name):
            # An item of what is no text may be one, unless it is an object, as messages and tools are.
            is_object = _tail(loop.iter) in _OTHER_NAMES
            yield loop.target.name, nodes.Const(0) if is_object else None
        else:
            yield from ((name.name, None) for name in loop.target.find_all(nodes.Name))


def _tail(node: nodes.Node | None) -> str:
    """The last name of an expression such as ``message['tool_calls'][0]``; "" where there is none."""
    while node is not None:
        if isinstance(node, nodes.Name):
            return node.name
        if isinstance(node, nodes.Getattr):
            return node.attr
        if not isinstance(node, nodes.Getitem):
            return ""
        if (name := _text_of(node.arg)) is not None:
            return name
        node = node.node
    return ""


def _text_of(node: nodes.Node | None) -> str | None:
    """The text of a constant."""
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None
