"""Functions that travel by value.

A callable is pickled here and unpickled only inside the sandbox. The sandbox
can import what is installed beside the interpreter, and nothing of the user's
own; so functions and classes of the user's own modules go along by value.
"""

from __future__ import annotations

import contextlib
import functools
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from replication.errors import NotPicklable, TooLarge

PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
MAX_TASK_BYTES = 16 * 1024 * 1024
MAX_PREDICATE_BYTES = 1024 * 1024

# Preloaded in every sandbox, wherever they lie.
_ALWAYS_THERE = ("replication", "hayflick", "cloudpickle")

# cloudpickle's list of modules to take by value belongs to the whole process.
_by_value_lock = threading.RLock()


def pickle_callable(function: object, field: str, max_bytes: int) -> bytes:
    """Return *function*, pickled by value.

    Args:
        function: What to pickle.
        field: What the caller calls it, for messages.
        max_bytes: How large the pickle may be, in bytes.

    Raises:
        NotPicklable: It is no callable, or holds something that cannot travel;
            the message names that.
        TooLarge: Its pickle has more than *max_bytes*.
    """
    if not callable(function):
        raise NotPicklable(f"{field}: must be a function, not {type(function).__name__}")
    with _own_modules_by_value():
        try:
            payload: bytes = cloudpickle.dumps(function)
        except Exception as error:
            culprit = _culprit(function)
            raise NotPicklable(
                f"{field}: {_name(function)} cannot travel to the sandbox{culprit}: {error}",
                details={"field": field},
            ) from error
    if len(payload) > max_bytes:
        raise TooLarge(
            f"{field}: {_name(function)} is {len(payload):,} bytes pickled, over {max_bytes:,}",
            details={"field": field, "limit_bytes": str(max_bytes)},
        )
    return payload


@contextlib.contextmanager
def _own_modules_by_value() -> Iterator[None]:
    """Have cloudpickle take the user's own modules by value, for as long as this lasts."""
    with _by_value_lock:
        registered = cloudpickle.list_registry_pickle_by_value()
        ours = [
            module
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and name not in registered and _is_users_own(name, module)
        ]
        try:
            for module in ours:
                cloudpickle.register_pickle_by_value(module)
            yield
        finally:
            for module in ours:
                with contextlib.suppress(ValueError):  # the user's own code unregistered it
                    cloudpickle.unregister_pickle_by_value(module)


def _is_users_own(name: str, module: ModuleType) -> bool:
    # cloudpickle looks modules up by their own name, and takes __main__ by value anyway.
    if name == "__main__" or module.__name__ != name or name.partition(".")[0] in _ALWAYS_THERE:
        return False
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return not _is_installed(file)
    # A namespace package has folders and no file; built-in modules have neither.
    return any(not _is_installed(folder) for folder in getattr(module, "__path__", ()))


@functools.lru_cache(maxsize=16_384)
def _is_installed(file: str) -> bool:
    """Return whether *file* lies where the sandbox can import it from.

    That is the standard library and the site-packages of this interpreter. A
    project installed as editable lies elsewhere, and is the user's own.
    """
    path = Path(file).absolute()
    candidates = (path, path.resolve())
    return any(candidate.is_relative_to(root) for candidate in candidates for root in _installed_roots())


@functools.cache
def _installed_roots() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.update(site.getsitepackages())
    return tuple({form for root in roots for form in (Path(root), Path(root).resolve())})


def _culprit(function: Any) -> str:  # noqa: ANN401 -- any callable
    """Return which variable of *function* cannot travel, as ", because of x", where one can be found."""
    for name, value in _variables(function):
        try:
            cloudpickle.dumps(value)
        except Exception:  # noqa: BLE001 -- whatever its own pickling raises
            return f", because of its variable {name!r} ({type(value).__name__})"
    return ""


def _variables(function: Any) -> Iterator[tuple[str, object]]:  # noqa: ANN401 -- any callable
    """Yield what *function* refers to: its closure, its globals, its bound parts and defaults."""
    if isinstance(function, functools.partial):
        yield "func", function.func
        yield from ((f"argument {position}", value) for position, value in enumerate(function.args))
        yield from function.keywords.items()
        return
    if (bound := getattr(function, "__self__", None)) is not None:
        yield "self", bound
    code = getattr(function, "__code__", None)
    if code is None:
        yield from vars(function).items() if hasattr(function, "__dict__") else ()
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents
    known = function.__globals__
    yield from ((name, known[name]) for name in code.co_names if name in known)
    yield from ((f"default {position}", value) for position, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()


def _name(function: object) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")
