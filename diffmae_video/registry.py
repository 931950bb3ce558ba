"""Named parts: what a setting may name, and where it comes from.

A part registers itself under its name where it is written::

    @maskers.register("stripes", ratio=0.5)
    def stripes(...): ...

Constants beside the name are facts about the part, which settings and messages need without it; they become its
attributes.

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
from typing import Annotated, Any, Generic, TypeVar

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

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Decorator: the function or class is the part of that name, and has these facts as attributes.

        Raises:
            ValueError: another part has the name.
        """

        def add(part: T) -> T:
            old = self._parts.get(name)
            if old is not None and getattr(old, "__qualname__", None) != getattr(part, "__qualname__", None):
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            for fact, value in facts.items():
                setattr(part, fact, value)
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """All names: of this package in the order of its source, then those of other packages, sorted."""
        built_in = [name for home in self.homes for name in _registered(home, self.variable)]
        others = {point.name for point in self._entry_points()} | self._parts.keys()
        return [*built_in, *sorted(others - set(built_in))]

    def check(self, name: str) -> str:
        """The name itself, if there is such a part.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        if name in self._parts or any(name in _registered(home, self.variable) for home in self.homes):
            return name  # without a look at every installed package
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
                if name in _registered(home, self.variable):
                    importlib.import_module(f"{_PACKAGE}.{home}")
        if name not in self._parts:
            point = next(point for point in self._entry_points() if point.name == name)
            self._parts.setdefault(name, point.load())
        return self._parts[name]

    def fact(self, name: str, fact: str, default: Any) -> Any:
        """What the part's decorator says, e.g. `ratio` of a masker; parts of this package are not imported for it.

        Raises:
            ValueError: there is no such part; the message lists the names.
        """
        self.check(name)
        if name not in self._parts:
            for home in self.homes:
                if name in (registered := _registered(home, self.variable)):
                    return registered[name].get(fact, default)
        return getattr(self.get(name), fact, default)

    def _entry_points(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=f"{_PACKAGE}.{self.variable}")


@functools.cache
def _registered(home: str, variable: str) -> dict[str, dict[str, Any]]:
    """Names and facts in the decorators `@VARIABLE.register("NAME", FACT=VALUE)` of a module of this package, read from
    its source."""
    source = resources.files(_PACKAGE).joinpath(f"{home.replace('.', '/')}.py")
    found = []
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
                    facts = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                    found.append((node.lineno, str(call.args[0].value), facts))
    return {name: facts for _, name, facts in sorted(found, key=lambda one: one[0])}


maskers: Registry[Callable] = Registry("masker", "maskers", ("masking",))
targets: Registry[Any] = Registry("target", "targets", ("diffusion.targets",))
objectives: Registry[Any] = Registry("objective", "objectives", ("models.objectives",))
samplers: Registry[Callable] = Registry("sampler", "samplers", ("diffusion.samplers",))
decoders: Registry[Any] = Registry("decoder", "decoders", ("models.decoder",))
tasks: Registry[Any] = Registry("task", "tasks", ("training.pretraining", "training.finetuning"))
layouts: Registry[Callable] = Registry("layout", "layouts", ("data.published", "data.layouts"))
teachers: Registry[Callable] = Registry("teacher", "teachers")
loggers: Registry[Callable] = Registry("logger", "loggers", ("training.loggers",))

MaskerName = Annotated[str, AfterValidator(maskers.check)]
TargetName = Annotated[str, AfterValidator(targets.check)]
ObjectiveName = Annotated[str, AfterValidator(objectives.check)]
SamplerName = Annotated[str, AfterValidator(samplers.check)]
DecoderName = Annotated[str, AfterValidator(decoders.check)]
TaskName = Annotated[str, AfterValidator(tasks.check)]
LoggerName = Annotated[str, AfterValidator(loggers.check)]
