"""A stand-in for Google's object store that several processes see: a local directory behind ``gs://``.

Objects are there whole or not at all; there is no append, no rename and no directory. Orbax takes its
ways for ``gs://``, and TensorStore, whose own client would need a server, writes into the directory.
``python -m ravine.tests.object_store DIRECTORY ...`` is ``python -m ravine ...`` with it, and of several
processes only the first sees its temporary folders.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import fsspec
from orbax.checkpoint._src.path import gcs_utils


class Store(fsspec.AbstractFileSystem):
    """All buckets, as fsspec sees them; their names are the first folders below `root`."""

    protocol = ("gs", "gcs")
    root = Path()

    def _objects(self, prefix):
        inside = self.root / prefix
        files = [inside] if inside.is_file() else (f for f in inside.rglob("*") if f.is_file())
        hidden = (".__lock", ".written")  # TensorStore's, and our own
        return {
            file.relative_to(self.root).as_posix(): file.stat().st_size
            for file in sorted(files)
            if not file.name.endswith(hidden)
        }

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        found = {}
        for name, size in self._objects(path).items():
            inner, _, below = name.removeprefix(path).lstrip("/").partition("/")
            entry = f"{path}/{inner}" if inner else path
            kind = "directory" if below else "file"
            found[entry] = {"name": entry, "size": 0 if below else size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        objects = self._objects(path)
        if not objects:
            raise FileNotFoundError(path)
        size = objects.get(path)
        return {
            "name": path,
            "size": size or 0,
            "type": "directory" if size is None else "file",
        }

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return (self.root / path).open("rb")
        assert mode == "wb", f"no {mode} in an object store"
        return _Upload(self, path)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        file = self.root / self._strip_protocol(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}.written")
        draft.write_bytes(value)
        try:
            if mode == "create":
                os.link(draft, file)
            else:
                draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    def cp_file(self, path1, path2, **kwargs):
        if not self.isdir(path1):
            self.pipe_file(path2, self.cat_file(path1))

    def _rm(self, path):
        if (file := self.root / self._strip_protocol(path)).is_file():
            file.unlink()

    def mkdir(self, path, create_parents=True, **kwargs):
        """There are none."""

    def makedirs(self, path, exist_ok=False):
        """There are none."""

    def rmdir(self, path):
        """There are none."""


class _Upload(io.BytesIO):
    def __init__(self, store, path):
        super().__init__()
        self._store, self._path = store, path

    def close(self):
        if not self.closed:
            self._store.pipe_file(self._path, self.getvalue())
        super().close()


@contextlib.contextmanager
def standing_in(directory):
    """While entered, the buckets of ``gs://`` are the folders of a directory."""
    Store.root = Path(directory)
    fsspec.register_implementation("gs", Store, clobber=True)
    fsspec.register_implementation("gcs", Store, clobber=True)

    def kvstore(path):
        name = gcs_utils.parse_gcs_path(path, add_trailing_slash=False)
        return {"driver": "file", "path": str(Path(directory, *name))}

    with mock.patch.multiple(
        gcs_utils,
        get_kvstore_for_gcs=kvstore,
        is_hierarchical_namespace_enabled=lambda path: False,
    ):
        yield Store.root


def keep_out(folders):
    """Refuses what is in folders whose names begin so, as if they were on another machine."""

    def hook(event, args):
        watched = ("open", "os.listdir", "os.scandir", "os.mkdir")
        if event in watched and str(args[0]).startswith(folders):
            raise AssertionError(f"{event} {args[0]}")

    sys.addaudithook(hook)


if __name__ == "__main__":
    from ravine.__main__ import run

    if "--process-id" in sys.argv and sys.argv[sys.argv.index("--process-id") + 1] != "0":
        keep_out(f"{tempfile.gettempdir()}/ravine-")
    with standing_in(sys.argv.pop(1)):
        run()
