"""A transparency log in the public C2SP formats: hashes, tiles, signed checkpoints, and verifying them.

It knows bytes alone, nothing of events, services or where files lie; so the
logger writes with it and anyone may verify with it, offline.

* :mod:`~hayflick_tlog.merkle`: RFC 6962 hashes and proofs;
* :mod:`~hayflick_tlog.tiles`: tlog-tiles paths, tiles and entry bundles;
* :mod:`~hayflick_tlog.edge`: the growing end of a tree;
* :mod:`~hayflick_tlog.note`: signed notes and their keys;
* :mod:`~hayflick_tlog.checkpoint`: the signed head of a log;
* :mod:`~hayflick_tlog.proof`: that one entry is in a log, to be kept and shown;
* :mod:`~hayflick_tlog.verify`: a whole log against its checkpoint.
"""
