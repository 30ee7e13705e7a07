"""For your tests: services of their own, real and gone afterwards.

::

    def test_my_agent_stays_in_its_contract():
        with embedded():
            controller = Controller(contract, secret="only-for-tests")
            ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from replication import _embedded

__all__ = ["Services", "embedded"]

Services = _embedded.Runtime
"""Running services: ``directory``, ``address(name)``, ``close()``."""


@contextlib.contextmanager
def embedded(allow_degraded: Sequence[str] | None = None) -> Iterator[Services]:
    """Start a fresh set of the three services; everything made meanwhile uses it.

    At the end the services, every worker and every file of theirs are gone, also
    when the block raises. The choice holds for the whole process, so do not use
    this from several threads at once.

    Args:
        allow_degraded: Layers of the sandbox to do without where this machine
            lacks them, by name; those of ``HAYFLICK_ALLOW_DEGRADED`` when not given.

    Yields:
        The running services.

    Raises:
        ServiceUnavailable: A service did not start; the message has what it said.
    """
    allowed = _embedded.allowed_by_environment() if allow_degraded is None else tuple(allow_degraded)
    with contextlib.closing(Services(allowed)) as services, _embedded.overridden(services):
        yield services
