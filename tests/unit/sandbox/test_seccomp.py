"""The system call policy, evaluated as it was compiled: the filter, by a small BPF interpreter.

Instructions are struct sock_filter of linux/filter.h; the data is struct
seccomp_data of linux/seccomp.h: call number, architecture, instruction
pointer, six 64-bit arguments.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import platform
import struct
from collections.abc import Sequence

import pyseccomp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.resources_pb2 import DenialClass
from hayflick_sandbox import explain, seccomp

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
I386, ARM, MIPS = 0x40000003, 0x40000028, 0x8
X32 = 0x40000000

KILL_PROCESS, ERRNO, NOTIFY, ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
EPERM, ENOSYS, EAFNOSUPPORT, ENOTTY, EPROTONOSUPPORT = (
    ERRNO | number
    for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT, errno.ENOTTY, errno.EPROTONOSUPPORT)
)

_INSTRUCTION = struct.Struct("<HBBI")
_DATA = struct.Struct("<IIQ6Q")
_WORD = 0xFFFFFFFF

LOCAL = seccomp.compile_filter(inet=False)
INET = seccomp.compile_filter(inet=True)
BLIND = seccomp.compile_filter(inet=False, listener=False)
POLICY = seccomp.read()
ALLOWED = POLICY.calls("allow")
REFUSED = POLICY.calls("refuse")
TRIPPED = POLICY.calls("trip")
ABSENT = POLICY.calls("absent")
BY_ARGUMENT = {entry.call: entry for entry in POLICY.by_argument}
VALUES = sorted(
    {
        value
        for entry in POLICY.by_argument
        for rule in entry.rules
        for condition in (rule.condition, *rule.further)
        for value in condition.values.values()
    }
)
# Arguments that rules speak of, their neighbours, and both with bits that the kernel does not read.
ARGUMENTS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 64),
    st.builds(
        lambda value, near, high: (value + near) % 2**32 | high << 32,
        st.sampled_from(VALUES),
        st.sampled_from([0, 0, 0, 1, -1]),
        st.sampled_from([0, 0, 1, 2**32 - 1]),
    ),
)


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


def answer(number: int, *arguments: int, program: bytes = LOCAL, arch: int = NATIVE) -> int:
    """Return what the filter answers."""
    return interpret(program, number, arguments, arch)


def number_of(name: str) -> int:
    """Return the native number of a call, negative where this architecture has none."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))
    except ValueError:
        return -1


def native(names: set[str]) -> list[str]:
    """Return those of *names* that this architecture has, in order."""
    return sorted(name for name in names if number_of(name) >= 0)


def holds(condition: seccomp.Condition, arguments: Sequence[int]) -> bool:
    """Return whether *condition* is true, read as the policy file explains it."""
    value = arguments[condition.argument]
    low = value if condition.wide or condition.kind == "isnt" else value & _WORD
    match condition.kind:
        case "is":
            return low in condition.values.values()
        case "isnt":
            return low not in condition.values.values()
        case "any":
            return any(low & bit for bit in condition.values.values())
        case _:
            return not low & ~sum(condition.values.values())


def errno_of(name: str) -> int:
    """Return the answer that gives the errno of that name."""
    return ERRNO | int(getattr(errno, name))


def read_aloud(call: str, arguments: Sequence[int], licences: set[str]) -> int:
    """Return what the policy file says about a call whose arguments decide."""
    entry = BY_ARGUMENT[call]
    for rule in entry.rules:
        if rule.licence not in licences or not holds(rule.condition, arguments):
            continue
        failed = next((one for one in rule.further if not holds(one, arguments)), None)
        if failed is not None:
            if failed.otherwise:
                return errno_of(failed.otherwise)
            continue
        return {"allow": ALLOW, "trip": NOTIFY, "refuse": errno_of(rule.error)}[rule.answer]
    return {"": ENOSYS, "allow": ALLOW}.get(entry.otherwise) or errno_of(entry.otherwise)


def known_to_libseccomp() -> set[str]:
    """Return every name of this architecture's table that libseccomp has."""
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"))
    resolve = library.seccomp_syscall_resolve_num_arch
    resolve.restype = ctypes.c_void_p
    found = (resolve(ctypes.c_uint32(NATIVE), number) for number in range(1_024))
    return {ctypes.string_at(name).decode() for name in found if name}


# The file


def test_every_call_that_libseccomp_knows_has_its_place() -> None:
    """Each call of this architecture is allowed, refused, tripped, absent on purpose, or by argument."""
    assert known_to_libseccomp() - (ALLOWED | REFUSED | TRIPPED | ABSENT | set(BY_ARGUMENT)) == set()


