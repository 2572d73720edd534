"""The functions of the installed standard library as conversations: signature and docstring in, body out."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from specjax.data.embedded.splitting import Conversation, Split, conversation, in_split

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "__pycache__"}
)
SIGNATURE_END = re.compile(r":\s*(#.*)?$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_conversations(
    split: Split,
    *,
    root: Path | None = None,
    max_prompt_chars: int = 600,
    max_body_chars: int = 240,
) -> list[Conversation]:
    """Return one conversation per function: the user gives signature and docstring, the assistant the body.

    Functions come in the sorted order of their files. Longer ones than the limits are left out, not cut, so every
    answer ends where the function does; so are bodies seen before.
    `root` defaults to the running interpreter's standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[str] = set()
    conversations = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            continue
        for prompt, body in _functions(path):
            if len(prompt) > max_prompt_chars or len(body) > max_body_chars or body in seen:
                continue
            seen.add(body)
            if in_split(prompt, split):
                conversations.append(conversation(prompt, body))
    return conversations


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (prompt, body) of a file's functions and methods; a file that is not valid Python 3 has none."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.split("\n")
    for class_name, function in _definitions(tree, None):
        parts = _parts(lines, function)
        if parts is None:
            continue
        prompt, body = parts
        yield (f"# class {class_name}\n{prompt}" if class_name else prompt), body


def _definitions(node: ast.AST, class_name: str | None) -> Iterator[tuple[str | None, Function]]:
    """Yield (class name, function) of everything defined outside of function bodies."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield class_name, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child, class_name)


def _parts(lines: list[str], function: Function) -> tuple[str, str] | None:
    """Return the dedented prompt (decorators, signature, docstring) and body, or None where there is no clean cut."""
    first = min(node.lineno for node in (function, *function.decorator_list)) - 1
    signature_nodes = [node for part in (function.args, function.returns) if part for node in ast.walk(part)]
    line = max([function.lineno, *(getattr(node, "end_lineno", 0) for node in signature_nodes)]) - 1
    while not SIGNATURE_END.search(lines[line]):
        line += 1
        if line >= function.body[0].lineno:
            return None
    cut = line + 1
    if ast.get_docstring(function, clean=False) is not None:
        cut = function.body[0].end_lineno or cut
    if cut >= (function.end_lineno or 0) or function.body[0].lineno <= line + 1:
        return None
    prompt = _dedented(lines[first:cut], function.col_offset)
    body = _dedented(lines[cut : function.end_lineno], function.body[0].col_offset)
    if prompt is None or body is None:
        return None
    return prompt, body


def _dedented(lines: list[str], indent: int) -> str | None:
    """Return the lines without their common indentation, or None if a line (of a string, say) has less."""
    if any(line.strip() and line[:indent].strip() for line in lines):
        return None
    return "\n".join(line[indent:].rstrip() for line in lines).strip("\n")
