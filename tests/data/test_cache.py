"""The cache of decoded images: complete or absent, built once, and robust against accidents."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from torchrelay.data import cache
from torchrelay.errors import RelayError

SHAPE = (6, 3, 8, 8)


class Fill:
    """Fills the images with their indices, and counts its calls."""

    def __init__(self, missing=()):
        self.asked = 0
        self.missing = list(missing)

    def __call__(self, images):
        self.asked += 1
        images[...] = np.arange(len(images))[:, None, None, None]
        return self.missing


def whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_images_are_decoded_once_and_then_mapped(tmp_path):
    fill = Fill(missing=[2])
    first = cache.cached(tmp_path, "place", "key", SHAPE, fill)
    second = cache.cached(tmp_path, "place", "key", SHAPE, fill)
    assert fill.asked == 1
    assert np.array_equal(first.images, second.images)
    assert second.images[5].min() == second.images[5].max() == 5
    assert (second.missing, second.content) == ([2], first.content)


def test_writing_to_cached_images_does_not_change_the_file(tmp_path):
    cache.cached(tmp_path, "place", "key", SHAPE, Fill()).images[0] = 77
    assert cache.cached(tmp_path, "place", "key", SHAPE, Fill()).images[0].max() == 0


def test_the_content_is_the_same_in_memory_and_changes_with_a_pixel(tmp_path):
    kept = cache.cached(tmp_path, "place", "key", SHAPE, Fill())
    assert cache.in_memory(SHAPE, Fill()).content == kept.content

    def other(images):
        Fill()(images)
        images[5, 2, 7, 7] += 1
        return []

    assert cache.in_memory(SHAPE, other).content != kept.content


def test_another_key_replaces_only_the_cache_of_the_same_folder(tmp_path):
    cache.cached(tmp_path, "here", "old", SHAPE, Fill())
    cache.cached(tmp_path, "there", "old", SHAPE, Fill())
    cache.cached(tmp_path, "here", "new", SHAPE, Fill())
    assert [path.name for path in whole(tmp_path)] == ["here-new", "there-old"]


def test_a_replaced_cache_stays_readable_while_it_is_open(tmp_path):
    old = cache.cached(tmp_path, "here", "old", SHAPE, Fill())
    cache.cached(tmp_path, "here", "new", SHAPE, Fill())
    assert old.images[:, 0, 0, 0].tolist() == list(range(6))


@pytest.mark.parametrize(
    "damage",
    [
        lambda target: os.truncate(target / "images.bin", 100),
        lambda target: (target / "images.bin").unlink(),
        lambda target: (target / "facts.json").write_text(""),
        lambda target: (target / "facts.json").write_text('{"shape": [6, 3, 8'),
        lambda target: (target / "facts.json").write_text("[]"),
        lambda target: (target / "facts.json").write_text("5"),
        lambda target: replace_in(target / "facts.json", '"missing": []', '"missing": [4]'),
        lambda target: os.truncate(target / "images.bin", 6 * 3 * 8 * 8 + 1),
        lambda target: (target / "facts.json").write_text(
            json.dumps((facts := {"shape": [6, 3, 4, 4], "missing": []}) | {"checksum": cache.key_of(facts)})
        ),
        lambda target: (target / "facts.json").unlink(),
        lambda target: (target / "marks.txt").unlink(),
        lambda target: (target / "marks.txt").write_text("0"),
    ],
    ids=[
        "truncated images",
        "no images",
        "empty facts",
        "cut facts",
        "other facts",
        "a number for facts",
        "edited facts",
        "longer images",
        "foreign shape",
        "no facts",
        "no marks",
        "too few marks",
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    first = cache.cached(tmp_path, "place", "key", SHAPE, Fill())
    damage(tmp_path / "place-key")
    fill = Fill()
    second = cache.cached(tmp_path, "place", "key", SHAPE, fill)
    assert fill.asked == 1
    assert second.content == first.content


def test_an_error_while_decoding_leaves_nothing_behind(tmp_path):
    def fail(images):
        raise RelayError("x.png can't be read")

    with pytest.raises(RelayError, match=r"x\.png"):
        cache.cached(tmp_path, "place", "key", SHAPE, fail)
    assert whole(tmp_path) == []


def test_a_cache_whose_builder_was_killed_is_rebuilt(start, tmp_path):
    process = start(
        tmp_path,
        program="""
        import sys, time
        from pathlib import Path
        from torchrelay.data import cache

        def slow(images):
            images[0] = 1
            print("decoding", flush=True)
            time.sleep(60)

        cache.cached(Path(sys.argv[1]), "place", "key", (6, 3, 8, 8), slow)
        """,
    )
    process.until(lambda: process.output == "decoding\n")
    process.send(signal.SIGKILL)
    process.wait()
    assert [path.name for path in whole(tmp_path)] == [".place-key.partial"]
    fill = Fill()
    found = cache.cached(tmp_path, "place", "key", SHAPE, fill)
    assert fill.asked == 1
    assert found.images[:, 0, 0, 0].tolist() == list(range(6))
    assert [path.name for path in whole(tmp_path)] == ["place-key"]


def test_leftovers_of_a_killed_process_are_removed_even_after_the_folder_changed(tmp_path):
    (tmp_path / ".place-old.partial").mkdir()
    cache.cached(tmp_path, "place", "new", SHAPE, Fill())
    assert [path.name for path in whole(tmp_path)] == ["place-new"]


def test_two_concurrent_processes_build_the_cache_once(start, tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        from torchrelay.data import cache

        def slow(images):
            print("decoding", flush=True)
            while not Path("go").exists():
                time.sleep(0.01)
            images[...] = 3
            return []

        print("ready", flush=True)
        found = cache.cached(Path(sys.argv[1]), "place", "key", (6, 3, 8, 8), slow)
        print(found.images.min(), found.content)
        """
    both = [start(tmp_path / "cache", program=program) for _ in range(2)]
    for process in both:
        process.until(lambda process=process: "ready" in process.output)
    time.sleep(0.3)  # the other one waits for the cache, or would decode too
    (tmp_path / "go").touch()
    said = [process.done().stdout.splitlines() for process in both]
    assert sum("decoding" in lines for lines in said) == 1
    assert said[0][-1] == said[1][-1]
    assert said[0][-1].startswith("3 ")