def test_no_call_has_two_places() -> None:
    """Each call stands in one group, so its reason is the one beside it."""
    listed = [call for group in POLICY.groups for call in group.calls] + list(BY_ARGUMENT)
    assert sorted(listed) == sorted(set(listed))


def test_every_place_has_a_reason() -> None:
    """Each group and each rule says why, and no two groups say the same."""
    reasons = [group.reason for group in POLICY.groups]
    assert len(set(reasons)) == len(reasons)
    rules = [rule.reason for entry in POLICY.by_argument for rule in entry.rules]
    assert all(
        len(reason) >= 5 for reason in [*reasons, *rules, *(entry.reason for entry in POLICY.by_argument)]
    )


def test_what_trips_is_a_class_of_the_wire() -> None:
    """The groups that trip are the wire's classes of denials, all but the census, and rules name no other."""
    tripped = {group.name for group in POLICY.groups if group.answer == "trip"}
    wire = {value.name.removeprefix("DENIAL_CLASS_").lower() for value in DenialClass.DESCRIPTOR.values}
    assert tripped == wire - {"unspecified", "census"}
    rules = [rule for entry in POLICY.by_argument for rule in entry.rules]
    assert {rule.denial_class for rule in rules if rule.answer == "trip"} <= tripped


def test_every_call_that_trips_has_a_shape() -> None:
    """Of each call that trips the policy says which arguments are numbers, and of no other."""
    by_argument = {
        call for call, entry in BY_ARGUMENT.items() for rule in entry.rules if rule.answer == "trip"
    }
    assert TRIPPED | by_argument == set(POLICY.shapes)
    assert all(len(shape) <= 6 for shape in POLICY.shapes.values())


# By name


@pytest.mark.parametrize("name", native(ALLOWED))
@pytest.mark.parametrize("program", [LOCAL, INET, BLIND])
def test_listed_calls_pass(name: str, program: bytes) -> None:
    """A call that the policy allows passes, whatever its arguments are."""
    assert {answer(number_of(name), *[value] * 6, program=program) for value in (0, 1, 2**63)} == {ALLOW}


@pytest.mark.parametrize("name", native(REFUSED))
@pytest.mark.parametrize("program", [LOCAL, INET, BLIND])
def test_refused_calls_answer_eperm(name: str, program: bytes) -> None:
    """A call that is refused by name answers EPERM, whatever its arguments are."""
    assert {answer(number_of(name), *[value] * 6, program=program) for value in (0, 1, 2**63)} == {EPERM}


@pytest.mark.parametrize("name", native(TRIPPED))
def test_tripped_calls_go_to_the_listener(name: str) -> None:
    """A call that only an attack makes goes to the listener; without one it answers EPERM, unseen."""
    number = number_of(name)
    for value in (0, 1, 2**63):
        assert answer(number, *[value] * 6) == answer(number, *[value] * 6, program=INET) == NOTIFY
        assert answer(number, *[value] * 6, program=BLIND) == EPERM


def test_everything_else_is_enosys() -> None:
    """Every number that the policy does not name answers ENOSYS, now and on kernels to come."""
    named = {number_of(name) for name in ALLOWED | REFUSED | TRIPPED | set(BY_ARGUMENT)}
    assert {answer(number) for number in set(range(1_024)) - named} == {ENOSYS}
    assert {number_of(name) for name in native(ABSENT)} & named == set()


@given(st.integers(1_024, X32 - 1))
def test_numbers_beyond_the_table_are_enosys(number: int) -> None:
    """Numbers that no kernel uses answer ENOSYS."""
    assert answer(number) == ENOSYS


def test_clone3_is_enosys() -> None:
    """clone3 answers ENOSYS, so that libc falls back to clone, whose flags can be seen."""
    assert answer(number_of("clone3")) == ENOSYS


@pytest.mark.parametrize(
    "name",
    [
        "io_uring_setup",
        "mbind",
        "perf_event_open",
        "name_to_handle_at",
        "setgroups",
        "adjtimex",
        "process_madvise",
    ],
)
def test_what_libraries_probe_does_not_trip(name: str) -> None:
    """What ordinary libraries try, and do without, is refused and is no sign of an attack."""
    assert answer(number_of(name)) == EPERM


# By argument


@pytest.mark.parametrize("call", native(set(BY_ARGUMENT)))
@given(arguments=st.lists(ARGUMENTS, min_size=6, max_size=6), inet=st.booleans())
def test_the_compiled_rules_are_the_written_ones(call: str, arguments: list[int], inet: bool) -> None:
    """Whatever its arguments are, a call is answered as the policy file reads."""
    expected = read_aloud(call, arguments, {"", "inet"} if inet else {""})
    assert answer(number_of(call), *arguments, program=INET if inet else LOCAL) == expected


