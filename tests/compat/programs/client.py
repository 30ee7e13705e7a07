"""A gRPC client of the worker's own service."""

import grpc

from hayflick.v1 import worker_pb2, worker_pb2_grpc

with grpc.insecure_channel("unix:///run/hayflick/worker.sock") as channel:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    for _ in range(20):
        said = stub.GetSelf(worker_pb2.GetSelfRequest(), timeout=10)
    print(said.worker.worker_id)
