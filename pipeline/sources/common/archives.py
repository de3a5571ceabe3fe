"""Files of a folder, a zip or a gzipped tar, read by name and never unpacked to disk.

Names are relative, with forward slashes, and the same for a folder and its zip. A name that is absolute or leads out of its
archive is rejected, links are never followed, and files that declare more bytes than any image needs aren't read.
"""

from __future__ import annotations

import functools
import gzip
import os
import re
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError

__all__ = ["Files", "FolderFiles", "TarFiles", "ZipFiles", "file_stamp", "open_files"]

MAX_FILE_BYTES = 256 * 2**20
MAX_TAR_BYTES = 2**30  # of all files together, since a tar is held in memory
MAX_DEPTH = 100  # folders within folders
# Bytes read at a time, by method: the last two can inflate a few bytes a thousandfold.
PIECE_BYTES = {zipfile.ZIP_STORED: 2**20, zipfile.ZIP_DEFLATED: 2**20, zipfile.ZIP_BZIP2: 4096, zipfile.ZIP_LZMA: 4096}
HEAD_BYTES = 64
MS_DOS = 0  # the system that made a member of a zip
UTF8_NAME, ENCRYPTED = 0x800, 0x1  # flags of a member of a zip
METHODS = {6: "imploded", 9: "deflate64", 93: "zstd", 95: "xz", 97: "wavpack", 98: "ppmd"}


class Files(ABC):
    """The files of a folder or an archive.

    Attributes:
        path: The folder or the archive.
        names: Names of all files, in order, without hidden ones (those with a part that starts with a dot, and `__MACOSX`).
        folders: Names of all folders, in order, including those without files.
    """

    path: Path
    names: tuple[str, ...]
    folders: tuple[str, ...]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError, ValueError: When it can't be read; the message says why.
        """

    @abstractmethod
    def head(self, name: str) -> bytes:
        """The first 64 bytes of a file, by which its kind is recognised; none if they can't be read."""


def _checked(name: str, path: Path) -> str:
    """A file's normalised name, or a DataError when it leads out of the archive or is too deep."""
    # Backslashes are separators on some systems, where such a name would lead out.
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[/\\]", name) or "\0" in name:
        raise DataError(f"{path} holds a member '{name[:100]}' whose path leads out of the archive; rename it, or get it again")
    if name.count("/") > MAX_DEPTH:
        raise DataError(f"{path} holds '{name[:100]}..', more than {MAX_DEPTH} folders deep; pack it without so many folders")
    return "/".join(PurePosixPath(name).parts)


def _zip_names(members: list[zipfile.ZipInfo]) -> list[str]:
    """The names of a zip's members as they would be in a folder.

    Names that aren't marked as UTF-8 are taken as bytes, since their encoding is unknown. Those of Windows programs are read as
    the first of UTF-8, Japanese (cp932) and Western (cp437) that all of them are valid in, since these programs unpack them to
    a folder with Unicode names, by whose order the split is drawn. Some Windows programs write backslashes between folders,
    against the standard; they are recognised by zips without any slash.
    """
    dos_separators = not any("/" in member.filename for member in members)
    raw_names, unknown = [], []
    for member in members:
        name = member.filename
        marked = member.flag_bits & UTF8_NAME or not _in_cp437(name)
        raw = name.encode("utf-8", "surrogateescape") if marked else name.encode("cp437")
        if dos_separators and member.create_system == MS_DOS:
            # In Japanese or Chinese encodings, 0x5c after a byte above 0x80 is part of a character, not a backslash.
            raw = raw.replace(b"\\", b"/") if marked else re.sub(rb"(?<![\x81-\xfe])\\", b"/", raw)
        raw_names.append(raw)
        unknown.append(not marked and member.create_system == MS_DOS)
    encoding = _encoding([raw for raw, is_unknown in zip(raw_names, unknown, strict=True) if is_unknown])
    return [
        raw.decode(encoding) if is_unknown else os.fsdecode(raw) for raw, is_unknown in zip(raw_names, unknown, strict=True)
    ]


def _encoding(names: list[bytes]) -> str:
    """The first encoding in which all names are valid and differ; every byte is valid in the last."""
    for encoding in ("utf-8", "cp932"):
        try:
            if len({name.decode(encoding) for name in names}) == len(set(names)):
                return encoding
        except UnicodeDecodeError:
            continue
    return "cp437"


def _in_cp437(name: str) -> bool:
    try:
        name.encode("cp437")
    except UnicodeEncodeError:
        return False
    return True