@pytest.mark.parametrize("call", native(set(BY_ARGUMENT)))
def test_no_value_is_overlooked(call: str) -> None:
    """Every small value, every listed one and every lone bit is answered as written, alone and in pairs."""
    values = sorted({*range(80), *VALUES, *(1 << bit for bit in range(64)), 2**64 - 1})
    positions = sorted({rule.condition.argument for rule in BY_ARGUMENT[call].rules})
    for position in positions:
        for value in values:
            arguments = [0] * 6
            arguments[position] = value
            assert answer(number_of(call), *arguments) == read_aloud(call, arguments, {""}), arguments
    if len(positions) > 1:
        few = (0, 1, 4, 5, 15, 16, 1 << 32, 1 << 32 | 4, 2**64 - 1)
        for first, second, third in ((a, b, c) for a in few for b in few for c in few):
            arguments = [first, second, third, 0, 0, 0]
            assert answer(number_of(call), *arguments) == read_aloud(call, arguments, {""}), arguments


@given(
    number=st.integers(0, 600),
    arguments=st.lists(ARGUMENTS, min_size=6, max_size=6),
)
def test_without_a_listener_the_same_is_refused(number: int, arguments: list[int]) -> None:
    """The filter without a listener differs in nothing but that what trips is an errno."""
    seen, blind = answer(number, *arguments), answer(number, *arguments, program=BLIND)
    if seen == NOTIFY:
        assert blind == (EAFNOSUPPORT if number == number_of("socket") else EPERM)
    else:
        assert blind == seen


@pytest.mark.parametrize(
    "flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
)
@pytest.mark.parametrize("others", [0, 17, 0x3D0F00, 0xFFFFFFFF00000000])
def test_clone_into_a_namespace_trips(flag: int, others: int) -> None:
    """Each of the seven namespace flags of clone trips, alone or among others, with any high bits."""
    assert answer(number_of("clone"), flag | others) == NOTIFY
    assert answer(number_of("clone"), flag | others, program=BLIND) == EPERM


def test_threads_and_children_are_allowed() -> None:
    """Clone with the flags of pthread_create, fork and posix_spawn passes."""
    assert {answer(number_of("clone"), flags) for flags in (0x3D0F00, 0x1200011, 0x4111)} == {ALLOW}


@pytest.mark.parametrize("high", [0, 1 << 32, 2**63])
@pytest.mark.parametrize("family", range(64))
@pytest.mark.parametrize("inet", [False, True])
def test_socket_families(family: int, high: int, inet: bool) -> None:
    """AF_UNIX passes, AF_INET and AF_INET6 by licence; others trip, but for what resolvers probe."""
    seen = answer(number_of("socket"), high | family, 1, 0, program=INET if inet else LOCAL)
    if family == 1 or (inet and family in {2, 10}):
        assert seen == ALLOW
    elif family in {0, 2, 10, 16} or family > 45:
        assert seen == EAFNOSUPPORT
    else:
        assert seen == NOTIFY
    if seen != ALLOW:
        assert answer(number_of("socket"), high | family, 1, 0, program=BLIND) == EAFNOSUPPORT


@pytest.mark.parametrize("family", [2, 10])
@given(protocol=st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)))
def test_the_licence_is_for_tcp_and_udp_alone(family: int, protocol: int) -> None:
    """No protocol but TCP, UDP and the default: others would have the kernel load modules."""
    expected = ALLOW if protocol in {0, 6, 17} else EPROTONOSUPPORT
    assert answer(number_of("socket"), family, 1, protocol, program=INET) == expected


@given(st.integers(0, 2**64 - 1))
def test_socket_pairs_are_local(family: int) -> None:
    """socketpair() makes AF_UNIX pairs alone, with the licence as without."""
    for program in (LOCAL, INET, BLIND):
        assert (answer(number_of("socketpair"), family, 1, 0, program=program) == ALLOW) is (
            family & _WORD == 1
        )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0x5412, 0x541C, 0x541D]))
def test_terminal_injection_trips_on_the_low_half(high: int, request_number: int) -> None:
    """TIOCSTI, TIOCLINUX and TIOCCONS trip whatever the upper 32 bits say (CVE-2019-10063)."""
    assert answer(number_of("ioctl"), 0, high << 32 | request_number) == NOTIFY
    assert answer(number_of("ioctl"), 0, high << 32 | request_number, program=BLIND) == EPERM


