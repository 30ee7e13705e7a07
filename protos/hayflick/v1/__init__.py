"""Stubs made from the .proto files beside this one.

They are built, not committed: installing the project makes them, and so does
``make protos``.
"""
