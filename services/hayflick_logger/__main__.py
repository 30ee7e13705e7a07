"""Run the logger: ``python -m hayflick_logger --listen unix:///… --data-dir …``."""

from __future__ import annotations

import os

# Before grpc is imported: this process never forks, and its fork handlers cost.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import logging
import sys
from typing import TYPE_CHECKING

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick_logger.config import Config
from hayflick_logger.record import Record
from hayflick_logger.recorder import Recorder
from hayflick_logger.servicer import LoggerServicer
from hayflick_logger.tail import Growth
from hayflick_rpc import config as configuration
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.server import serve, set_up_logging

if TYPE_CHECKING:
    import grpc

NAME = "hayflick_logger"

log = logging.getLogger(NAME)


async def run(config: Config) -> None:
    """Serve the record in ``config.data_dir`` until told to stop.

    Raises:
        HayflickError: JOURNAL_CORRUPT.
        OSError: The directory or the socket is not to be had.
    """
    record = Record(config)
    growth = Growth(record.journal.next_index)
    recorder = Recorder(record, growth.reach)

    def register(server: grpc.aio.Server) -> list[str]:
        logger_pb2_grpc.add_LoggerServiceServicer_to_server(LoggerServicer(record, recorder, growth), server)
        return [logger_pb2.DESCRIPTOR.services_by_name["LoggerService"].full_name]

    async def end_tails() -> None:
        growth.end()  # senders may go on: their last words count

    async def close() -> None:
        await asyncio.to_thread(recorder.close)
        record.close()

    await serve(
        NAME,
        config.listen,
        register,
        on_drain=end_tails,
        on_stop=close,
        lifeline_fd=config.lifeline_fd,
        drain_seconds=config.drain_seconds,
    )


def main() -> int:
    """Run from the command line; return the exit status."""
    config = configuration.load(Config, prog=f"python -m {NAME}", env_prefix="HAYFLICK_LOGGER_")
    set_up_logging(NAME)
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