def test_a_full_disk_is_an_error_with_the_bytes_needed_and_free(namespace, tmp_path):
    namespace.shell(f"mount -t tmpfs -o size=4m tmpfs {tmp_path}")
    program = """
        import sys
        from pathlib import Path
        from torchrelay.data import cache
        from torchrelay.errors import RelayError
        folder = Path(sys.argv[1]) / "caches"
        try:
            cache.cached(folder, "place", "key", (10_000, 3, 32, 32), lambda images: sys.exit("it was decoded"))
        except RelayError as error:
            print(error)
        print(sorted(path.name for path in folder.iterdir()))
        """
    done = namespace.server.start(tmp_path, program=program, folder=tmp_path).done()
    message, left = (done.stdout + done.stderr).splitlines()
    assert "No space left on device" in message
    assert "it needs 30,720,000 bytes and 4,1" in message
    assert "data.cache_dir" in message
    assert left == "['place.lock']"


def test_a_cache_on_a_disk_that_cannot_be_written_is_used(namespace, tmp_path):
    cache.cached(tmp_path, "place", "key", SHAPE, Fill())
    namespace.shell(f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}")
    program = """
        import sys
        from pathlib import Path
        from torchrelay.data import cache
        from torchrelay.errors import RelayError
        for key in ("key", "other"):
            try:
                print(cache.cached(Path(sys.argv[1]), "place", key, (6, 3, 8, 8), lambda images: []).images[4].max())
            except RelayError as error:
                print(error)
        """
    done = namespace.server.start(tmp_path, program=program, folder=tmp_path).done()
    found, refused = (done.stdout + done.stderr).splitlines()
    assert found == "4"
    assert "Read-only file system" in refused


