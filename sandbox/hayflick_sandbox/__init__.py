"""A real Linux sandbox for one worker: namespaces, cgroups, seccomp, Landlock, rlimits.

Usable by itself, without any service: ``python -m hayflick_sandbox -- CMD``, or
:func:`hayflick_sandbox.session.Session.run`. Standard library, python-prctl and pyseccomp
only: what is imported here is in the memory of every worker.
"""
