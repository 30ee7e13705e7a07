"""Hayflick's wire protocol; the stubs are in :mod:`hayflick.v1`."""