def _words(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _with_parents(names: set[str]) -> tuple[str, ...]:
    """Folders and their parent folders, in order."""
    every = {str(parent) for name in names for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    return tuple(sorted(every - {".", ""}))


class FolderFiles(Files):
    """The files of a folder, at any depth.

    Arguments:
        path: The folder, which may itself be a link.

    Raises:
        DataError: When a folder below it is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, folders = [], []
        for here, below, files in os.walk(path, onerror=_raise):
            inside = os.path.relpath(here, path)
            if inside.count(os.sep) >= MAX_DEPTH:
                raise DataError(f"{path} holds folders more than {MAX_DEPTH} deep, in {inside[:100]}..; take them out")
            for name in below:
                if os.path.islink(os.path.join(here, name)):
                    raise DataError(f"{here}/{name} is a symbolic link, which isn't followed; put the folder itself there")
            names += [os.path.normpath(os.path.join(inside, name)) for name in files]
            folders += [os.path.normpath(os.path.join(inside, name)) for name in below]
        self.names = tuple(sorted(_checked(name, path) for name in names if not _hidden(name)))
        self.folders = tuple(sorted(name for name in folders if not _hidden(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a regular file; links aren't followed."""
        path = self.path / name
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise ValueError("it is a symbolic link, which isn't followed")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it isn't a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"its {status.st_size} bytes are more than {MAX_FILE_BYTES}")
        return path.read_bytes()

    def head(self, name: str) -> bytes:
        """See `Files`."""
        path = self.path / name
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would block
            return b""
        try:
            with path.open("rb") as file:
                return file.read(HEAD_BYTES)
        except OSError:
            return b""


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read ({error.strerror})")


class ZipFiles(Files):
    """The files of a zip.

    Arguments:
        path: The zip.

    Raises:
        DataError: When it isn't a whole zip, or holds a link, a member twice, or one whose path leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # zipfile raises errors of many types
            raise DataError(f"{path} isn't a whole zip ({_words(error)}); get it again") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        members = self._zip.infolist()
        for member, written in zip(members, _zip_names(members), strict=True):
            name = _checked(written, path)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(
                    f"{path}: member '{name[:100]}' is a symbolic link, which isn't followed; get the archive again"
                )
            if written.endswith("/"):
                folders.add(name)
            elif name in self._members:
                raise DataError(f"{path} holds '{name[:100]}' twice; get the archive again")
            else:
                self._members[name] = member
        self.names = tuple(sorted(name for name in self._members if not _hidden(name)))
        folders |= {str(PurePosixPath(name).parent) for name in self.names}
        self.folders = tuple(name for name in _with_parents(folders) if not _hidden(name))

    def read(self, name: str) -> bytes:
        """The bytes of a member; its checksum is verified."""
        member = self._members[name]
        if member.file_size > MAX_FILE_BYTES:
            raise ValueError(f"its {member.file_size} bytes are more than {MAX_FILE_BYTES}")
        if member.flag_bits & ENCRYPTED:
            raise ValueError("it is encrypted; unpack the zip with its password and pack it without one")
        if member.compress_type not in PIECE_BYTES:
            method = METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise ValueError(
                f"it is compressed by {method}, which can't be read here; pack it again with deflate, the usual method"
            )
        # In pieces, so memory is bounded by the declared length, not by what the data inflate to.
        data = bytearray()
        try:
            with self._zip.open(member) as file:
                while piece := file.read(PIECE_BYTES[member.compress_type]):
                    data += piece
        except Exception as error:  # zipfile and its decompressors raise errors of many types
            raise ValueError(f"the zip's member is damaged: {_words(error)}") from None
        return bytes(data)

    def head(self, name: str) -> bytes:
        """See `Files`."""
        member = self._members[name]
        if member.flag_bits & ENCRYPTED or member.compress_type not in PIECE_BYTES:
            return b""
        try:
            with self._zip.open(member) as file:
                return file.read(HEAD_BYTES)
        except Exception:  # zipfile and its decompressors raise errors of many types
            return b""


class TarFiles(Files):
    """The files of a gzipped tar, kept in memory since it can only be read from its start.

    Arguments:
        path: The tar.
        ends: Endings of the names that are kept, in lower case.

    Raises:
        DataError: When it isn't whole, holds a member whose path leads out of it, or is larger than 1 GiB unpacked.
    """

    def __init__(self, path: Path, ends: tuple[str, ...]) -> None:
        self.path = path
        self._files: dict[str, bytes] = {}
        total = 0
        try:
            with gzip.open(path) as stream, tarfile.open(fileobj=stream) as tar:
                for member in tar:
                    name = _checked(member.name, path)
                    if not member.isreg() or _hidden(name) or not name.lower().endswith(ends):
                        continue  # links among them: they aren't followed
                    total += member.size
                    if total > MAX_TAR_BYTES:
                        raise DataError(f"{path} unpacks to more than {MAX_TAR_BYTES} bytes; get the archive again")
                    file = tar.extractfile(member)
                    self._files[name] = file.read() if file is not None else b""
                # To the end, where the checksum of the whole file is: a broken header would end the list of members unnoticed.
                while (chunk := stream.read(2**20)) and total <= MAX_TAR_BYTES:
                    total += len(chunk)
        except DataError:
            raise
        except Exception as error:  # tarfile and gzip raise errors of many types
            raise DataError(f"{path} isn't a whole .tgz ({_words(error)}); get it again") from None
        self.names = tuple(sorted(self._files))
        self.folders = _with_parents({str(PurePosixPath(name).parent) for name in self.names})

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        return self._files[name]

    def head(self, name: str) -> bytes:
        """See `Files`."""
        return self._files[name][:HEAD_BYTES]


def file_stamp(path: Path) -> tuple[int, int]:
    """Identifies a version of a file, for caches: the time of its last change and its length.

    Raises:
        DataError: When it's gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})") from None
    return status.st_mtime_ns, status.st_size


def open_files(path: Path) -> Files:
    """A folder or a zip, kept open by each process for the next call.

    Raises:
        DataError: When it's neither, or isn't whole.
    """
    # One open file per process: forked processes that share one would move each other's position in it.
    return _open_files(path, file_stamp(path), os.getpid())


@functools.lru_cache(maxsize=8)
def _open_files(path: Path, stamp: tuple[int, int], process: int) -> Files:
    return FolderFiles(path) if path.is_dir() else ZipFiles(path)
