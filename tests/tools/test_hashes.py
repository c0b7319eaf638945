"""The list of hashes for `pip install --require-hashes`."""

import re

from tools import hashes

REPORT = {
    "environment": {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"},
    "install": [
        {
            "metadata": {"name": "numpy", "version": "2.4.6"},
            "download_info": {
                "url": "https://index.invalid/numpy.whl",
                "archive_info": {"hashes": {"sha256": "b" * 64}},
            },
        },
        {
            "metadata": {"name": "Jinja2", "version": "3.1"},
            "download_info": {
                "url": "https://index.invalid/jinja2.whl",
                "archive_info": {"hashes": {"sha256": "a" * 64}},
            },
        },
        {"metadata": {"name": "torchrelay", "version": "0.1.0"}, "download_info": {"url": "file:///x", "dir_info": {}}},
    ],
}


def test_each_package_has_the_hash_of_its_file_and_no_address():
    text = hashes.requirements(REPORT)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [f"Jinja2==3.1 --hash=sha256:{'a' * 64}", f"numpy==2.4.6 --hash=sha256:{'b' * 64}"]
    assert not re.search(r"://|torchrelay==", text)
    assert "Python 3.11 on linux, x86_64" in text


def pins(name: str) -> dict[str, str]:
    lines = (hashes.ROOT / name).read_text().splitlines()
    found = (re.match(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {each[1].lower().replace("_", "-"): each[2] for each in found if each}


def test_the_list_has_the_versions_of_the_constraints():
    constraints, listed = pins("constraints.txt"), pins("constraints-hashes.txt")
    assert {name: version for name, version in listed.items() if constraints.get(name, version) != version} == {}
    # What the benchmarks are compared with isn't part of a development environment.
    peers = {"accelerate", "keras", "lightning", "pytorch-ignite", "skorch"}
    assert set(constraints) - set(listed) <= peers
