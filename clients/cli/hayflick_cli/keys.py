"""``hayflick keys``: the keys that sign manifests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import grpc
import typer

from hayflick.v1 import controller_pb2, controller_pb2_grpc
from hayflick_cli.failure import Failure, status_of, words_of

CALL_SECONDS = 30.0
PAGE = 1_000
UNHEARD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

app = typer.Typer(help="Keys that sign manifests: list, rotate, revoke.", no_args_is_help=True)

Controller = Annotated[
    str,
    typer.Option("--controller", envvar="HAYFLICK_CONTROLLER", help="unix:… of the controller"),
]
Reason = Annotated[str, typer.Option("--reason", help="why, for the audit log")]
RequestId = Annotated[
    str, typer.Option("--request-id", help="of a request whose answer was not heard; else one is made")
]


@app.command("list")
def list_(
    controller: Controller, contract: Annotated[str, typer.Option(help="only this contract's")] = ""
) -> None:
    """List keys, newest first; never a secret."""
    with _stub(controller) as stub:
        token = ""
        while True:
            page = stub.ListKeys(
                controller_pb2.ListKeysRequest(contract_id=contract, page_size=PAGE, page_token=token),
                timeout=CALL_SECONDS,
            )
            for key in page.keys:
                typer.echo(f"{key.key_id}  {key.contract_id}  {_state(key)}")
            token = page.next_page_token
            if not token:
                return


@app.command()
def rotate(
    contract: Annotated[str, typer.Argument(help="the contract's id")],
    *,
    controller: Controller,
    reason: Reason,
    secret_file: Annotated[
        Path | None, typer.Option(help="a file with the new secret, mode 0600; else one is made")
    ] = None,
    secret_variable: Annotated[str, typer.Option(help="an environment variable with the new secret")] = "",
    request_id: RequestId = "",
) -> None:
    """Sign new manifests of a contract with a new key; those signed before stay good until they expire."""
    request = controller_pb2.RotateKeyRequest(
        request_id=request_id or secrets.token_hex(16),
        contract_id=contract,
        reason=reason,
        secret=_secret(secret_file, secret_variable),
    )
    with _stub(controller, request.request_id) as stub:
        key = stub.RotateKey(request, timeout=CALL_SECONDS).key
    typer.echo(f"{key.key_id} signs the manifests of {contract} from now on")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="the key's id")],
    controller: Controller,
    reason: Reason,
    request_id: RequestId = "",
) -> None:
    """Refuse every manifest that a key signed, at once."""
    request = controller_pb2.RevokeKeyRequest(
        request_id=request_id or secrets.token_hex(16), key_id=key, reason=reason
    )
    with _stub(controller, request.request_id) as stub:
        answer = stub.RevokeKey(request, timeout=CALL_SECONDS)
    typer.echo(f"{answer.key.key_id} is revoked")
    if answer.HasField("successor"):
        typer.echo(f"{answer.successor.key_id} took its place")


def _secret(file: Path | None, variable: str) -> str:
    """Return the secret that was given, or nothing.

    Raises:
        Failure: it cannot be had, others may read it, or two were given.
    """
    if file is not None and variable:
        raise Failure("give --secret-file or --secret-variable, not both")
    if variable:
        if secret := os.environ.get(variable, ""):
            return secret
        raise Failure(f"the environment has no {variable}")
    if file is None:
        return ""
    try:
        with file.open(encoding="utf-8") as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise Failure(f"{file}: others may read the secret; make it mode 0600")
            secret = opened.read().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file} cannot be read: {error}") from None
    if not secret:
        raise Failure(f"{file} is empty")
    return secret


def _state(key: controller_pb2.Key) -> str:
    if key.HasField("revoke_time"):
        return f"revoked {key.revoke_time.ToJsonString()}"
    if key.HasField("retire_time"):
        return f"retired {key.retire_time.ToJsonString()}"
    return f"current since {key.create_time.ToJsonString()}"


@contextmanager
def _stub(address: str, request_id: str = "") -> Iterator[controller_pb2_grpc.ControllerServiceStub]:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield controller_pb2_grpc.ControllerServiceStub(channel)
        except grpc.RpcError as error:
            # What was asked for may have been done: only the same request tells.
            unheard = request_id and status_of(error) in UNHEARD
            again = f" (to ask again: --request-id {request_id})" if unheard else ""
            raise Failure(words_of(error) + again) from None
