"""``--plugin-option PLUGIN.NAME[=VALUE]``: given as text, sorted by plugin once it is known which plugins there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpurestore.errors import PluginOptionError


def sort_options(options: Sequence[str], plugins: Collection[str]) -> dict[str, dict[str, str | None]]:
    """The options of each plugin; without a value: None. Raises PluginOptionError for one that nobody would get."""
    sorted_options: dict[str, dict[str, str | None]] = {}
    for option in options:
        head, equals, value = option.partition("=")
        # A plugin's name may hold dots: the longest that fits is meant.
        owner = max((name for name in plugins if head.startswith(f"{name}.")), key=len, default=None)
        if owner is None:
            raise PluginOptionError(_why_not(option, head, plugins))
        name = head[len(owner) + 1 :]
        if not name:
            raise PluginOptionError(f"--plugin-option {option}: PLUGIN.NAME[=VALUE] is expected, NAME is empty")
        sorted_options.setdefault(owner, {})[name] = value if equals else None
    return sorted_options


def _why_not(option: str, head: str, plugins: Collection[str]) -> str:
    plugin, dot, _ = head.partition(".")
    if not dot or not plugin:
        return f"--plugin-option {option}: PLUGIN.NAME[=VALUE] is expected"
    there = ", ".join(sorted(plugins)) or "none"
    return f"--plugin-option {option}: there is no plugin {plugin}; loaded: {there} (see gpurestore plugins)"
