"""Sites of any PyTorch module, by a map from site to module that its owner gives.

A module's output is kept, or with `module:input` what it reads; `*` is the layer's number on both
sides. Names that fit nothing are refused, with what there is.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Callable, Dict, List, Mapping

from .._errors import CaptureError

Keep = Callable[[str, Any], None]


class Hooks:
    """Shows `keep` the tensors of the modules that `names` maps sites to."""

    def __init__(self, model: Any, names: Mapping[str, str], keep: Keep) -> None:
        self.keep = keep
        self.handles: List[Any] = []
        self.sites: List[str] = []
        modules: Dict[str, Any] = dict(model.named_modules())
        for site, name in names.items():
            module_name, _, side = name.partition(":")
            if side not in ("", "input", "output"):
                raise CaptureError(f"names: `{name}` ends with `:{side}`; it is `:input` or `:output`")
            for found, module in fitting(site, module_name, modules).items():
                self.hook(module, found, side == "input")

    def hook(self, module: Any, site: str, reads: bool) -> None:
        self.sites.append(site)

        def before(_: Any, inputs: Any) -> None:
            if not inputs:
                raise CaptureError(f"the module of {site} reads nothing by position: take the output of the one before")
            self.keep(site, inputs[0])

        def after(_: Any, __: Any, output: Any) -> None:
            self.keep(site, output[0] if isinstance(output, (tuple, list)) else output)

        hook = module.register_forward_pre_hook(before) if reads else module.register_forward_hook(after)
        self.handles.append(hook)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def fitting(site: str, name: str, modules: Mapping[str, Any]) -> Dict[str, Any]:
    """Each site that a pattern makes, with its module."""
    if site.count("*") != name.count("*") or site.count("*") > 1:
        raise CaptureError(f"names: `{site}` and `{name}`: `*`, the layer's number, stands once in both or in none")
    if "*" not in name:
        if name in modules:
            return {site: modules[name]}
        found: Dict[str, Any] = {}
    else:
        pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
        matches = ((pattern.fullmatch(module), module) for module in modules)
        found = {site.replace("*", match[1]): modules[module] for match, module in matches if match}
    if not found:
        near = difflib.get_close_matches(name.replace("*", "0"), list(modules), 5, 0.4)
        there = near or [module for module in modules if module][:12]
        raise CaptureError(f"names: the model has no module `{name}` for {site}; it has {', '.join(there)}")
    return found