@pytest.mark.parametrize("request_number", [0x40049409, 0xC0189436, 0x5437, 0xAE01, 0x8933, 0x540E, 0xF501])
def test_other_requests_answer_as_a_device_without_them(request_number: int) -> None:
    """FICLONE, KVM's, a terminal's that nobody needs: ENOTTY, on which programs fall back."""
    assert answer(number_of("ioctl"), 0, request_number) == ENOTTY


@pytest.mark.parametrize("option", [24, 28, 35, 47, 62, 67, 0x59616D61])
@pytest.mark.parametrize("high", [0, 1 << 32, 2**63])
def test_prctl_is_a_list(option: int, high: int) -> None:
    """Options about capabilities, other processes and the machine answer EPERM; unknown ones ENOSYS."""
    assert answer(number_of("prctl"), high | option) == EPERM
    assert answer(number_of("prctl"), 1_000) == answer(number_of("prctl"), 200) == ENOSYS


def test_no_listener_can_be_made() -> None:
    """A worker can stack filters on itself, but none with a listener or lines for the host's log."""
    call = number_of("seccomp")
    assert answer(call, 1, 0) == answer(call, 1, 1) == answer(call, 2, 0) == ALLOW
    assert (
        answer(call, 1, 8)
        == answer(call, 1, 9)
        == answer(call, 1, 1 << 32 | 8)
        == answer(call, 1, 2)
        == EPERM
    )


def test_limits_of_others_stay() -> None:
    """prlimit64 changes no other process's limits, and nobody's RLIMIT_CORE; reading passes."""
    call = number_of("prlimit64")
    assert (
        answer(call, 0, 7, 0xBEEF)
        == answer(call, 1, 7, 0)
        == answer(call, 0, 4, 0)
        == answer(call, 9, 4, 0)
        == ALLOW
    )
    assert answer(call, 1, 7, 0xBEEF) == answer(call, 0, 4, 0xBEEF) == answer(call, 1, 4, 0xBEEF) == EPERM
    assert answer(call, 0, 1 << 32 | 4, 1 << 40) == EPERM
    assert answer(number_of("setrlimit"), 4, 0xBEEF) == answer(number_of("setrlimit"), 1 << 32 | 4) == EPERM


def test_personality_is_the_default_or_a_question() -> None:
    """personality() may ask and may set the default; no flag that undoes hardening passes."""
    call = number_of("personality")
    assert answer(call, 0) == answer(call, 0xFFFFFFFF) == ALLOW
    assert answer(call, 0x0040000) == answer(call, 0x0400000) == answer(call, 8) == EPERM
    assert answer(call, 0x0440000) == ENOSYS


# Other numbers


@given(st.integers(0, 2**32 - 1), st.sampled_from([I386, ARM, MIPS, 0]))
def test_foreign_architectures_die(number: int, arch: int) -> None:
    """A call by another architecture's numbers ends the whole process, not one thread."""
    assert answer(number, arch=arch) == KILL_PROCESS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is x86-64's")
@given(st.integers(X32, 2**32 - 2))
def test_x32_numbers_die(number: int) -> None:
    """The x32 numbers, which reach the same calls past a filter of native ones, end the process."""
    assert answer(number) == KILL_PROCESS


@given(st.integers(0, 600), st.lists(ARGUMENTS, min_size=6, max_size=6))
def test_the_licence_widens_sockets_alone(number: int, arguments: list[int]) -> None:
    """The filter of a worker with a licence for AF_INET allows no other call more than one without."""
    if number != number_of("socket"):
        assert answer(number, *arguments) == answer(number, *arguments, program=INET)


@pytest.mark.parametrize("program", [LOCAL, INET, BLIND])
def test_the_filter_is_small(program: bytes) -> None:
    """A filter has at most 1,200 instructions: the kernel checks and compiles them at every birth."""
    assert len(program) // 8 <= 1_200


def test_the_explanation_names_every_call_and_reason() -> None:
    """The explanation lists every call, value and reason of the policy."""
    text = "\n".join(explain.system_calls())
    words = set(text.replace(",", " ").replace(":", " ").split())
    assert ALLOWED | REFUSED | TRIPPED | ABSENT | set(BY_ARGUMENT) <= words
    assert all(group.reason in text for group in POLICY.groups if group.calls)
    for entry in POLICY.by_argument:
        assert all(rule.reason in text for rule in entry.rules)
        assert all(
            f"{name}={value:#x}" in text
            for rule in entry.rules
            for name, value in rule.condition.values.items()
        )
