"""Check the messages and tools of a chat request."""

from typing import Any

from .fields import check_tree, parse_json, wrong


def check_tools(tools: Any) -> None:
    """Refuse tools that are not functions with a name."""
    if not isinstance(tools, list):
        raise wrong("tools", "a list", tools)
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name": ...}}'
            raise wrong(f"tools[{i}]", f"an object such as {wanted}", tool)


def check_message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with one text as its content, and parsed arguments of tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(where, "an object with a role and a content", message)
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise wrong(
                    f"{where}.content[{i}]",
                    '{"type": "text", "text": ...}: images and other files are not read',
                    part,
                )
        content = "".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise wrong(f"{where}.content", "a text or a list of parts", content)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise wrong(f"{where}.tool_calls", "a list", calls)
    checked = message | {"content": content or ""}
    if calls is not None:
        checked["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return checked


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, 'an object with {"function": {"name": ..., "arguments": ...}}', call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = parse_json(arguments, f"{where}.function.arguments", "messages")
        check_tree({"messages": arguments})
    if arguments not in (None, "") and not isinstance(arguments, dict):
        raise wrong(f"{where}.function.arguments", "a JSON object", arguments)
    return call | {"function": function | {"arguments": arguments or {}}}
