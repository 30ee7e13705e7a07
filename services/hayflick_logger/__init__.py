"""The logger: remembers every decision in an append-only record chained by hash."""
