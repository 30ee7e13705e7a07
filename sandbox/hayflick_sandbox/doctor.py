"""The whole examination: every layer, and one real sandbox on top of those that there are."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable

from hayflick_sandbox import grades, outside, refusals, selfprobe
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.environment import Facts
from hayflick_sandbox.identities import IdentitiesExhausted, UidRange, claim_range
from hayflick_sandbox.layer import Layer
from hayflick_sandbox.probe import INDISPENSABLE, probe
from hayflick_sandbox.session import SandboxFailed, Session
from hayflick_sandbox.zygote_client import Zygote, ZygoteDied

# Which step of the trial of namespaces has the same reasons to fail.
_LIKE = {
    "fork": "unshare",
    "FreshRoot": "mount",
    "PrivateDirectory": "mount",
    "ShowReadOnly": "mount",
    "EnterRoot": "mount",
    "ForbidUserNamespaces": "proc",
    "FreshProc": "proc",
}


def examine() -> tuple[Layer, ...]:
    """Return every layer of this machine, with a real launch as the last.

    Call it from a single-threaded process. Nothing of it is left.
    """
    facts = Facts.read()
    tree = Tree.create(f"probe-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        layers = probe(tree, facts)
        lacking = [layer.name for layer in layers if not layer.enforced and layer.name in INDISPENSABLE]
        if lacking:
            launch = Layer(
                "launch", False, f"not tried, for want of {lacking[0]}", "mend what is above first"
            )
        else:
            launch = _launch(tree, layers, facts)
    finally:
        tree.close()
    return (*layers, launch)


def _launch(tree: Tree, layers: tuple[Layer, ...], facts: Facts) -> Layer:
    missing = [layer.name for layer in layers if not layer.enforced]
    try:
        uids = claim_range(subordinate="uid-range" not in missing)
    except (OSError, IdentitiesExhausted) as error:
        return Layer("launch", False, f"no host uids: {error}", "end another orchestrator, or free the lock")
    try:
        zygote = Zygote.start(tree=tree, uids=uids, degraded=missing, preload=())
        try:
            return try_launch(zygote, tree, uids, layers=layers, facts=facts)
        finally:
            zygote.close()
            zygote.wait_closed()
    except ZygoteDied as error:
        return Layer(
            "launch", False, str(error), "mend what it names; run it as the user that it shall run as"
        )
    finally:
        uids.close()


def try_launch(
    zygote: Zygote, tree: Tree, uids: UidRange, *, layers: tuple[Layer, ...], facts: Facts | None = None
) -> Layer:
    """Return the layer "launch": whether a real sandbox can be built, by building one.

    Nobody else may be reading the zygote's events meanwhile.
    """
    try:
        Session(tree, uids, zygote, layers).try_launch()
    except (SandboxFailed, OSError) as error:
        return judge_launch(error, facts or Facts.read())
    return Layer("launch", True, "a sandbox was built and ended")


def judge_launch(error: SandboxFailed | OSError, facts: Facts) -> Layer:
    """Return the layer "launch" for a sandbox that could not be built."""
    step = error.step if isinstance(error, SandboxFailed) else "cgroup"
    number = error.errno or 0
    detail = f"a sandbox could not be built: {error}"
    if (tried := _LIKE.get(step)) and number in (errno.EPERM, errno.EACCES, errno.ENOSPC):
        why, remedy = refusals.explain(refusals.Outcome(tried, number), facts)
        return Layer("launch", False, f"{detail} ({why})", remedy)
    return Layer(
        "launch",
        False,
        detail,
        "the step named refuses what the layers above allow; a security policy of the host may be why",
    )


def grade(layers: Iterable[Layer]) -> tuple[str, list[str]]:
    """Return the best isolation grade that *layers* allow, "" for none, and what the next one lacks.

    A worker's own grade is measured, inside it and outside.
    """
    missing = {layer.name for layer in layers if not layer.enforced}
    reached = grades.best(missing)
    if reached == grades.GRADES[-1]:
        return reached, []
    following = grades.GRADES[grades.GRADES.index(reached) + 1] if reached else grades.GRADES[0]
    checks: tuple[grades.Criterion, ...] = (*selfprobe.CHECKS, *outside.CHECKS)
    wanted = {check.layer for check in checks if check.grade == following}
    if not reached:
        wanted |= INDISPENSABLE
    return reached, sorted(wanted & missing)
