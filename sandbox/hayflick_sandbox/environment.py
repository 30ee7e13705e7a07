"""What surrounds us, as text that was read once: the facts from which messages are chosen.

Nothing here decides whether a layer is enforced; that is tried. What was tried
and failed is explained from these facts, so that each environment is told what
mends it there.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

FILES = (
    "/proc/1/cgroup",
    "/proc/cgroups",
    "/proc/self/gid_map",
    "/proc/self/mountinfo",
    "/proc/self/status",
    "/proc/self/uid_map",
    "/proc/swaps",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/proc/sys/kernel/seccomp/actions_avail",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/version",
    "/run/systemd/container",
    *(
        f"/proc/sys/user/max_{kind}_namespaces"
        for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
    ),
)
MARKS = (
    "/.dockerenv",
    "/run/.containerenv",
    "/run/systemd/system",
    "/var/run/secrets/kubernetes.io",
)
# Inode numbers of the namespaces that the machine boots with (linux/proc_ns.h).
INITIAL = {"pid": 0xEFFFFFFC, "uts": 0xEFFFFFFE, "ipc": 0xEFFFFFFF, "cgroup": 0xEFFFFFFB}
VARIABLES = ("KUBERNETES_SERVICE_HOST", "container")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read; a file that is not there is not in *texts*.

    Attributes:
        euid: Whose effective uid we have.
        release: The kernel's release, as uname(2) has it.
        texts: The contents of each of FILES.
        marks: Those of MARKS that exist.
        variables: Those of VARIABLES that are set.
        initial: Those of INITIAL that we are in.
    """

    euid: int
    release: str
    texts: Mapping[str, str] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)
    initial: frozenset[str] = frozenset()

    @classmethod
    def read(cls) -> Facts:
        """Read them."""
        texts = {path: text for path in FILES if (text := _text(path)) is not None}
        return cls(
            os.geteuid(),
            platform.release(),
            texts,
            frozenset(path for path in MARKS if os.path.exists(path)),
            {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
            frozenset(kind for kind, inode in INITIAL.items() if _inode(f"/proc/self/ns/{kind}") == inode),
        )

    def text(self, path: str) -> str:
        """Return the text of *path*, or nothing where it is not there."""
        return self.texts.get(path, "")

    def status(self, field_: str) -> str:
        """Return a field of ``/proc/self/status``."""
        for line in self.text("/proc/self/status").splitlines():
            name, _, value = line.partition(":")
            if name == field_:
                return value.strip()
        return ""

    def sysctl(self, name: str) -> str:
        """Return the value of a kernel parameter, or nothing where it is not there."""
        return self.text(f"/proc/sys/{name.replace('.', '/')}").strip()

    @property
    def may_administer(self) -> bool:
        """Whether we have CAP_SYS_ADMIN, number 21 of capabilities(7), over our user namespace."""
        return bool(int(self.status("CapEff") or "0", 16) >> 21 & 1)

    @property
    def root(self) -> bool:
        """Whether we are root, be it only in a user namespace."""
        return self.euid == 0

    @property
    def systemd(self) -> bool:
        """Whether systemd runs this machine (sd_booted(3))."""
        return "/run/systemd/system" in self.marks

    @property
    def container(self) -> str:
        """What kind of container this looks like, by several hints; "" for none.

        It chooses words and nothing else, so a wrong guess does no harm. A
        machine made from a container's image bears that container's marks; one
        whose namespaces are all those of its boot is none.
        """
        if self.initial == INITIAL.keys():
            return ""
        if "KUBERNETES_SERVICE_HOST" in self.variables or "/var/run/secrets/kubernetes.io" in self.marks:
            return "kubernetes"
        if "/run/.containerenv" in self.marks:
            return "podman"
        if "/.dockerenv" in self.marks:
            return "docker"
        if named := self.text("/run/systemd/container").strip() or self.variables.get("container", ""):
            return {"oci": "container"}.get(named, named)
        first = self.text("/proc/1/cgroup")
        hints = {"kubepods": "kubernetes", "libpod": "podman", "docker": "docker", "lxc": "lxc"}
        # An overlay as the root of everything is how most engines lay a container out.
        overlay = _filesystem(self.text("/proc/self/mountinfo"), "/") == "overlay"
        return next((name for hint, name in hints.items() if hint in first), "container" if overlay else "")

    @property
    def gvisor(self) -> bool:
        """Whether the "kernel" is gVisor, which has had this one build date from the start."""
        return "Sun Jan 10 15:06:54 PST 2016" in self.text("/proc/version")

    @property
    def wsl(self) -> int:
        """1 or 2 under the Windows Subsystem for Linux, else 0."""
        release = self.release.lower()
        if "microsoft" not in release:
            return 0
        return 2 if "wsl2" in release or "microsoft-standard" in release else 1

    @property
    def masked_proc(self) -> list[str]:
        """What is mounted over parts of ``/proc``; any such mount forbids a fresh one in a user namespace."""
        points = [line.split()[4] for line in self.text("/proc/self/mountinfo").splitlines()]
        return sorted(point for point in points if point.startswith("/proc/"))


def _filesystem(mountinfo: str, point: str) -> str:
    found = ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == point:
            found = after.split()[0]
    return found


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
