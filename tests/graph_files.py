"""Files of graphs: the real sets where they are, and pickles as Python 2 wrote them."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def real_data(*parts: str) -> Path:
    """A file or folder of the real data; the test is skipped where it is not."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real data: {'/'.join(parts)} is not in shared/data beside the repository")
    return path


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 does, which had them as strings."""

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}


def python2_pickle(value: Any) -> bytes:
    """What Python 2 with the numpy and scipy of its time would write."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    renamed = file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    return renamed.replace(b"cscipy.sparse._csr\n", b"cscipy.sparse.csr\n")
