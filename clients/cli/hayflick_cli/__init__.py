"""The ``hayflick`` command: what operators and auditors do from a terminal."""
