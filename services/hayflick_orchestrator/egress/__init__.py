"""The allow-list proxy: a process of its own beside the orchestrator, without privileges."""
