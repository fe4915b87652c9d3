"""Owns a small evaluator of Go templates: just the actions that the Modelfile uses, and an error for any other."""

import re

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)


def render(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """What Ollama renders, ``messages`` as its `collate` hands them over: the system text stands among them, too."""
    parts: list[str] = []
    end = 0
    for match in ACTION.finditer(template):
        text = template[end : match.start()]
        if parts and parts[-1] == "trim":
            parts.pop()
            text = text.lstrip(" \t\r\n")
        parts.append("text:" + (text.rstrip(" \t\r\n") if match[1] else text))
        parts.append("do:" + match[2].strip())
        if match[3]:
            parts.append("trim")
        end = match.end()
    parts.append("text:" + template[end:])
    nodes, rest = _parse(parts)
    assert rest == []
    variables: dict[str, bool] = {}
    root = {"System": system, "Messages": messages}
    return _run(nodes, root, root, variables)


def _parse(parts):
    """Nodes up to the ``end`` or ``else`` that closes this list, and what comes after it, that word first."""
    nodes = []
    while parts:
        kind, _, word = parts[0].partition(":")
        if kind == "do" and (word == "end" or word.startswith("else")):
            break
        if kind == "do" and word.startswith(("range ", "if ")):
            node, parts = _branch(word, parts[1:])
        else:
            node, parts = (kind, word), parts[1:]
        nodes.append(node)
    return nodes, parts


def _branch(word, parts):
    inner, (closing, *parts) = _parse(parts)
    otherwise = []
    if closing.startswith("do:else if "):  # as {{else}}{{if}}, with one {{end}} for both
        node, parts = _branch(closing.removeprefix("do:else "), parts)
        return (word, inner, [node]), parts
    if closing == "do:else":
        otherwise, (closing, *parts) = _parse(parts)
    assert closing == "do:end", closing
    return (word, inner, otherwise), parts


def _run(nodes, root, dot, variables):
    out = ""
    for node in nodes:
        if node[0] == "text":
            out += node[1]
        elif node[0] == "do":
            assigned = re.fullmatch(r"(\$\w+) :?= (true|false)", node[1])
            if assigned:
                variables[assigned[1]] = assigned[2] == "true"
            else:
                out += str(_value(node[1], root, dot, variables))
        elif node[0].startswith("range "):
            for item in _value(node[0].removeprefix("range "), root, dot, variables):
                out += _run(node[1], root, item, variables)
        else:
            holds = _value(node[0].removeprefix("if "), root, dot, variables)
            out += _run(node[1] if holds else node[2], root, dot, variables)
    return out


def _value(expression, root, dot, variables):
    equal = re.fullmatch(r'eq (\.\w+) "(\w+)"', expression)
    if equal:
        return _value(equal[1], root, dot, variables) == equal[2]
    field = re.fullmatch(r"(\$?)\.(\w+)", expression)
    if field:
        source = root if field[1] else dot
        return source[field[2]] if field[2] in source else source[field[2].lower()]
    assert expression in variables, f"an action that this evaluator does not know: {expression}"
    return variables[expression]
