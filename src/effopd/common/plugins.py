"""Plugins: modules of other packages that register strategies and tasks before a command starts.

A package declares its modules as entry points:

    [project.entry-points."effopd.plugins"]
    step_back = "my_package.step_back"

Every process of `effopd` imports them, also the runs that `effopd compare` starts.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points

from effopd.errors import PluginError

#: Group of entry points whose modules are imported.
GROUP = "effopd.plugins"


def plugins() -> list[EntryPoint]:
    """Plugins of the installed packages, sorted by name. Nothing is imported."""
    return sorted(entry_points(group=GROUP), key=lambda plugin: (plugin.name, plugin.value))


def load_plugins() -> None:
    """Import every plugin.

    Raises:
        PluginError: a plugin cannot be imported.
    """
    for plugin in plugins():
        load_plugin(plugin)


def load_plugin(plugin: EntryPoint) -> None:
    """Import a plugin's module.

    Raises:
        PluginError: the value of the entry point is not the name of a module, or its import fails.
    """
    package = package_of(plugin)
    if plugin.attr:
        raise PluginError(
            f"plugin {plugin.name!r} of {package}: expected the name of a module, got {plugin.value!r}. Write "
            f'{plugin.name} = "{plugin.module}" in [project.entry-points."{GROUP}"], and install the package again.'
        )
    try:
        importlib.import_module(plugin.module)
    except Exception as error:  # other people's code can raise anything; the cause is chained
        raise PluginError(
            f"plugin {plugin.name!r} of {package}: the import of {plugin.module} failed: {type(error).__name__}: "
            f'{error}. To reproduce the error: python -c "import {plugin.module}". To run without the plugin, '
            f"uninstall {package.partition(' ')[0]}."
        ) from error


def package_of(plugin: EntryPoint) -> str:
    """Name and version of the package that declares a plugin."""
    return "an unknown package" if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"


def plugin_packages() -> dict[str, str]:
    """Package → version, of all packages with plugins."""
    return {plugin.dist.name: plugin.dist.version for plugin in plugins() if plugin.dist is not None}
