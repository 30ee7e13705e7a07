"""The system call policy, evaluated as it was compiled: both filters, by a small BPF interpreter.

Instructions are struct sock_filter of linux/filter.h; the data is struct
seccomp_data of linux/seccomp.h: call number, architecture, instruction
pointer, six 64-bit arguments.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence

import pyseccomp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import explain, seccomp, syscalls

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
I386, ARM, MIPS = 0x40000003, 0x40000028, 0x8
X32 = 0x40000000

KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
# From the strictest to the mildest; seccomp(2), "Returning".
ORDER = (KILL_PROCESS, 0x0, ERRNO, ALLOW)
EPERM, ENOSYS, EAFNOSUPPORT = (ERRNO | number for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT))

_INSTRUCTION = struct.Struct("<HBBI")
_DATA = struct.Struct("<IIQ6Q")
_WORD = 0xFFFFFFFF

LOCAL = seccomp.compile_filters(inet=False)
INET = seccomp.compile_filters(inet=True)
POLICY = seccomp.document()
ALLOWED = {name for group in seccomp.groups(POLICY) for name in group.calls}
REFUSED = {name for names in POLICY["refuse"].values() for name in names}
# Allowed by name, but an argument decides.
BY_ARGUMENT = {"clone", "ioctl", "prctl", "seccomp", "prlimit64", "setrlimit", "socketpair"}


def interpret(program: bytes, number: int, arguments: Sequence[int], arch: int) -> int:
    """Return what one filter answers to one system call."""
    padded = (*arguments, *([0] * (6 - len(arguments))))
    data = _DATA.pack(number & _WORD, arch, 0, *(value & (2**64 - 1) for value in padded))
    code = list(_INSTRUCTION.iter_unpack(program))
    accumulator, index, memory, at = 0, 0, [0] * 16, 0
    while True:
        op, true, false, k = code[at]
        at += 1
        operand = index if op & 0x08 else k
        match op & 0x07:
            case 0x00:  # LD: a word of the data, or of the scratch memory
                accumulator = memory[k] if op & 0xE0 == 0x60 else struct.unpack_from("<I", data, k)[0]
            case 0x01:  # LDX
                index = memory[k] if op & 0xE0 == 0x60 else k
            case 0x02:  # ST
                memory[k] = accumulator
            case 0x04:  # ALU; libseccomp needs AND alone
                assert op & 0xF0 == 0x50, hex(op)
                accumulator &= operand
            case 0x05:  # JMP
                taken = {
                    0x00: None,
                    0x10: accumulator == operand,
                    0x20: accumulator > operand,
                    0x30: accumulator >= operand,
                    0x40: bool(accumulator & operand),
                }[op & 0xF0]
                at += k if taken is None else true if taken else false
            case 0x06:  # RET
                return accumulator if op & 0x18 == 0x10 else k
            case _:
                raise AssertionError(f"no instruction of a seccomp filter: {op:#x}")


def answer(number: int, *arguments: int, filters: Sequence[bytes] = LOCAL, arch: int = NATIVE) -> int:
    """Return what the kernel makes of the stack: the strictest; on a tie, the last installed."""
    answers = [interpret(one, number, arguments, arch) for one in reversed(filters)]
    return min(answers, key=lambda one: ORDER.index(one & 0xFFFF0000))


def number_of(name: str) -> int:
    """Return the native number of a call, negative where this architecture has none."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))
    except ValueError:
        return -1


def native(names: set[str]) -> list[str]:
    """Return those of *names* that this architecture has, in order."""
    return sorted(name for name in names if number_of(name) >= 0)


@pytest.mark.parametrize("name", native(ALLOWED - BY_ARGUMENT))
def test_listed_calls_pass(name: str) -> None:
    """A call that the policy lists and no argument rule touches is allowed."""
    assert answer(number_of(name)) == ALLOW


@pytest.mark.parametrize("name", native(REFUSED))
def test_refused_calls_answer_eperm(name: str) -> None:
    """A call that is refused by name answers EPERM, whatever its arguments are."""
    assert {answer(number_of(name), *[value] * 6) for value in (0, 1, 2**63)} == {EPERM}


