"""The nouns of the SDK: contracts, manifests and what a worker may use.

Cheap to import, inside a sandbox as well: the standard library alone.
"""

from replication._contract import Predicate, ReplicationContext, ReplicationContract, StopCondition
from replication._manifest import Manifest
from replication._resources import NetworkPolicy, ResourceSpec

__all__ = [
    "Manifest",
    "NetworkPolicy",
    "Predicate",
    "ReplicationContext",
    "ReplicationContract",
    "ResourceSpec",
    "StopCondition",
]
