"""Keeps a second writer out of a folder: a lock that names its process, and that is free once the process has ended."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from model.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


class Writer:
    """This process as the only writer of a folder, until `close` or its end, however it ends.

    Linux passes the lock on to the server of an NFS, so it also holds between machines. On a file system without locks
    a message says that nothing keeps a second writer away.
    """

    def __init__(self, folder: Path, remedy: str):
        """Raises UserError, which names the other process and ends with `remedy`, if the folder has a writer."""
        self.folder = folder
        self.descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self.descriptor, 200).decode(errors="replace").strip() or "another process"
            self.close()
            raise UserError(f"{folder}: {holder} is writing here\n  wait until it has ended, or {remedy}") from None
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            print(f"{folder}: this file system has no locks; make sure that no other process writes here")
        os.truncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def still_there(self) -> bool:
        """False if the folder was deleted, moved or replaced since."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), (self.folder / LOCK).stat())
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.descriptor)
