"""Named parts: what a setting may name, and where it comes from.

A part registers itself under its name where it is written::

    @maskers.register("stripes")
    def stripes(...): ...

Another package adds one through an entry point of the group (`diffmae_video.maskers`), without a change here. Names are
known without importing a part: those of this package are read from the source, so that `--help` and errors in settings
stay quick.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from collections.abc import Callable
from importlib import metadata, resources
from typing import Annotated, Generic, TypeVar

from pydantic import AfterValidator

T = TypeVar("T")
_PACKAGE = "diffmae_video"


class Registry(Generic[T]):
    """Parts of one kind by name.

    Args:
        kind: what a part is called in messages, e.g. `masker`.
        variable: name of this registry in the modules that use `@variable.register(...)`; also the entry point group
            `diffmae_video.VARIABLE`.
        homes: modules of this package whose parts register on import, e.g. `diffusion.samplers`.
    """

    def __init__(self, kind: str, variable: str, homes: tuple[str, ...] = ()) -> None:
        self.kind, self.variable, self.homes = kind, variable, homes
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: the function or class is the part of that name.

        Raises:
            ValueError: another part has the name.
        """

        def add(part: T) -> T:
            old = self._parts.get(name)
            if old is not None and getattr(old, "__qualname__", None) != getattr(part, "__qualname__", None):
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """All names: of this package in the order of its source, then those of other packages, sorted."""
        built_in = [name for home in self.homes for name in _registered_names(home, self.variable)]
        others = {point.name for point in self._entry_points()} | self._parts.keys()
        return [*built_in, *sorted(others - set(built_in))]

    def check(self, name: str) -> str:
        """The name itself, if there is such a part.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        known = self.names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{name!r} is no {self.kind}{hint}; choose one of {', '.join(known)}")
        return name

    def get(self, name: str) -> T:
        """The part of that name, imported now if it was not before.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        if name in self._parts:
            return self._parts[name]
        self.check(name)
        if name not in self._parts:
            for home in self.homes:
                if name in _registered_names(home, self.variable):
                    importlib.import_module(f"{_PACKAGE}.{home}")
        if name not in self._parts:
            point = next(point for point in self._entry_points() if point.name == name)
            self._parts.setdefault(name, point.load())
        return self._parts[name]

    def _entry_points(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=f"{_PACKAGE}.{self.variable}")


@functools.cache
def _registered_names(home: str, variable: str) -> tuple[str, ...]:
    """Names in the decorators `@VARIABLE.register("NAME")` of a module of this package, without importing it."""
    source = resources.files(_PACKAGE).joinpath(f"{home.replace('.', '/')}.py")
    names = []
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for call in node.decorator_list:
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr == "register"
                    and isinstance(call.func.value, ast.Name)
                    and call.func.value.id == variable
                    and isinstance(call.args[0], ast.Constant)
                ):
                    names.append((node.lineno, str(call.args[0].value)))
    return tuple(name for _, name in sorted(names))


maskers: Registry[Callable] = Registry("masker", "maskers", ("masking",))
targets: Registry[type] = Registry("target", "targets", ("diffusion.targets",))
objectives: Registry[type] = Registry("objective", "objectives", ("models.objectives",))
samplers: Registry[Callable] = Registry("sampler", "samplers", ("diffusion.samplers",))
decoders: Registry[type] = Registry("decoder", "decoders", ("models.decoder",))
tasks: Registry[type] = Registry("task", "tasks", ("training.pretraining", "training.finetuning"))
layouts: Registry[Callable] = Registry("layout", "layouts", ("data.published", "data.layouts"))
teachers: Registry[Callable] = Registry("teacher", "teachers")

MaskerName = Annotated[str, AfterValidator(maskers.check)]
TargetName = Annotated[str, AfterValidator(targets.check)]
ObjectiveName = Annotated[str, AfterValidator(objectives.check)]
SamplerName = Annotated[str, AfterValidator(samplers.check)]
DecoderName = Annotated[str, AfterValidator(decoders.check)]
TaskName = Annotated[str, AfterValidator(tasks.check)]
