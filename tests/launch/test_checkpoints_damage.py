"""Checkpoints that were altered, cut or lost: an older one comes back, never a wrong state."""

import os
import shutil
from pathlib import Path

import checkpoint_states
import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import assert_is, files, make, newest, restore, save, steps

from launch import UsageError
from launch.checkpoints import DamagedError

saved, copied = checkpoint_states.saved, checkpoint_states.copied

# Reads that outlive orbax's patience with a damaged checkpoint; on a busy machine some come late.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damage_in_the_middle(path):
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
    path.write_bytes(data)


def test_altered_bytes_anywhere_never_come_back_as_a_state(saved, tmp_path, capsys):
    fallbacks = silent = 0
    names = [path.relative_to(saved) for path in files(newest(saved))]
    for number, name in enumerate(names):
        size = (saved / name).stat().st_size
        for at in sorted({0, size // 3, size // 2, 2 * size // 3, max(0, size - 4)}):
            folder = Path(shutil.copytree(saved, tmp_path / f"{number}-{at}"))
            data = bytearray((folder / name).read_bytes())
            data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
            (folder / name).write_bytes(data)
            found = restore(folder)
            assert_is(found, found.step)
            fallbacks += found.step == 1
            silent += "bytes are not those" in capsys.readouterr().err
    assert fallbacks > len(names)
    assert silent  # orbax itself restores some of these without an error


def test_an_altered_number_in_the_header_is_noticed(copied, capsys):
    (header,) = (path for path in files(newest(copied)) if "header/metadata" in str(path))
    text = header.read_text()
    assert '"meta": {"step": 2}' in text
    header.write_text(text.replace('"meta": {"step": 2}', '"meta": {"step": 3}'))
    assert_is(restore(copied), 1)
    assert "bytes are not those" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["half", "nothing", "missing"])
def test_truncated_and_missing_files(saved, tmp_path, harm):
    fallbacks = 0
    for number, path in enumerate(files(newest(saved))):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        target = folder / path.relative_to(saved)
        if harm == "missing":
            target.unlink()
        else:
            os.truncate(target, target.stat().st_size // 2 if harm == "half" else 0)
        found = restore(folder)
        assert_is(found, found.step)
        fallbacks += found.step == 1
    assert fallbacks >= 3


def test_after_a_fallback_saving_goes_on(copied, capfd):
    bad = newest(copied)
    data = max(files(bad), key=lambda path: path.stat().st_size)
    damage_in_the_middle(data)
    content = data.read_bytes()
    assert_is(restore(copied), 1)
    err = capfd.readouterr().err
    assert "checkpoint of step 2 is damaged (" in err
    assert "falling back to step 1" in err
    assert err.count("\n") == 1
    (aside,) = (copied / "damaged" / "latest").iterdir()  # nothing is deleted
    assert (aside / data.relative_to(bad)).read_bytes() == content
    save(copied, 2)
    assert_is(restore(copied), 2)
    assert steps(copied / "latest") == [1, 2]
    damage_in_the_middle(max(files(newest(copied)), key=lambda path: path.stat().st_size))
    assert_is(restore(copied), 1)
    assert len(list((copied / "damaged" / "latest").iterdir())) == 2


def test_an_empty_folder_is_damage(copied, capsys):
    (copied / "latest" / "000003-step-3").mkdir()
    assert_is(restore(copied), 2)
    assert "step 3 is damaged (the folder is empty)" in capsys.readouterr().err


def test_if_all_are_damaged_it_says_so_every_time(copied):
    for path in (copied / "latest").iterdir():
        shutil.rmtree(path)
        path.mkdir()
    before = sorted(copied.rglob("*"))
    for _ in range(2):
        with pytest.raises(
            DamagedError, match=r"every checkpoint is damaged \(step 2: .*; step 1:"
        ):
            restore(copied)
        assert sorted(copied.rglob("*")) == before
    assert_is(restore(copied, which="best"), 2)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            make(0, dtype=jnp.bfloat16),
            r"params\.w is float32\[500, 2\] there and bfloat16\[500, 2\] here",
        ),
        (
            make(0, dtype=jnp.int32),
            r"params\.w is float32\[500, 2\] there and int32\[500, 2\] here",
        ),
        (make(0, width=501), r"params\.w is float32\[500, 2\] there and float32\[501, 2\] here"),
        (make(0)._replace(ema=jnp.zeros(2)), r"ema is absent there and float32\[2\] here"),
        (make(0)._replace(params={}), r"params\.w is float32\[500, 2\] there and absent here"),
        (make(0)._replace(key=jax.random.key(0, impl="rbg")), r"key is key<fry>\[\] there"),
        ({str(n): jnp.zeros(2) for n in range(9)}, r"and 10 more"),
    ],
)
def test_another_state_is_no_damage(copied, like, words):
    before = sorted(copied.rglob("*"))
    with pytest.raises(UsageError, match=words) as error:
        restore(copied, like)
    assert not isinstance(error.value, DamagedError)
    assert "checkpoint of step 2" in str(error.value)
    assert sorted(copied.rglob("*")) == before
