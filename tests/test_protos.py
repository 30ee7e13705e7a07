"""The wire protocol documents itself, and follows the rules that keep it stable."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROTOS = Path(__file__).parents[1] / "protos"

# Path components of google.protobuf.SourceCodeInfo.Location: field numbers of
# the descriptor messages.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, NESTED_ENUM, ONEOF = 2, 3, 4, 8
VALUE, METHOD = 2, 2

# What changes nothing needs no request_id; every other request must be safe to repeat.
READS = re.compile(r"(Get|List|Watch|Tail|Verify)\w*")
# Streams that are idempotent by what they carry: a source's sequence, a node's session.
IDEMPOTENT_STREAMS = {"Append", "ConnectNode"}
# A task lives as long as its call: hanging up ends it, and what it printed cannot be
# played again, so there is no answer to repeat. Sending one again runs it again.
LIVE_CALLS = {"RunTask", "RunDescendantTask"}
# Writing the same bytes to the same place again changes nothing.
OVERWRITES = {"PutFile"}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """Every proto of ours, with its comments."""
    target = tmp_path_factory.mktemp("protos") / "set.bin"
    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={target}", *names], cwd=PROTOS, check=True)
    found = FileDescriptorSet.FromString(target.read_bytes())
    assert len(found.file) == len(names) > 0
    return list(found.file)


Path_ = tuple[int, ...]


def elements(file: FileDescriptorProto) -> Iterator[tuple[Path_, str]]:
    """Yield the path and the name of everything that *file* declares."""
    for index, message in enumerate(file.message_type):
        yield from in_message(message, (MESSAGE, index), message.name)
    for index, enum in enumerate(file.enum_type):
        yield from in_enum(enum, (ENUM, index), enum.name)
    for index, service in enumerate(file.service):
        yield (SERVICE, index), service.name
        for number, method in enumerate(service.method):
            yield (SERVICE, index, METHOD, number), f"{service.name}.{method.name}"


def in_message(message: DescriptorProto, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    """Yield *message* and everything in it."""
    if message.options.map_entry:
        return  # made by protoc; nobody wrote it
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, FIELD, index), f"{name}.{field.name}"
    for index, oneof in enumerate(message.oneof_decl):
        synthetic = any(field.proto3_optional and field.oneof_index == index for field in message.field)
        if not synthetic:
            yield (*path, ONEOF, index), f"{name}.{oneof.name}"
    for index, nested in enumerate(message.nested_type):
        yield from in_message(nested, (*path, NESTED, index), f"{name}.{nested.name}")
    for index, enum in enumerate(message.enum_type):
        yield from in_enum(enum, (*path, NESTED_ENUM, index), f"{name}.{enum.name}")


def in_enum(enum: EnumDescriptorProto, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    """Yield *enum* and its values."""
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, VALUE, index), f"{name}.{value.name}"


def comments(file: FileDescriptorProto) -> dict[Path_, str]:
    """Return the comment above each element that has one."""
    return {
        tuple(place.path): place.leading_comments
        for place in file.source_code_info.location
        if place.leading_comments.strip()
    }


def test_every_element_is_commented(files: Sequence[FileDescriptorProto]) -> None:
    """Each message, field, oneof, enum, value, service and rpc says what it is."""
    silent = [
        f"{file.name}: {name}"
        for file in files
        for path, name in elements(file)
        if path not in comments(file)
    ]
    assert not silent, "\n" + "\n".join(silent)


def test_every_rpc_says_who_may_call_it(files: Sequence[FileDescriptorProto]) -> None:
    """The comment above each rpc holds "The caller must"."""
    silent = [
        f"{file.name}: {name}"
        for file in files
        for path, name in elements(file)
        if path[0] == SERVICE and len(path) == 4
        if "The caller must" not in " ".join(comments(file).get(path, "").split())
    ]
    assert not silent


def enums(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    """Yield every enum of *file*."""
    yield from file.enum_type
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        yield from message.enum_type
        waiting += message.nested_type


def test_the_zero_of_every_enum_is_unspecified(files: Sequence[FileDescriptorProto]) -> None:
    """A field that was not set can never be mistaken for one that was."""
    for enum in (enum for file in files for enum in enums(file)):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert (enum.value[0].number, enum.value[0].name) == (0, f"{prefix}_UNSPECIFIED")
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)


def test_requests_that_change_something_carry_a_request_id(files: Sequence[FileDescriptorProto]) -> None:
    """Every request that mutates can be sent again without doing it twice, live calls excepted."""
    messages = {f".{file.package}.{message.name}": message for file in files for message in file.message_type}
    lacking = [
        method.name
        for file in files
        for service in file.service
        for method in service.method
        if not READS.fullmatch(method.name)
        if method.name not in IDEMPOTENT_STREAMS | LIVE_CALLS | OVERWRITES
        if not carries_request_id(messages[method.input_type], messages)
    ]
    assert not lacking


def carries_request_id(message: DescriptorProto, messages: dict[str, DescriptorProto]) -> bool:
    """Return whether *message* has a request_id, itself or in the message that a stream starts with."""
    if any(field.name == "request_id" for field in message.field):
        return True
    first = [field for field in message.field if field.HasField("oneof_index") and not field.proto3_optional]
    return any(
        carries_request_id(messages[field.type_name], messages)
        for field in first
        if field.type == FieldDescriptorProto.TYPE_MESSAGE and field.type_name in messages
    )


def test_lists_are_paged(files: Sequence[FileDescriptorProto]) -> None:
    """Every List request takes a page_size and a page_token, and its response gives the next one."""
    for file in files:
        fields = {message.name: {field.name for field in message.field} for message in file.message_type}
        for name in (method.name for service in file.service for method in service.method):
            if name.startswith("List"):
                assert {"page_size", "page_token"} <= fields[f"{name}Request"], name
                assert "next_page_token" in fields[f"{name}Response"], name


def test_the_package_is_the_folder(files: Sequence[FileDescriptorProto]) -> None:
    """Proto package, import package and folder agree."""
    for file in files:
        assert file.package == str(Path(file.name).parent).replace("/", ".") == "hayflick.v1"
