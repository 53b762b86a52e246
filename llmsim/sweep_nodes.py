"""YAML as nodes, which know their lines: tables whose keys are given once, lists, values, and errors that say where."""

from __future__ import annotations

from typing import Any


class Nodes:
    """Reads nodes of one document; `lines`: whether it has lines that a person knows."""

    def __init__(self, source: str, text: str, *, lines: bool) -> None:
        self.source, self.text, self.lines = source, text, lines

    def fail(self, node: Any, message: str, *, name: bool = False) -> ValueError:
        """`name`: what is wrong is the key that the node stands under."""
        mark = None if node is None else getattr(node, "key_mark", node.start_mark) if name else node.start_mark
        where = f", line {mark.line + 1}" if self.lines and mark is not None else ""
        return ValueError(f"{self.source}{where}: {message}")

    def table(self, node: Any, what: str) -> dict[str, Any]:
        """Key -> node, none twice."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} is not a table: write NAME: VALUE lines below it")
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node)
            if not isinstance(key, str):
                raise self.fail(key_node, f"{what}: {key!r} is not a name: write it in quotes if it is meant as text")
            if key in found:
                raise self.fail(key_node, f"{what}: {key} is given twice: keep one")
            value_node.key_mark = key_node.start_mark
            found[key] = value_node
        return found

    def items(self, node: Any, what: str) -> list[Any]:
        import yaml

        if not isinstance(node, yaml.SequenceNode):
            raise self.fail(node, f"{what} is not a list: write [{_short(node)}, …]")
        if not node.value:
            raise self.fail(node, f"{what} is an empty list: give values, or leave it out")
        return list(node.value)

    def value(self, node: Any) -> Any:
        """Plain Python of a node; a table's keys once each."""
        import yaml

        if isinstance(node, yaml.MappingNode):
            return {name: self.value(one) for name, one in self.table(node, "a table").items()}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(one) for one in node.value]
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, f"{node.value!r}: {str(error).splitlines()[0]}") from None
        finally:
            loader.dispose()


def _short(node: Any) -> str:
    text = str(getattr(node, "value", "…"))
    return text if len(text) <= 30 and "Node(" not in text else "…"
