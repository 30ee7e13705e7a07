"""The nouns of the SDK: contracts, manifests and what a worker may use.

Cheap to import, inside a sandbox as well: the standard library alone.
"""

from replication._contract import Predicate, ReplicationContext, ReplicationContract, StopCondition
from replication._manifest import Manifest
from replication._resources import NetworkPolicy, ResourceSpec
from replication._terms import DenialClass, FamilyBudget, Tripwire, TripwireScope

__all__ = [
    "DenialClass",
    "FamilyBudget",
    "Manifest",
    "NetworkPolicy",
    "Predicate",
    "ReplicationContext",
    "ReplicationContract",
    "ResourceSpec",
    "StopCondition",
    "Tripwire",
    "TripwireScope",
]
