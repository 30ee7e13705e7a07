"""What a worker may read: this Python and the system's /usr, and nothing wider."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hayflick_sandbox.template import ETC_BINDS, ETC_COPIES, readable_paths


def test_python_and_usr_are_there() -> None:
    """Python's prefixes and /usr are readable."""
    binds = readable_paths().binds
    for path in ("/usr", sys.prefix, sys.base_prefix):
        assert any(path == one or path.startswith(one + "/") for one in binds)


def test_no_path_lies_within_another() -> None:
    """A path below one that is bound already is not bound again."""
    binds = readable_paths(("/usr/share", "/usr")).binds
    assert not any(one != other and one.startswith(other + "/") for one in binds for other in binds)


def test_nothing_of_home_etc_or_var() -> None:
    """Neither the host's /etc nor a home, /var, /run, /proc or the root as a whole is shown."""
    binds = readable_paths().binds
    assert not {"/", "/etc", "/root", "/home", "/var", "/run", "/proc", "/sys", "/dev", "/tmp"} & set(binds)


def test_the_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module path that is the whole host is refused and not shown."""
    monkeypatch.setattr(sys, "path", [*sys.path, "/"])
    with pytest.raises(ValueError, match=r"^sys.path: "):
        readable_paths()


def test_relative_and_absent_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is not shown because it stands first, nor what does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:], str(tmp_path / "absent.zip")])
    binds = readable_paths().binds
    assert not any(one.startswith(str(tmp_path)) for one in binds)


def test_extra_paths(tmp_path: Path) -> None:
    """What the operator adds is readable too."""
    assert str(tmp_path) in readable_paths((str(tmp_path),)).binds


def test_links_are_kept_as_links() -> None:
    """Where /bin and its kin are links they stay links, and where they are directories they are bound."""
    template = readable_paths()
    for path in ("/bin", "/sbin", "/lib"):
        assert (path in dict(template.links)) == Path(path).is_symlink()


def test_no_secret_of_etc_is_copied() -> None:
    """What is taken from the host's /etc is a short list without accounts, keys or hosts."""
    assert set(ETC_BINDS) | set(ETC_COPIES) == {
        *("/etc/alternatives", "/etc/ssl/certs", "/etc/ld.so.cache", "/etc/localtime"),
        *("/etc/ssl/openssl.cnf", "/etc/mime.types"),
    }
