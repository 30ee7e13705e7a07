"""A controller's name, where its database is not its own: kept in its data directory."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from hayflick_controller.store import sqlite
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from pathlib import Path


def keep(path: Path) -> str:
    """Return the name in the file at *path*, made when there is none.

    Raises:
        OSError: The file or its directory cannot be made safe, or holds no name.
    """
    sqlite.prepare_file(path)
    if not (name := path.read_text("ascii").strip()):
        name = secrets.token_hex(8)
        new = path.with_suffix(".new")
        sqlite.prepare_file(new)
        with new.open("w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    try:
        return wire.require_id("controller_id", name)
    except HayflickError as error:
        raise OSError(f"{path}: holds no name of a controller") from error
