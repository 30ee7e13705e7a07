"""What the kernel refuses a worker whatever it sees: the steps of Landlock and seccomp, the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from hayflick_sandbox import landlock, syscalls


@dataclass(frozen=True, slots=True)
class ApplyLandlock:
    """Say again, to another part of the kernel, what may be read and written."""

    tcp: bool
    connect_port: int | None = None

    def rules(self) -> dict[str, int]:
        """Return the paths and the rights below them."""
        writable = dict.fromkeys(("/workspace", "/tmp", "/dev/shm"), landlock.READ_WRITE)
        return {
            "/": landlock.READ,
            "/dev": landlock.DEVICE,
            "/proc": landlock.READ | landlock.WRITE_FILE,
            **writable,
        }

    def describe(self) -> str:
        """Say it."""
        files, net, scopes = landlock.handled(landlock.abi())
        return (
            f"apply Landlock (ABI {landlock.abi()}, rights {files:#x}, TCP {0 if self.tcp else net:#x}"
            f"{self._but()}, scopes {scopes:#x}): write only to /workspace, /tmp and /dev/shm, no signal "
            "and no abstract socket across the sandbox's border"
        )

    def apply(self) -> None:
        """Do it."""
        landlock.restrict(self.rules(), tcp=self.tcp, connect_port=self.connect_port)

    def _but(self) -> str:
        return "" if self.tcp or self.connect_port is None else f" but to port {self.connect_port}"


@dataclass(frozen=True, slots=True)
class FilterSystemCalls:
    """Last: from here on, only listed system calls."""

    programs: tuple[bytes, ...]
    listener: bool

    def describe(self) -> str:
        """Say it."""
        size = sum(len(program) for program in self.programs) // 8
        trip = ", those that only an attack makes are seen" if self.listener else ""
        return (
            f"install the seccomp filter ({size} BPF instructions): listed calls pass, "
            f"refused ones answer EPERM{trip}, unknown ones ENOSYS, foreign architectures die"
        )

    def apply(self) -> dict[str, int]:
        """Do it; the listener, if any, is that of the last filter, which alone can send to one."""
        *first, last = self.programs
        for program in first:
            syscalls.seccomp_set_mode_filter(program)
        descriptor = syscalls.seccomp_set_mode_filter(last, listener=self.listener)
        return {"tripwire": descriptor} if self.listener else {}