def test_images_larger_than_the_memory_can_be_mapped(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = (2 * memory // (1024 * 1024), 1, 1024, 1024)
    target = tmp_path / "place-key"
    target.mkdir()
    with (target / "images.bin").open("wb") as file:
        try:
            file.truncate(shape[0] * 1024 * 1024)  # a sparse file takes no space
        except OSError:
            pytest.skip("this file system has no files of that size")
    (target / "marks.txt").write_text("0\n" * shape[0])
    facts = {"shape": shape, "missing": []}
    (target / "facts.json").write_text(json.dumps(facts | {"checksum": cache.key_of(facts)}))
    found = cache._open(target, shape)  # not `cached`, which would fill the disk if this weren't accepted
    assert found is not None
    assert found.images.shape == shape
    assert found.images[-1, 0, 0, 0] == 0


def test_a_cached_folder_is_not_decoded_again_until_a_file_changes(tmp_path):
    from PIL import Image

    from torchrelay.data import image_folder

    for i in range(4):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(path)
    said: list[str] = []

    def decodings() -> int:
        said.clear()
        image_folder(tmp_path / "data", cache_dir=tmp_path / "cache", log=said.append)
        return sum(line.startswith("decoding") for line in said)

    assert [decodings(), decodings()] == [1, 0]
    os.utime(path, ns=(0, time.time_ns() + 10**9))  # the same size, but changed later
    assert [decodings(), decodings()] == [1, 0]
    Image.new("RGB", (4, 4), (90, 80, 70)).save(path)
    assert [decodings(), decodings()] == [1, 0]
    (tmp_path / "data" / "a" / "0.png").unlink()
    assert [decodings(), decodings()] == [1, 0]
    assert len(whole(tmp_path / "cache")) == 1


# ------------------------------------------------------------------------------------------------ other systems


def test_data_modules_import_without_posix_modules(cli):
    program = """
        import mmap, os, pkgutil, sys
        from importlib import import_module

        from forked import forget

        forget("torchrelay")
        for name in ("fcntl", "grp", "pwd", "resource", "termios"):
            sys.modules[name] = None
        for name in ("uname", "fork", "posix_fallocate", "sched_getaffinity"):
            delattr(os, name)
        for name in ("MAP_PRIVATE", "PROT_READ", "PROT_WRITE", "MAP_NORESERVE"):
            vars(mmap).pop(name, None)
        sys.platform = "win32"
        from torchrelay import data
        for module in pkgutil.walk_packages(data.__path__, "torchrelay.data."):
            import_module(module.name)
        print("imported")
        """
    done = cli(program=program)
    assert done.stdout == "imported\n", done.stderr


def test_a_cache_is_mapped_without_posix_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    cache.cached(tmp_path, "place", "key", SHAPE, Fill())
    first, second = (cache.cached(tmp_path, "place", "key", SHAPE, Fill()).images for _ in range(2))
    first[4] = 99
    assert second[4].max() == 4


@pytest.mark.parametrize("missing", [["x"], [6], [-1], 3, None])
def test_a_cache_whose_facts_are_not_ours_is_made_again(tmp_path, missing):
    fill = Fill()
    cache.cached(tmp_path, "source", "key", SHAPE, fill)
    facts = {"shape": list(SHAPE), "missing": missing}
    (whole(tmp_path)[0] / "facts.json").write_text(json.dumps({**facts, "checksum": cache.key_of(facts)}))
    assert cache.cached(tmp_path, "source", "key", SHAPE, fill).missing == []
    assert fill.asked == 2


def test_a_cache_with_deeply_nested_facts_is_made_again(tmp_path):
    fill = Fill()
    cache.cached(tmp_path, "source", "key", SHAPE, fill)
    (whole(tmp_path)[0] / "facts.json").write_text("[" * 5000)
    cache.cached(tmp_path, "source", "key", SHAPE, fill)
    assert fill.asked == 2


def test_a_cache_whose_facts_are_far_too_long_is_made_again(tmp_path):
    fill = Fill()
    cache.cached(tmp_path, "source", "key", SHAPE, fill)
    path = whole(tmp_path)[0] / "facts.json"
    path.write_text(path.read_text() + " " * 2**20)  # still valid JSON
    cache.cached(tmp_path, "source", "key", SHAPE, fill)
    assert fill.asked == 2
