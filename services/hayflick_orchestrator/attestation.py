"""What a node says of a sandbox that it has checked: the findings, the grade, its signature.

The key is made when the orchestrator starts and never leaves its memory: what it signed
was found by this process, and nobody can sign for it afterwards. Its public half is in
the controller's record of every connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import Attestation
from hayflick_rpc import attestation, wire
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox import grades, landlock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from hayflick_sandbox.grades import Verdict
    from hayflick_sandbox.messages import Finding

LEAST_GRADE = "C"
"""Below it there is no sandbox, and nothing runs, whatever a contract says."""


@dataclass(frozen=True, slots=True)
class Attested:
    """What was found of one sandbox, signed and not."""

    message: Attestation
    verdict: Verdict


class Attestor:
    """This node's word.

    Args:
        seccomp_sha256: Of the system call filters, by whether AF_INET is licensed.
    """

    def __init__(self, seccomp_sha256: Mapping[bool, str]) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._seccomp_sha256 = dict(seccomp_sha256)
        self._kernel_release = os.uname().release
        self._landlock_abi = landlock.abi()
        self._criteria = grades.criteria(self._landlock_abi)

    @property
    def public_key(self) -> bytes:
        """What verifies its attestations: 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def attest(self, worker_id: str, findings: Sequence[Finding], now: datetime, *, inet: bool) -> Attested:
        """Return what *findings* amount to, signed.

        Raises:
            ValueError: a finding is of no check that this node asks.
        """
        verdict = grades.judge(self._criteria, findings)
        message = Attestation(
            grade=attestation.grade_of(verdict.grade),
            kernel_release=self._kernel_release,
            landlock_abi=self._landlock_abi,
            seccomp_sha256=self._seccomp_sha256[inet],
            attest_time=wire.timestamp(now),
        )
        for finding in findings:
            message.probes.add(name=finding.name, held=finding.held, seen=finding.seen)
        attestation.sign(message, worker_id, self._key)
        return Attested(message, verdict)

    def require(self, findings: Sequence[Finding], floor: str = "") -> None:
        """Return when *findings* hold at least *floor*, and in any case the least there is.

        Raises:
            HayflickError: ISOLATION_INSUFFICIENT.
            ValueError: a finding is of no check that this node asks.
        """
        require(grades.judge(self._criteria, findings), floor)


def require(verdict: Verdict, floor: str = "") -> None:
    """Return when *verdict* is at least *floor*, and in any case :data:`LEAST_GRADE`.

    Raises:
        HayflickError: ISOLATION_INSUFFICIENT, naming the first check that cost it.
    """
    floor = floor or LEAST_GRADE
    finding = verdict.short_of(floor)
    if finding is None:
        return
    raise HayflickError(
        ErrorReason.ERROR_REASON_ISOLATION_INSUFFICIENT,
        f"the sandbox was measured to hold grade {verdict.grade or 'none'}, and {floor} is needed: "
        f"{finding.name} does not hold ({finding.seen})",
        metadata={"grade": verdict.grade, "min_grade": floor, "probe": finding.name},
    )
