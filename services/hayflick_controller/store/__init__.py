"""Where the controller's state lives: a protocol, and its implementation in SQL."""

from hayflick_controller.store.protocol import Commit, Store, Tx

__all__ = ["Commit", "Store", "Tx"]