def test_a_refused_call_is_never_listed() -> None:
    """No call is both allowed and refused, so the policy file says one thing."""
    assert set() == ALLOWED & REFUSED
    assert (ALLOWED | REFUSED) & set(POLICY["allow_values"]) == set()


def test_no_call_is_listed_twice() -> None:
    """Each call stands in one group, so its reason is the one beside it."""
    listed = [name for group in seccomp.groups(POLICY) for name in group.calls]
    listed += [name for names in POLICY["refuse"].values() for name in names]
    assert sorted(listed) == sorted(set(listed))


def test_everything_else_is_enosys() -> None:
    """Every number that the policy does not name answers ENOSYS, now and on kernels to come."""
    named = {number_of(name) for name in ALLOWED | REFUSED | set(POLICY["allow_values"]) | {"socket"}}
    others = set(range(1_024)) - named
    assert {answer(number) for number in others} == {ENOSYS}


@given(st.integers(1_024, X32 - 1))
def test_numbers_beyond_the_table_are_enosys(number: int) -> None:
    """Numbers that no kernel uses answer ENOSYS."""
    assert answer(number) == ENOSYS


def test_clone3_is_enosys() -> None:
    """clone3 answers ENOSYS, so that libc falls back to clone, whose flags can be seen."""
    assert answer(number_of("clone3")) == ENOSYS


@pytest.mark.parametrize(
    "flag",
    ["NEWNS", "NEWCGROUP", "NEWUTS", "NEWIPC", "NEWUSER", "NEWPID", "NEWNET"],
)
@pytest.mark.parametrize("others", [0, 17, 0x3D0F00, 0xFFFFFFFF00000000])
def test_clone_into_a_namespace_is_refused(flag: str, others: int) -> None:
    """A namespace flag is refused by clone, alone or among others, with any high bits."""
    assert answer(number_of("clone"), getattr(syscalls, f"CLONE_{flag}") | others) == EPERM


def test_threads_and_children_are_allowed() -> None:
    """Clone with the flags of pthread_create, fork and posix_spawn passes."""
    assert {answer(number_of("clone"), flags) for flags in (0x3D0F00, 0x1200011, 0x4111)} == {ALLOW}


@given(st.integers(0, 2**64 - 1))
def test_only_unix_sockets_without_a_network(family: int) -> None:
    """Without loopback, socket() makes AF_UNIX sockets and answers EAFNOSUPPORT to all others."""
    expected = ALLOW if family == 1 else EAFNOSUPPORT
    assert answer(number_of("socket"), family, 1, 0) == expected


@pytest.mark.parametrize("family", range(64))
def test_loopback_adds_inet_alone(family: int) -> None:
    """With loopback, AF_INET and AF_INET6 join AF_UNIX, and no other family does."""
    expected = ALLOW if family in {1, 2, 10} else EAFNOSUPPORT
    assert answer(number_of("socket"), family, 1, 0, filters=INET) == expected


@pytest.mark.parametrize("family", [2, 10])
@given(protocol=st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)))
def test_loopback_speaks_tcp_and_udp_alone(family: int, protocol: int) -> None:
    """No protocol but TCP, UDP and the default: others would have the kernel load modules."""
    expected = ALLOW if protocol in {0, 6, 17} else ERRNO | errno.EPROTONOSUPPORT
    assert answer(number_of("socket"), family, 1, protocol, filters=INET) == expected


@pytest.mark.parametrize("family", [0x1_0000_0001, 0x1_0000_0002, 2**63 | 1, 2**64 - 1])
def test_high_bits_do_not_smuggle_a_family(family: int) -> None:
    """A family whose low half is allowed is refused when its high half is not zero."""
    assert answer(number_of("socket"), family, 1, 0, filters=INET) == EAFNOSUPPORT


@given(st.integers(0, 2**64 - 1))
def test_socket_pairs_are_local(family: int) -> None:
    """socketpair() makes AF_UNIX pairs alone, with loopback as without."""
    expected = ALLOW if family == 1 else EAFNOSUPPORT
    assert answer(number_of("socketpair"), family, 1, 0, filters=INET) == expected


