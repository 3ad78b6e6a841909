"""Read a YAML file that a person wrote, with errors that fit on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["read_text", "read_yaml"]

_MAX_BYTES = 16 * 1024**2


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        ConfigurationError: The file does not exist, cannot be read, or does not contain text.
    """
    try:
        if path.is_dir():
            raise ConfigurationError(f"{path} must be a file, got a folder.")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"{path} must be a file, but it does not exist.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"{path} must be a file that can be read, got: {reason}.") from None
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} must be a text file of at most {_MAX_BYTES // 1024**2} MiB, got more.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} must be a text file in UTF-8, got other bytes.") from None


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigurationError: The file cannot be read, is empty, is not YAML, or has a key twice in one mapping.
    """
    text = read_text(path)
    # importing YAML takes as long as all other imports of the command together
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                    if key_node.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                        )
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "a file that cannot be parsed"
        raise ConfigurationError(f"{path} must be YAML, got {where}{problem}.") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a date that does not exist
        raise ConfigurationError(f"{path} must be YAML, got {str(error) or type(error).__name__}.") from None
    if found is None:
        raise ConfigurationError(
            f"{path} must describe a cluster, but it is empty. See `lightning-hetero plan --help`."
        )
    return found
