"""``hayflick keys``: the keys that sign manifests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer

from hayflick.v1 import controller_pb2, controller_pb2_grpc
from hayflick_cli.failure import Failure, words_of

CALL_SECONDS = 30.0
PAGE = 1_000

app = typer.Typer(help="Keys that sign manifests: list, rotate, revoke.", no_args_is_help=True)

Controller = Annotated[
    str,
    typer.Option("--controller", envvar="HAYFLICK_CONTROLLER", help="unix:… of the controller"),
]
Reason = Annotated[str, typer.Option("--reason", help="why, for the audit log")]


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
    controller: Controller,
    reason: Reason,
    secret_variable: Annotated[
        str, typer.Option(help="an environment variable that holds the new secret; else one is made")
    ] = "",
) -> None:
    """Sign new manifests of a contract with a new key; those signed before stay good until they expire."""
    secret = ""
    if secret_variable:
        secret = os.environ.get(secret_variable, "")
        if not secret:
            raise Failure(f"the environment has no {secret_variable}")
    request = controller_pb2.RotateKeyRequest(
        request_id=secrets.token_hex(16), contract_id=contract, reason=reason, secret=secret
    )
    with _stub(controller) as stub:
        key = stub.RotateKey(request, timeout=CALL_SECONDS).key
    typer.echo(f"{key.key_id} signs the manifests of {contract} from now on")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="the key's id")], controller: Controller, reason: Reason
) -> None:
    """Refuse every manifest that a key signed, at once."""
    request = controller_pb2.RevokeKeyRequest(request_id=secrets.token_hex(16), key_id=key, reason=reason)
    with _stub(controller) as stub:
        answer = stub.RevokeKey(request, timeout=CALL_SECONDS)
    typer.echo(f"{answer.key.key_id} is revoked")
    if answer.HasField("successor"):
        typer.echo(f"{answer.successor.key_id} took its place")


def _state(key: controller_pb2.Key) -> str:
    if key.HasField("revoke_time"):
        return f"revoked {key.revoke_time.ToJsonString()}"
    if key.HasField("retire_time"):
        return f"retired {key.retire_time.ToJsonString()}"
    return f"current since {key.create_time.ToJsonString()}"


@contextmanager
def _stub(address: str) -> Iterator[controller_pb2_grpc.ControllerServiceStub]:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield controller_pb2_grpc.ControllerServiceStub(channel)
        except grpc.RpcError as error:
            raise Failure(words_of(error)) from None