@given(st.integers(0, 2**32 - 1), st.sampled_from([0x5412, 0x541C, 0x541D]))
def test_terminal_injection_is_refused_on_the_low_half(high: int, request_number: int) -> None:
    """TIOCSTI, TIOCLINUX and TIOCCONS answer EPERM whatever the upper 32 bits say (CVE-2019-10063)."""
    assert answer(number_of("ioctl"), 0, high << 32 | request_number) == EPERM


@given(st.integers(0, 2**32 - 1).filter(lambda one: one not in {0x5412, 0x541C, 0x541D}))
def test_other_ioctls_pass(request_number: int) -> None:
    """Every other ioctl reaches the kernel, where Landlock and the descriptor decide."""
    assert answer(number_of("ioctl"), 0, request_number) == ALLOW


@pytest.mark.parametrize("option", [28, 35, 1 << 32 | 28, 1 << 32 | 35])
def test_secure_bits_and_mm_are_refused(option: int) -> None:
    """Prctl may change neither the secure bits nor the layout of memory that /proc shows."""
    assert answer(number_of("prctl"), option) == EPERM


def test_no_listener_can_be_made() -> None:
    """A worker can stack further filters on itself, but not one with a listener."""
    call = number_of("seccomp")
    assert answer(call, 1, 0) == answer(call, 1, 1) == ALLOW
    assert answer(call, 1, 8) == answer(call, 1, 9) == answer(call, 1, 1 << 32 | 8) == EPERM


def test_limits_of_others_stay() -> None:
    """prlimit64 changes no other process's limits, and nobody's RLIMIT_CORE; reading passes."""
    call = number_of("prlimit64")
    assert answer(call, 0, 7, 0xBEEF) == answer(call, 1, 7, 0) == answer(call, 0, 4, 0) == ALLOW
    assert answer(call, 1, 7, 0xBEEF) == answer(call, 0, 4, 0xBEEF) == EPERM
    assert answer(call, 0, 1 << 32 | 4, 1 << 40) == EPERM
    assert answer(number_of("setrlimit"), 4, 0xBEEF) == EPERM


def test_personality_is_the_default_or_a_question() -> None:
    """personality() may ask and may set the default; no flag that undoes hardening passes."""
    call = number_of("personality")
    assert answer(call, 0) == answer(call, 0xFFFFFFFF) == ALLOW
    assert answer(call, 0x0040000) == answer(call, 0x0400000) == answer(call, 8) == ENOSYS


@given(st.integers(0, 2**32 - 1), st.sampled_from([I386, ARM, MIPS, 0]))
def test_foreign_architectures_die(number: int, arch: int) -> None:
    """A call by another architecture's numbers ends the whole process, not one thread."""
    assert answer(number, arch=arch) == KILL_PROCESS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is x86-64's")
@given(st.integers(X32, 2**32 - 2))
def test_x32_numbers_die(number: int) -> None:
    """The x32 numbers, which reach the same calls past a filter of native ones, end the process."""
    assert answer(number) == KILL_PROCESS


@given(
    st.integers(0, 600),
    st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    st.sampled_from([LOCAL, INET]),
)
def test_every_answer_is_one_of_five(number: int, arguments: list[int], filters: tuple[bytes, bytes]) -> None:
    """Whatever is called, the stack answers: allow, EPERM, ENOSYS, EAFNOSUPPORT or death."""
    assert answer(number, *arguments, filters=filters) in {
        *(ALLOW, EPERM, ENOSYS, EAFNOSUPPORT, KILL_PROCESS),
    }


@given(st.integers(0, 600), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_loopback_widens_sockets_alone(number: int, arguments: list[int]) -> None:
    """The filters of a worker with loopback allow no other call more than those without."""
    if number != number_of("socket"):
        assert answer(number, *arguments) == answer(number, *arguments, filters=INET)


def test_the_explanation_names_every_call() -> None:
    """The explanation lists every call of the policy."""
    text = "\n".join(explain.system_calls())
    words = set(text.replace(",", " ").replace(":", " ").split())
    assert (ALLOWED | REFUSED | set(POLICY["allow_values"])) <= words
