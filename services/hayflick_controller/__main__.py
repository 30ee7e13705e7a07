"""Run the controller: ``python -m hayflick_controller --listen unix:///… --data-dir … --logger unix:///…``."""

from __future__ import annotations

import os

# Before grpc is imported: this process never forks, and its fork handlers cost.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import gc
import logging
import sys
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2, controller_pb2_grpc
from hayflick_controller.config import Config
from hayflick_controller.controller import Controller
from hayflick_controller.servicer import ControllerServicer
from hayflick_rpc import config as configuration
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.server import serve, set_up_logging

if TYPE_CHECKING:
    import grpc

NAME = "hayflick_controller"

log = logging.getLogger(NAME)


async def run(config: Config) -> None:
    """Serve until told to stop.

    Raises:
        HayflickError: The database cannot be opened.
        OSError: The data directory or the socket is not to be had.
    """
    controller = await Controller.start(config)
    # What was imported and opened lives as long as the process: looking for
    # garbage in it, some hundred times a minute under load, only costs.
    gc.collect()
    gc.freeze()

    def register(server: grpc.aio.Server) -> list[str]:
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(controller), server)
        return [controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name]

    await serve(
        NAME,
        config.listen,
        register,
        on_drain=controller.drain,
        on_stop=controller.close,
        lifeline_fd=config.lifeline_fd,
        drain_seconds=config.drain_seconds,
    )


def main() -> int:
    """Run from the command line; return the exit status."""
    config = configuration.load(Config, prog=f"python -m {NAME}", env_prefix="HAYFLICK_CONTROLLER_")
    set_up_logging(NAME)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        asyncio.run(run(config))
    except HayflickError as error:
        log.error("%s: %s %s", error.reason_name, error.message, error.metadata)  # noqa: TRY400
        return 1
    except (OSError, ValueError) as error:
        log.error("%s", error)  # noqa: TRY400 -- the text says it all
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
